"""From the "model_type" of a config.json to its family."""

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

from jaxlm.checkpoints.rules import AnyRule
from jaxlm.models import decoder, families
from jaxlm.models.reader import Reader


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family file declares, and the backbone whose pure functions run it."""

    name: str
    summary: str  # the first line of its docstring: what distinguishes it
    read: Callable[[Reader], Any]
    rules: Callable[[Any], tuple[AnyRule, ...]]
    backbone: ModuleType  # init, logical_axes, embed, trunk, head, forward, init_cache, layers
    base: str = "model."  # prefix of the trunk's tensors, missing in checkpoints saved without a head
    buffers: tuple[str, ...] = ()  # templates of stored tensors that no parameter needs; written back on export
    gguf: tuple = ()  # tables of llama.cpp's names (checkpoints.gguf.Gguf)
    spellings: tuple[Callable[[Any], tuple[AnyRule, ...]], ...] = ()  # like `rules`, for files with other names

    def config(self, hf: Mapping[str, Any], ignore_fields: tuple[str, ...] = ()) -> Any:
        """The frozen config of a config.json; a field it does not know, or lacks, is a ValueError naming it."""
        reader = Reader(hf, ignore=ignore_fields)
        config = self.read(reader)
        reader.finish()
        return config

    def table(self, config: Any, have: Collection[str] = ()) -> tuple[AnyRule, ...]:
        """Of `rules` and `spellings`, the table that knows the most of the tensors there are; `rules` without any."""
        if not self.spellings or not have:
            return self.rules(config)

        def known(rules: tuple[AnyRule, ...]) -> int:
            names = (rule.hf.format(layer=0, expert=0) for rule in rules)
            return sum(name in have or name.removeprefix(self.base) in have for name in names)

        return max((make(config) for make in (self.rules, *self.spellings)), key=known)


_ADDED: dict[str, Family] = {}


def add(family: Family) -> None:
    """Makes a family known that is not a file of this package."""
    _ADDED[family.name] = family


def names() -> tuple[str, ...]:
    """Every model_type there is."""
    return tuple(sorted([m.name for m in pkgutil.iter_modules(families.__path__)] + list(_ADDED)))


def family(model_type: str) -> Family:
    """The family of a model_type; an unknown one is a ValueError naming the nearest."""
    if model_type in _ADDED:
        return _ADDED[model_type]
    if model_type not in names():
        near = difflib.get_close_matches(model_type, names(), 1)
        raise ValueError(
            f"unknown model_type {model_type!r}{f', did you mean {near[0]!r}' if near else ''}; "
            f"there are {', '.join(names())}"
        )
    module = importlib.import_module(f"{families.__name__}.{model_type}")
    optional = ("base", "buffers", "gguf", "spellings")
    given = {name: getattr(module, name.upper()) for name in optional if hasattr(module, name.upper())}
    backbone = getattr(module, "BACKBONE", decoder)
    return Family(model_type, (module.__doc__ or "").split("\n")[0], module.config, module.rules, backbone, **given)
