"""Parts of a config.json that families share, in the spellings of transformers 4 and 5."""

import math
from collections.abc import Sequence

from jaxlm.models.reader import Reader
from jaxlm.models.rope import Rope

ACTS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def head_dim(r: Reader) -> int:
    return r.get("head_dim", r["hidden_size"] // r["num_attention_heads"])


def windows(r: Reader, default: Sequence[bool]) -> tuple[int | None, ...]:
    """Per layer, the sliding window or None: from `layer_types` when written, else `default` (True: windowed)."""
    types = r.get("layer_types")
    if types is None:
        local = tuple(default)
    else:
        names = {"sliding_attention": True, "full_attention": False}
        if unknown := set(types) - names.keys():
            raise ValueError(
                f"{r.where}: layer_types {sorted(unknown)} are not supported; supported: {', '.join(names)}"
            )
        local = tuple(names[t] for t in types)
    if len(local) != r["num_hidden_layers"]:
        raise ValueError(f"{r.where}: {len(local)} layer_types for num_hidden_layers={r['num_hidden_layers']}")
    size = r["sliding_window"] if any(local) else r.get("sliding_window")
    return tuple(size if is_local else None for is_local in local)


def rope(r: Reader, *, theta: float = 10_000.0, dim: int | None = None, aliases: dict[str, str] | None = None) -> Rope:
    """The one RoPE of a model: `rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` (4).

    theta is the architecture's default for files that do not write it; aliases rename rope types.
    """
    scaling = scaling_part(r)
    outer = r.get("rope_theta", theta)
    return scaled_rope(r, scaling, scaling.get("rope_theta", outer), head_dim(r) if dim is None else dim, aliases or {})


def scaling_part(r: Reader) -> Reader:
    """`rope_parameters` or `rope_scaling`, whichever is there; both is an error."""
    if "rope_parameters" in r and "rope_scaling" in r:
        raise ValueError(f"{r.where} has both rope_parameters and rope_scaling; keep one")
    r.get("rope_scaling")  # null in most files of transformers 4
    return r.part("rope_scaling" if "rope_scaling" in r else "rope_parameters")


def scaled_rope(r: Reader, scaling: Reader, theta: float, dim: int, aliases: dict[str, str]) -> Rope:
    """A Rope from its object in config.json; keys that its type does not use are left unread, and so refused."""
    old = scaling.get("type", "default")
    name = scaling.get("rope_type", old)
    name = aliases.get(name, name)
    fraction = scaling.get("partial_rotary_factor", r.get("partial_rotary_factor", 1.0))
    common = {"theta": float(theta), "dim": int(dim * fraction), "scaling": name}
    if name not in _READERS:
        raise ValueError(f"{scaling.where}: rope_type {name!r} is not supported; supported: {', '.join(_READERS)}")
    return Rope(**common, **_READERS[name](r, scaling))


def _default(r: Reader, s: Reader) -> dict:
    # Written by some files beside the default type, where it says no more than max_position_embeddings.
    s.get("original_max_position_embeddings")
    return {}


def _linear(r: Reader, s: Reader) -> dict:
    return {"factor": float(s["factor"]), "original_context": r["max_position_embeddings"]}


def _dynamic(r: Reader, s: Reader) -> dict:
    return {"factor": float(s["factor"]), "original_context": r["max_position_embeddings"]}


def _llama3(r: Reader, s: Reader) -> dict:
    ramp = (float(s["low_freq_factor"]), float(s["high_freq_factor"]))
    return {"factor": float(s["factor"]), "ramp": ramp, "original_context": _original_context(r, s)}


def _yarn(r: Reader, s: Reader) -> dict:
    context = _original_context(r, s)
    factor = float(s.get("factor", r["max_position_embeddings"] / context))
    mscale, all_dim = s.get("mscale"), s.get("mscale_all_dim")
    magnify = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
    inferred = magnify(mscale) / magnify(all_dim) if mscale and all_dim else magnify(1.0)
    return {
        "factor": factor,
        "attention_factor": float(s.get("attention_factor", inferred)),
        "original_context": context,
        "ramp": (float(s.get("beta_fast", 32)), float(s.get("beta_slow", 1))),
        "truncate": s.get("truncate", True),
    }


def _longrope(r: Reader, s: Reader) -> dict:
    context = _original_context(r, s)
    factor = float(s.get("factor", r["max_position_embeddings"] / context))
    inferred = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return {
        "attention_factor": float(s.get("attention_factor", inferred)),
        "original_context": context,
        "short_factors": tuple(map(float, s["short_factor"])),
        "long_factors": tuple(map(float, s["long_factor"])),
    }


def _original_context(r: Reader, s: Reader) -> int:
    """Written beside the scaling (Phi-3, which takes precedence) or in it."""
    inner = s.get("original_max_position_embeddings", r["max_position_embeddings"])
    return r.get("original_max_position_embeddings", inner)


_READERS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
