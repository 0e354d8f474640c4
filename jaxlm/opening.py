"""What a source is: a checkpoint directory, a .gguf or .pth file, a hub repository or a training run, opened without
reading weights."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.checkpoints import files, hub
from jaxlm.checkpoints.source import Source

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint's config and the ways to its tensors and tokenizer."""

    where: str
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    source: Callable[[], Source]
    tokenizer: Callable[[], Any]
    directory: Path | None  # with the tokenizer's files; None where there are none, as beside a .gguf or .pth

    @property
    def model_type(self) -> str:
        if not isinstance(self.hf_config.get("model_type"), str):
            raise ValueError(f"{self.where}: config.json has no 'model_type', which names the architecture")
        return self.hf_config["model_type"]

    def with_tokenizer(self, source: str | Path | None) -> "Opened":
        """The same with the tokenizer of another source, or of a file (`jaxlm.data.prepare.load_tokenizer`)."""
        if source is None:
            return self
        from jaxlm.data.prepare import load_tokenizer

        made = load_tokenizer(str(source))
        return dataclasses.replace(self, tokenizer=lambda: made, directory=None)

    def write_tokenizer(self, directory: Path) -> None:
        """Copies the tokenizer's files, or writes those that a .gguf or .pth file's tokenizer has as a directory."""
        if self.directory is None:
            try:
                made = self.tokenizer()
            except FileNotFoundError as absent:  # a .pth file holds none
                log.warning("no tokenizer is written: %s", absent)
            else:
                made.save_pretrained(directory)
            return
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory} is gone; its tokenizer files cannot be copied")
        for name in files.TOKENIZER:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, directory / name)


def write_files(
    directory: Path, config: dict[str, Any], generation: dict[str, Any], opened: Opened | None, dtype: str | None
) -> None:
    """A checkpoint's files beside its weights; `dtype` is that of the weights, None where they have kept theirs."""
    if dtype is not None:
        config = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")} | {"dtype": dtype}
    source = None if opened is None else opened.directory
    for name, value in ((files.CONFIG, config), (files.GENERATION, generation)):
        # Untouched files are copied, so that they too come back bit for bit.
        if source and (source / name).exists() and files.read_json(source / name) == value:
            shutil.copyfile(source / name, directory / name)
        elif value:
            files.write_json(directory / name, value)
    if opened is not None:
        opened.write_tokenizer(directory)


