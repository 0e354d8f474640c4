"""The torch side of the parity tests: a tiny model with every weight re-drawn, saved as a checkpoint, and what it
computes. Each case is built once per process."""

import copy
import dataclasses
import functools
import json
import logging
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.models.cases import LENGTH, VOCAB, Case

logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()
ROWS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """A checkpoint on disk and the original's results for `tokens` [3, LENGTH].

    The original runs in float64 (its norms, softmax and RoPE cast to float32 themselves): in float32 its own rounding
    reaches 2e-6, and would leave no room to see ours.
    """

    case: Case
    directory: Path
    model: Any  # float64
    tokens: np.ndarray
    logits: np.ndarray  # [3, LENGTH, VOCAB]
    keep: Any  # owns the directory

    def gradients(self, directory: Path) -> None:
        """Writes a checkpoint of the gradients of a summed cross-entropy: they go through the same renaming."""
        tokens = torch.tensor(self.tokens)
        logits = self.model(tokens).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for new, old in zip(model.parameters(), self.model.parameters(), strict=True):
                new.copy_(old.grad if old.grad is not None else torch.zeros_like(old))
        self.model.zero_grad(set_to_none=True)
        model.save_pretrained(directory)

    def generate(self, prompt: np.ndarray, **options) -> np.ndarray:
        """The tokens that follow one prompt."""
        ids = torch.tensor(prompt)[None]
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        return out[0, len(prompt) :].numpy()

    def router_loss(self, valid: np.ndarray | None = None) -> float:
        """The auxiliary loss of transformers, over the valid tokens."""
        mask = None if valid is None else torch.tensor(valid.astype(np.int64))
        config = self.model.config
        experts = config.num_local_experts if "num_local_experts" in config.to_dict() else config.num_experts
        # In float32: masks hold the dtype's least number, which is -inf once float64 is cast down for the softmax.
        model = copy.deepcopy(self.model).float()
        with torch.no_grad():
            out = model(torch.tensor(self.tokens), attention_mask=mask, output_router_logits=True)
        return float(load_balancing_loss_func(out.router_logits, experts, config.num_experts_per_tok, mask))


@functools.cache
def reference(case: Case) -> Reference:
    keep = tempfile.TemporaryDirectory(prefix=f"jaxlm-{case.id}-")
    directory = Path(keep.name) / "checkpoint"
    model = build(case)
    model.save_pretrained(directory, max_shard_size=case.shard)
    respell(case, directory, model.config)
    tokens = well_conditioned(model, np.random.default_rng(zlib.crc32(case.id.encode())))
    with torch.no_grad():
        logits = model.double()(torch.tensor(tokens)).logits.numpy()
    return Reference(case, directory, model, tokens, logits, keep)


def well_conditioned(model: Any, rng: np.random.Generator) -> np.ndarray:
    """The 3 of 16 random sequences on which the original's own float32 rounding matters least: random networks have
    inputs on which it is amplified tenfold, and there nobody's float32 agrees with anybody's."""
    tokens = torch.tensor(rng.integers(3, VOCAB, (16, LENGTH)))
    with torch.no_grad():
        precise = copy.deepcopy(model).double()(tokens).logits
        rounding = (model(tokens).logits - precise).abs().amax((1, 2)) / precise.abs().amax((1, 2))
    return tokens[rounding.argsort()[:ROWS]].numpy()


def build(case: Case) -> Any:
    """The torch model with all weights, norms and biases drawn with std 0.2; norm scales around their neutral value."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
    kwargs = json.loads(json.dumps(case.kwargs))  # transformers writes into the dicts it is given
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # experts have no float64 otherwise
    config = getattr(transformers, case.config)(**kwargs, **eager)
    model = getattr(transformers, case.model)(config).eval()
    neutral = 0.0 if "gemma" in config.model_type else 1.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
            if p.ndim == 1 and name.endswith("weight"):
                p += neutral
    return model


def respell(case: Case, directory: Path, config: Any) -> None:
    """Rewrites config.json as the case says, and checks that transformers still reads the same model from it."""
    path = directory / "config.json"
    stored = json.loads(path.read_text())
    if case.spelling == 4:
        stored = spelled_4(stored, case.rope_key)
    for key in case.dropped:
        stored.pop(key, None)
    path.write_text(json.dumps(stored | case.stored, indent=2))
    again = transformers.AutoConfig.from_pretrained(directory)
    for key in ("layer_types", "head_dim", "num_key_value_heads", "hidden_act", "hidden_activation", "sliding_window"):
        ours, theirs = getattr(again, key, None), getattr(config, key, None)
        if key not in case.stored and ours != theirs:
            raise AssertionError(f"{case.id}: {key} is {ours!r} after rewriting, was {theirs!r}")
    ours, theirs = _comparable(again), _comparable(config)
    if ours != theirs:
        raise AssertionError(f"{case.id}: RoPE is {ours} after rewriting, was {theirs}")


def _comparable(config: Any) -> Any:
    ropes = getattr(config, "rope_parameters", None)
    strip = lambda d: {k: v for k, v in d.items() if k != "type"} if isinstance(d, dict) else d
    return strip({k: strip(v) for k, v in ropes.items()}) if ropes else None


def spelled_4(stored: dict[str, Any], rope_key: str) -> dict[str, Any]:
    """config.json as transformers 4 wrote it: torch_dtype, rope_theta, rope_scaling."""
    stored = dict(stored, torch_dtype=stored.pop("dtype"), transformers_version="4.40.0")
    ropes = stored.pop("rope_parameters", None)
    if ropes is None:
        return stored
    if "full_attention" in ropes:
        stored["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        ropes = ropes["full_attention"]
    ropes = dict(ropes)
    stored["rope_theta"] = ropes.pop("rope_theta")
    if (fraction := ropes.pop("partial_rotary_factor", 1.0)) != 1.0:
        stored["partial_rotary_factor"] = fraction
    kind = ropes.pop("rope_type")
    if "original_max_position_embeddings" in stored:  # Phi-3 keeps it outside
        ropes.pop("original_max_position_embeddings", None)
    stored["rope_scaling"] = None if kind == "default" else {rope_key: kind, **ropes}
    return stored
