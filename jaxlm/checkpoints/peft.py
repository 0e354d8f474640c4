"""Directories of the peft package, adapter_config.json and adapter_model.safetensors, both ways; strict both ways."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoints import files
from jaxlm.checkpoints.adapter_config import HEADS, AdapterConfig, Lora, Prefix, from_peft, to_peft
from jaxlm.checkpoints.adapter_modules import LEAVES, Module, Modules
from jaxlm.checkpoints.export import staged
from jaxlm.checkpoints.load import FLOATS, flatten, unflatten
from jaxlm.checkpoints.safetensors import SafetensorsSource, write_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."  # peft's name for the wrapped model
VIRTUAL = "prompt_embeddings"
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
    """An adapter, the tree that `trunk` takes, and where it came from."""

    config: AdapterConfig | None  # None: unknown, so that it cannot be written
    tree: Tree
    base: str | None = None  # the model it was trained on, as peft records it
    task_type: str | None = "CAUSAL_LM"
    heads: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # "score.weight": trained with it


def read(
    directory: str | Path, modules: Modules, *, prefix: str = "model.", ignore_fields: Sequence[str] = ()
) -> Adapters:
    """The adapter in a directory, for a model with these modules, in the stored dtype.

    prefix: of the trunk's names, which adapters of headless models lack. ValueError for a config that we do not
    compute, and one for all tensors that are missing, unexpected or mis-shaped.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            found = sorted(p.name for p in directory.iterdir())[:8] if directory.is_dir() else []
            raise FileNotFoundError(f"{directory} has no {name}; it holds {', '.join(found) or 'nothing'}")
    stored = files.read_json(directory / CONFIG)
    config = from_peft(stored, str(directory / CONFIG), ignore_fields)
    with SafetensorsSource(directory / WEIGHTS) as source:
        tensors = {name: source.read(name) for name in source.tensors}
    saved = tuple(f"{ROOT}{name}." for name in HEADS if name in (stored.get("modules_to_save") or ()))
    heads = {name.removeprefix(ROOT): tensors.pop(name) for name in list(tensors) if saved and name.startswith(saved)}
    headless = tensors and not any(name.startswith(ROOT + prefix) for name in tensors)
    named = lambda name: ROOT + (name.removeprefix(prefix) if headless else name)
    if isinstance(config, Lora):
        chosen = modules.select(config)
        _check(tensors, {named(n): shape for n, shape in _lora_tensors(config, chosen).items()}, directory)
        tree = _lora_tree(config, chosen, {n: tensors[named(n)] for n in _lora_tensors(config, chosen)})
    else:
        _check(tensors, {VIRTUAL: virtual_shape(config, modules)}, directory)
        tree = _virtual_tree(config, modules, tensors[VIRTUAL])
    return Adapters(config, tree, stored.get("base_model_name_or_path"), stored.get("task_type"), heads)


def write(directory: str | Path, adapters: Adapters, modules: Modules, *, overwrite: bool = False) -> None:
    """Writes the directory in one step; `peft` loads it onto the same base model."""
    if adapters.config is None:
        raise ValueError("adapters without a config cannot be written: adapter_config.json needs it")
    config, heads = adapters.config, {ROOT + name: value for name, value in adapters.heads.items()}
    flat = {path: np.asarray(jax.device_get(leaf)) for path, leaf in flatten(adapters.tree).items()}
    more: dict[str, Any] = {"modules_to_save": sorted({name.split(".")[0] for name in adapters.heads}) or None}
    if isinstance(config, Lora):
        chosen = modules.select(config)
        if config.is_all_linear:  # peft would resolve it against the class it loads, and pass over `layers`
            names = tuple(module.name for module in chosen)
            config = dataclasses.replace(config, targets=names, exclude=(), layers=())
        more["fan_in_fan_out"] = all(module.input_major for module in chosen)
        tensors = {ROOT + name: value for name, value in _lora_stored(config, chosen, flat).items()}
    else:
        tensors = {VIRTUAL: _virtual_stored(config, modules, flat)}
        heads_here = modules.shapes[_attention(modules, 0, "k" if isinstance(config, Prefix) else "q")]
        more |= {"num_layers": len(modules.layers), "num_attention_heads": heads_here[-2]}
        more["token_dim"] = heads_here[-2] * heads_here[-1] if isinstance(config, Prefix) else tensors[VIRTUAL].shape[1]
        more |= {"prefix_projection": False} if isinstance(config, Prefix) else {"prompt_tuning_init": "RANDOM"}
    tensors |= heads
    with staged(directory, overwrite) as staging:
        files.write_json(staging / CONFIG, to_peft(config, base=adapters.base, task_type=adapters.task_type, more=more))
        header = [(name, value.dtype, value.shape) for name, value in sorted(tensors.items())]
        write_file(staging / WEIGHTS, header, {"format": "pt"}, tensors.__getitem__)


def _leaves(config: Lora) -> tuple[str, ...]:
    return ("a", "b", "m") if config.dora else ("a", "b")


def _lora_tensors(config: Lora, chosen: Sequence[Module]) -> dict[str, tuple[int, ...]]:
    """The stored tensors of the modules, without peft's root."""
    return {
        module.name + LEAVES[leaf]: module.rules[leaf].stored_shape(module.shapes(leaf, config.rank_of(module.name)))
        for module in chosen
        for leaf in _leaves(config)
    }