def on_hub(source: str | Path) -> bool:
    """Whether a source is a repository on the hub: text of the form "org/name" that is no path here."""
    return isinstance(source, str) and hub.is_repo(source) and not Path(source).exists()


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Opened:
    """A directory with config.json, a file, "org/name" on the hub, to which alone the options belong, or a run.

    A file is a .gguf, or RWKV's .pth, which may also be the only one of a directory. A run is the directory of
    `jaxlm train` (its last checkpoint), or one of the checkpoints in it.

    Anything else is an error that says what was found.
    """
    if on_hub(source):
        directory = hub.snapshot(
            str(source), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        return _open_directory(directory, str(source))
    path = Path(source).expanduser()
    options = {"revision": revision, "token": token, "cache_dir": cache_dir}
    given = [f"{name}=" for name, value in options.items() if value is not None]
    given += ["local_files_only="] * local_files_only
    if given and path.exists():
        raise ValueError(f"{source} is a path here, and {', '.join(given)} only for a repository on the hub")
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if path.suffix == ".pth":
        return _open_pth(path)
    if path.is_dir():
        return _open_run(path) or _open_directory(path, str(path))
    if path.exists():
        raise ValueError(f"{path} is neither a checkpoint directory nor a .gguf or .pth file")
    raise FileNotFoundError(
        f"{source}: no such directory, .gguf or .pth file (a repository on the hub is named org/name)"
    )


def _open_directory(path: Path, where: str) -> Opened:
    from jaxlm.checkpoints import rwkv_pth, rwkv_tokenizer
    from jaxlm.checkpoints.pth import PthSource
    from jaxlm.checkpoints.safetensors import SafetensorsSource

    if not (path / files.CONFIG).is_file():
        if pth := rwkv_pth.beside(path, config=False):
            return _open_pth(pth)
        found = sorted(p.name for p in path.iterdir())[:8]
        raise FileNotFoundError(f"{path} has no config.json; it holds {', '.join(found) or 'nothing'}")
    generation, config = path / files.GENERATION, files.read_json(path / files.CONFIG)
    rwkv = config.get("model_type") in rwkv_pth.MODEL_TYPES

    def source() -> Source:
        pth = rwkv_pth.beside(path, config=True) if rwkv else None
        return SafetensorsSource(path) if pth is None else PthSource(pth)

    def tokenizer():
        if rwkv:
            return rwkv_tokenizer.load(rwkv_tokenizer.locate(path, config["vocab_size"]), config["vocab_size"])
        from transformers import AutoTokenizer

        if not any((path / name).is_file() for name in files.TOKENIZER):
            raise FileNotFoundError(f"{path} has no tokenizer files")
        return AutoTokenizer.from_pretrained(path, local_files_only=True)

    return Opened(
        where=where,
        hf_config=config,
        generation_config=files.read_json(generation) if generation.is_file() else {},
        source=source,
        tokenizer=tokenizer,
        directory=path,
    )


def _open_run(path: Path) -> Opened | None:
    """A training run at its last checkpoint, or one of its checkpoints; None for another kind of directory."""
    from jaxlm.checkpoints import run as runs

    step = path if path.parent.name == runs.CHECKPOINTS and path.name.isdigit() else None
    run = path if step is None else path.parent.parent
    if not (run / runs.SETTINGS).is_file() or (path / "model.safetensors").exists():
        return None
    steps = runs.steps(run)
    if step is None and not steps:
        raise FileNotFoundError(f"{run} is a training run without a complete checkpoint")
    state = (step or run / runs.CHECKPOINTS / str(steps[-1])) / runs.STATE
    settings = runs.settings(run)
    opened = _open_directory(run, f"{run} at step {state.parent.name}")
    # What trains is float32, whatever the model was before; a config that said otherwise would narrow it when read.
    hf = {k: v for k, v in opened.hf_config.items() if k not in ("dtype", "torch_dtype")} | {"dtype": "float32"}

    def source() -> Source:
        from jaxlm.api import parameter_shapes
        from jaxlm.model import tensor_names
        from jaxlm.models.registry import family

        fam = family(opened.model_type)
        config = fam.config(hf, tuple(settings["ignore_fields"]))
        frozen = open_checkpoint(settings["model"]).source() if settings["trainable"] != ["*"] else None
        names = tensor_names(fam, config, parameter_shapes(fam, config), frozen.tensors if frozen else ())
        return runs.RunSource(state, names, frozen)

    return dataclasses.replace(opened, hf_config=hf, source=source)


def _open_gguf(path: Path) -> Opened:
    from jaxlm.checkpoints import gguf, gguf_config
    from jaxlm.models import registry

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    tables = [table for name in registry.names() for table in registry.family(name).gguf]
    file = gguf.GgufFile(path)
    table = gguf.select(file, tables)

    def tokenizer():
        from jaxlm.checkpoints.gguf_tokenizer import tokenizer

        return tokenizer(file.metadata, where=str(path))

    return Opened(
        where=str(path),
        hf_config=table.config(file),
        generation_config=gguf_config.generation(file),
        source=lambda: gguf.GgufSource(gguf.GgufFile(path), table),
        tokenizer=tokenizer,
        directory=None,
    )


def _open_pth(path: Path) -> Opened:
    from jaxlm.checkpoints import rwkv_pth, rwkv_tokenizer
    from jaxlm.checkpoints.pth import PthSource

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    config = rwkv_pth.read_config(path)
    size = config["vocab_size"]
    return Opened(
        where=str(path),
        hf_config=config,
        generation_config={},
        source=lambda: PthSource(path),
        tokenizer=lambda: rwkv_tokenizer.load(rwkv_tokenizer.locate(path.parent, size), size),
        directory=None,
    )
