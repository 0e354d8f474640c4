"""Classification and extraction heads on any trunk, with the shapes and losses of transformers' `...For...` classes.

variables["task"] = {"score": {"w": [D, labels], "b": [labels]}}; sequence classification has no bias and looks at the
last token that is no padding.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.models.layers import contract
from jaxlm.train.losses import IGNORE
from jaxlm.train.objectives import Objective
from jaxlm.train.step import Batch, Loss, Tree

KINDS = ("sequence", "tokens", "question")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """kind: one of KINDS; "question" marks a span, with two labels. problem: of a sequence, "single" label, "multi"
    label (sigmoid) or "regression". class_weights weigh the labels of the "single" problem and of tokens."""

    kind: str
    labels: int = 2
    problem: str = "single"
    class_weights: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"task {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.problem not in ("single", "multi", "regression"):
            raise ValueError(f"problem={self.problem!r}: expected single, multi or regression")
        if self.kind != "sequence" and self.problem != "single":
            raise ValueError(f"problem={self.problem!r} is for sequences, not for {self.kind!r}")
        if self.kind == "question" and self.labels != 2:
            raise ValueError(f"labels={self.labels}: a span has a start and an end, 2")
        if self.class_weights and len(self.class_weights) != self.labels:
            raise ValueError(f"{len(self.class_weights)} class_weights for {self.labels} labels")


def init_head(task: Task, width: int, key: Array, std: float = 0.02) -> Tree:
    """A fresh head for hidden states of this width."""
    head = {"w": std * jax.random.normal(key, (width, task.labels))}
    return {"score": head if task.kind == "sequence" else head | {"b": jnp.zeros(task.labels)}}


def logits(objective: Objective, task: Task, variables: Tree, batch: Batch, rng: Array | None = None) -> Array:
    """float32 scores: [B, labels] of a sequence, else [B, T, labels]."""
    hidden, _ = objective.hidden(variables, batch, rng)
    head = variables["task"]["score"]
    if task.kind == "sequence":
        real = _real(batch)
        last = real.shape[1] - 1 - real[:, ::-1].argmax(1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], 1)
    scores = contract("BTD,DL->BTL", hidden, head["w"], out=jnp.float32)
    return scores[:, 0] if task.kind == "sequence" else scores + head["b"]


def task_loss(objective: Objective, task: Task) -> Loss:
    """The loss of labels: [B] ints ("single"), [B, labels] 0 or 1 ("multi") or numbers ("regression"); [B, T] ints of
    tokens, -100 for none; [B, 2] positions of a span's start and end, of which one outside the text counts for nothing.
    """

    def loss(variables: Tree, batch: Batch, rng: Array | None):
        scores, labels = logits(objective, task, variables, batch, rng), batch["labels"]
        if task.kind == "question":
            return _span(scores, labels, _real(batch))
        if task.problem == "single":
            return _single(scores, labels, jnp.asarray(task.class_weights or (1.0,) * task.labels))
        weight = jnp.float32(labels.size)
        if task.problem == "regression":
            return ((scores - labels.reshape(scores.shape)) ** 2).sum(), weight, {}
        each = jax.nn.softplus(scores) - labels * scores
        return each.sum(), weight, {"accuracy": ((scores > 0) == (labels > 0.5)).sum().astype(jnp.float32)}

    return loss


def _single(scores: Array, labels: Array, class_weights: Array):
    keep = labels != IGNORE
    y = jnp.where(keep, labels, 0)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), y[..., None], -1)[..., 0]
    weights = jnp.where(keep, class_weights[y], 0)
    right = ((scores.argmax(-1) == y) * weights).sum()
    return (nll * weights).sum(), weights.sum(), {"accuracy": right}


def _span(scores: Array, ends: Array, real: Array):
    """The mean of the start's and the end's cross-entropy over positions; no span lies in padding, whose scores
    transformers counts, so that its loss depends on how much padding there is."""
    length = scores.shape[1]
    scores = jnp.where(real[..., None], scores, jnp.finfo(jnp.float32).min)
    total, weight, right = jnp.float32(0), jnp.float32(0), jnp.float32(0)
    for i in range(2):
        inside = (ends[:, i] >= 0) & (ends[:, i] < length)
        y = jnp.where(inside, ends[:, i], 0)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(scores[..., i], 1), y[:, None], 1)[:, 0]
        total += jnp.where(inside, nll, 0).sum() / 2
        weight += inside.sum() / 2
        right += ((scores[..., i].argmax(1) == y) & inside).sum() / 2
    return total, weight, {"accuracy": right}


def _real(batch: Batch) -> Array:
    segments = batch.get("segments")
    return jnp.ones(batch["tokens"].shape, bool) if segments is None else segments > 0
