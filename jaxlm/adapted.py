"""A model with adapters: read from a peft directory, run beside the weights or merged into them, written again."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.checkpoints import peft
from jaxlm.checkpoints.adapter_config import AdapterConfig, Prompt
from jaxlm.checkpoints.peft import Adapters
from jaxlm.models import adapters as adapting
from jaxlm.models.view import Weights
from jaxlm.train.adapters import merge, modules_of

if TYPE_CHECKING:
    from jaxlm.model import Model


def attach(
    model: "Model", source: str | Path | Adapters | dict[str, Any], config: AdapterConfig | None, ignore: Sequence[str]
) -> Adapters:
    """The adapters of a directory, or a tree, checked against the model; ValueError where they do not belong."""
    if model.adapters is not None:
        raise ValueError("this model has adapters already: merge_adapters() first, or with_adapters(None)")
    if "adapters" not in inspect.signature(model.family.backbone.trunk).parameters:
        raise ValueError(f"{model.family.name} takes no adapters")
    if isinstance(source, str | Path):
        if config is not None:
            raise ValueError("config= goes with a tree; a directory has its own")
        table = modules_of(model.family, model.config)
        adapters = peft.read(source, table, prefix=model.family.base, ignore_fields=ignore)
    else:
        adapters = source if isinstance(source, Adapters) else Adapters(config, source, base=_where(model))
    if adapters.heads:
        raise ValueError(f"the adapters come with a task's head ({', '.join(adapters.heads)}), which this model lacks")
    if isinstance(adapters.config, Prompt) and model.hf_config.get("embedding_multiplier", 1) != 1:
        # transformers multiplies the prompt too (Granite); where it scales inside the table (Gemma), it does not.
        raise ValueError("prompt tuning of a model with an embedding_multiplier is not supported")
    check(model, adapters.tree)
    return adapters


def check(model: "Model", tree: dict[str, Any]) -> None:
    params = model.params
    if unknown := sorted(set(tree) - {"layers", "prompt"}):
        raise ValueError(f"an adapters tree has layers and prompt, and this one {unknown[0]!r}")
    grouped = adapting.grouped
    adapting.beside(grouped(params["layers"]), grouped(tree.get("layers", {})))
    adapting.virtual(tree)


def merged(model: "Model") -> Weights:
    """The weights with the adapters' pairs in them; the rest is shared with the model's own."""
    assert model.adapters is not None
    return Weights(model.config, merge(model.params, {"layers": model.adapters.tree.get("layers", {})}))


def has_pairs(tree: dict[str, Any]) -> bool:
    return any(True for _ in adapting.pairs(tree.get("layers", {})))


def save(model: "Model", directory: str | Path, overwrite: bool) -> None:
    if model.adapters is None:
        raise ValueError("this model has no adapters: with_adapters() first")
    peft.write(directory, model.adapters, modules_of(model.family, model.config), overwrite=overwrite)


def _where(model: "Model") -> str | None:
    return None if model.opened is None else model.opened.where