def _lora_tree(config: Lora, chosen: Sequence[Module], tensors: Mapping[str, np.ndarray]) -> Tree:
    flat: dict[str, np.ndarray] = {}
    widest = {m.node: max(config.rank_of(o.name) for o in chosen if o.node == m.node) for m in chosen}
    dtypes: dict[tuple[str, str], set[np.dtype]] = {}
    for module in chosen:
        for leaf in _leaves(config):
            dtypes.setdefault((module.node, leaf), set()).add(tensors[module.name + LEAVES[leaf]].dtype)
    for module in chosen:
        for leaf in _leaves(config):
            rule, found = module.rules[leaf], dtypes[module.node, leaf]
            dtype = next(iter(found)) if len(found) == 1 else np.dtype(np.float32)
            own = module.shapes(leaf, config.rank_of(module.name))
            whole = module.shapes(leaf, widest[module.node])
            pieces = rule.split(tensors[module.name + LEAVES[leaf]], own)
            for path, piece, shape in zip(rule.paths, pieces, whole, strict=True):
                stack = flat.setdefault(path, np.zeros((module.depth, *shape), dtype))
                stack[(module.index, *map(slice, piece.shape))] = piece  # of lower ranks, the rest stays zero
        settings(config, module, flat)
    return jax.tree.map(jnp.asarray, unflatten(flat))


def settings(config: Lora, module: Module, flat: dict[str, np.ndarray]) -> None:
    """Puts the leaves that do not learn, for one module, into a flat tree."""
    zeros = lambda: np.zeros(module.depth, np.float32)
    flat.setdefault(f"{module.node}/scale", zeros())[module.index] = config.scale_of(module.name)
    if config.dropout:
        flat.setdefault(f"{module.node}/dropout", zeros())[module.index] = config.dropout


def _lora_stored(config: Lora, chosen: Sequence[Module], flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for module in chosen:
        for leaf in _leaves(config):
            rule, shapes = module.rules[leaf], module.shapes(leaf, config.rank_of(module.name))
            pieces = []
            for path, shape in zip(rule.paths, shapes, strict=True):
                if path not in flat or flat[path].ndim != len(shape) + 1:
                    raise ValueError(f"the adapters have no {path} of layers x {list(shape)}, which {config} needs")
                pieces.append(flat[path][(module.index, *map(slice, shape))])
            out[module.name + LEAVES[leaf]] = np.ascontiguousarray(rule.join(pieces))
    return out


def _attention(modules: Modules, layer: int, name: str) -> str:
    """The path of an attention weight of a layer."""
    group = modules.layers[layer]
    path = f"layers/{group}/attn/{name}/w" if group else f"layers/attn/{name}/w"
    if path not in modules.shapes:
        raise ValueError(f"layer {layer} has no {path}: prefix and prompt tuning need attention in every layer")
    return path


def virtual_shape(config: AdapterConfig, modules: Modules) -> tuple[int, int]:
    assert not isinstance(config, Lora)
    if isinstance(config, Prefix):
        layers = range(len(modules.layers))
        return config.tokens, sum(2 * math.prod(modules.shapes[_attention(modules, i, "k")][-2:]) for i in layers)
    return config.tokens, modules.shapes["embed/w"][1]


def _virtual_tree(config: AdapterConfig, modules: Modules, stored: np.ndarray) -> Tree:
    if not isinstance(config, Prefix):
        return {"prompt": {"w": jnp.asarray(stored)}}
    heads, dim = modules.shapes[_attention(modules, 0, "k")][-2:]
    each = stored.reshape(len(stored), len(modules.layers), 2, heads, dim)  # [P, L, k and v, K, H]
    flat = {}
    for group in dict.fromkeys(modules.layers):
        own = [i for i, name in enumerate(modules.layers) if name == group]
        for j, name in enumerate("kv"):
            path = f"layers/{group}/attn/prefix/{name}" if group else f"layers/attn/prefix/{name}"
            flat[path] = jnp.asarray(each[:, own, j].swapaxes(0, 1))
    return unflatten(flat)


def _virtual_stored(config: AdapterConfig, modules: Modules, flat: Mapping[str, np.ndarray]) -> np.ndarray:
    if not isinstance(config, Prefix):
        return np.ascontiguousarray(flat["prompt/w"])
    seen, rows = dict.fromkeys(modules.layers, 0), []
    for group in modules.layers:
        at = f"layers/{group}/attn/prefix/" if group else "layers/attn/prefix/"
        rows += [flat[at + name][seen[group]] for name in "kv"]
        seen[group] += 1
    return np.ascontiguousarray(np.stack(rows, 1).reshape(config.tokens, -1))


def _check(tensors: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], directory: Path) -> None:
    problems = [f"  missing {name}, expected {list(shape)}" for name, shape in wanted.items() if name not in tensors]
    problems += [f"  unexpected {name} {list(t.shape)}" for name, t in tensors.items() if name not in wanted]
    for name, shape in wanted.items():
        if name in tensors and tensors[name].shape != tuple(shape):
            problems.append(f"  {name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
        elif name in tensors and tensors[name].dtype.name not in FLOATS:
            problems.append(f"  {name} is {tensors[name].dtype.name}, expected one of {', '.join(FLOATS)}")
    if problems:
        shown = [*problems[:20], *([f"  ... and {len(problems) - 20} more"] if len(problems) > 20 else [])]
        raise ValueError(
            "\n".join([f"{directory} does not fit this model; {len(problems)} tensors are wrong:", *shown])
        )
