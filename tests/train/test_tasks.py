"""Heads and their losses against transformers' classes on the same weights, with padded rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.train.objectives import Objective
from jaxlm.train.tasks import Task, init_head, logits, task_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

B, T, V, LABELS = 3, 9, 50, 4
CASES = {
    "single": ("LlamaForSequenceClassification", Task(kind="sequence", labels=LABELS)),
    "multi": ("LlamaForSequenceClassification", Task(kind="sequence", labels=LABELS, problem="multi")),
    "regression": ("LlamaForSequenceClassification", Task(kind="sequence", labels=1, problem="regression")),
    "tokens": ("LlamaForTokenClassification", Task(kind="tokens", labels=LABELS)),
    "question": ("LlamaForQuestionAnswering", Task(kind="question")),
}


def labels(task, rng):
    if task.kind == "question":
        return np.array([[1, 4], [0, 0], [2, 6]])
    if task.kind == "tokens":
        return np.where(rng.uniform(size=(B, T)) < 0.3, -100, rng.integers(0, LABELS, (B, T)))
    if task.problem == "multi":
        return rng.integers(0, 2, (B, LABELS)).astype(np.float32)
    return rng.normal(size=(B, 1)).astype(np.float32) if task.problem == "regression" else rng.integers(0, LABELS, B)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    kind, task = CASES[name]
    problem = {"multi": "multi_label_classification", "regression": "regression"}.get(task.problem)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=task.labels, pad_token_id=0, tie_word_embeddings=True, problem_type=problem,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.2)
    trunk = theirs.transformer if hasattr(theirs, "transformer") else theirs.model
    trunk.save_pretrained(tmp_path)
    model = jaxlm.load(tmp_path)
    score = theirs.qa_outputs if task.kind == "question" else theirs.score
    head = {"w": score.weight.detach().numpy().T}
    if score.bias is not None:
        head["b"] = score.bias.detach().numpy()
    rng = np.random.default_rng(0)
    padding = 0 if task.kind == "question" else 1  # transformers' span loss counts scores of padding
    valid = np.arange(T) < np.array([[T], [T - 3 * padding], [T - padding]])
    tokens = np.where(valid, rng.integers(1, V, (B, T)), 0)
    y = labels(task, rng)
    if task.kind == "tokens":
        y = np.where(valid, y, -100)  # what padding sees differs, and matters to nobody
    objective = Objective(backbone=model.family.backbone, config=model.config)
    variables = {"params": model.params, "task": {"score": head}}
    batch = {"tokens": tokens, "segments": valid.astype(np.int32), "labels": y}
    total, weight, _ = jax.jit(task_loss(objective, task))(variables, batch, None)
    given = {"labels": torch.tensor(y)}
    if task.kind == "question":
        given = {"start_positions": torch.tensor(y[:, 0]), "end_positions": torch.tensor(y[:, 1])}
    wanted = theirs(torch.tensor(tokens), attention_mask=torch.tensor(valid), **given)
    np.testing.assert_allclose(total / weight, wanted.loss.item(), rtol=1e-5)
    if task.kind == "sequence":
        scores = jax.jit(lambda v, b: logits(objective, task, v, b))(variables, batch)
        np.testing.assert_allclose(scores, wanted.logits.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_span_does_not_lie_in_padding():
    from jaxlm.train.tasks import _span

    scores = np.random.default_rng(0).normal(size=(1, 6, 2)).astype(np.float32)
    ends, real = jnp.array([[1, 2]]), np.arange(6)[None] < 4
    short = _span(jnp.array(scores[:, :4]), ends, jnp.array(real[:, :4]))
    np.testing.assert_allclose(_span(jnp.array(scores), ends, jnp.array(real))[0], short[0], rtol=1e-6)
    total, weight, _ = _span(jnp.array(scores[:, :4]), jnp.array([[1, 99]]), jnp.array(real[:, :4]))
    nll = np.log(np.exp(scores[0, :4, 0]).sum()) - scores[0, 1, 0]  # the end, out of reach, counts for nothing
    np.testing.assert_allclose([total, weight], [nll / 2, 0.5], rtol=1e-6)


def test_class_weights_are_torchs():
    rng = np.random.default_rng(0)
    scores, y, w = rng.normal(size=(6, 3)).astype(np.float32), np.array([0, 1, 2, 2, -100, 1]), (1.0, 2.0, 0.5)
    from jaxlm.train.tasks import _single

    total, weight, _ = _single(jnp.array(scores), jnp.array(y), jnp.array(w))
    wanted = torch.nn.functional.cross_entropy(torch.tensor(scores), torch.tensor(y), torch.tensor(w))
    np.testing.assert_allclose(total / weight, wanted.item(), rtol=1e-6)


def test_head_shapes():
    made = init_head(Task(kind="tokens", labels=5), 16, jax.random.key(0))
    assert made["score"]["w"].shape == (16, 5) and made["score"]["b"].shape == (5,)
    assert "b" not in init_head(Task(kind="sequence"), 16, jax.random.key(0))["score"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kind": "sequences"}, "task 'sequences': expected one of sequence"),
        ({"kind": "tokens", "problem": "multi"}, "problem='multi' is for sequences"),
        ({"kind": "question", "labels": 3}, "labels=3"),
        ({"kind": "sequence", "class_weights": (1.0,)}, "1 class_weights for 2 labels"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        Task(**bad)
