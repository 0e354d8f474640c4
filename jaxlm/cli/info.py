"""`jaxlm info`: what a checkpoint holds, from its config and the headers of its files; no weights are read."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from jaxlm.cli.console import Dtype, IgnoreFields, Option, Source, count, facts, fetch, out, size, table

Stored = dict[str, tuple[str, tuple[int, ...], int, str]]  # tensor -> type, shape, bytes, file
_STORED = ("type", "shape", "bytes", "file")


def info(
    source: Source,
    /,
    *,
    params: Annotated[bool, Option(help="also list every tensor")] = False,
    mesh: Annotated[
        str | None, Option(metavar="PRESET", help="also say where parameters go, as fsdp=4,tensor=2; needs no device")
    ] = None,
    dtype: Annotated[
        Dtype, Option(metavar="DTYPE", help="of the parameters on the mesh, as in bfloat16; default the checkpoint's")
    ] = None,
    json_: Annotated[bool, Option(name="json", help="print JSON instead of tables")] = False,
    ignore_fields: IgnoreFields = (),
) -> int:
    """Says what a checkpoint holds: architecture, kinds of layers, parameters, context length, tokenizer.

    With --mesh also every parameter's cuts and its bytes on each device. Reads the config and the headers of the files,
    never the weights.

    Example: jaxlm info SmolLM2.gguf --params --mesh fsdp=4,tensor=2
    """
    from jaxlm.checkpoints.gguf import GgufSource
    from jaxlm.models.registry import family
    from jaxlm.opening import open_checkpoint

    if dtype is not None and mesh is None:
        raise ValueError(f"--dtype {dtype} is that of the parameters on a mesh, and needs --mesh")
    source = fetch(source)
    opened = open_checkpoint(source)
    fam = family(opened.model_type)
    config = fam.config(opened.hf_config, ignore_fields)
    checkpoint = opened.source()
    try:
        if isinstance(checkpoint, GgufSource):
            stored, text = gguf_tensors(checkpoint.file), gguf_tokenizer(checkpoint.file.metadata)
        elif opened.directory is None:
            stored, text = tensors(checkpoint), pth_tokenizer(Path(opened.where), opened.hf_config["vocab_size"])
        else:
            stored, text = tensors(checkpoint), tokenizer(Path(source))
        placed = None if mesh is None else place(fam, config, checkpoint, mesh, dtype)
    finally:
        checkpoint.close()
    rows = [
        ("architecture", f"{fam.name} - {fam.summary}"),
        *architecture(config),
        ("parameters", f"{sum(math.prod(shape) for _, shape, *_ in stored.values()):,}"),
        ("tokenizer", text),
    ]
    if json_:
        found: dict[str, Any] = dict(rows)
        if params:
            found["tensors"] = {name: dict(zip(_STORED, value, strict=True)) for name, value in stored.items()}
        if placed is not None:
            found["mesh"] = placed.plain()
        out.file.write(json.dumps(found, indent=2) + "\n")
        return 0
    made = [facts(rows), by_type(stored), *[every(stored)] * params, *(placed.tables() if placed else ())]
    for i, one in enumerate(made):
        out.print(*[""] * (i > 0), one, sep="\n", highlight=False)
    return 0


def architecture(config: Any) -> Iterator[tuple[str, str]]:
    """What the config of a decoder says, in words."""
    from jaxlm.models.config import UNLIMITED

    unlimited = f"any length; trained on {config.context:,} tokens at a time"
    yield "layers", f"{len(config.kinds)}: {kinds(config.kinds)}"
    yield "context", f"{config.max_context:,} tokens" if config.max_context < UNLIMITED else unlimited
    yield "vocabulary", f"{config.vocab_size:,} tokens, {'tied' if config.tie_embeddings else 'untied'} head"
    yield from config.facts()


def kinds(layers: tuple[Any, ...]) -> str:
    """'15 x attention, window 512, rope theta 10,000; 3 x attention, rope theta 1,000,000'."""
    counts = {kind: layers.count(kind) for kind in dict.fromkeys(layers)}
    return "; ".join(f"{n} x {describe(kind)}" for kind, n in counts.items())


def describe(kind: Any) -> str:
    words = [kind.mixer]
    if kind.mlp != "dense":
        words.append("experts" if kind.mlp == "moe" else kind.mlp)
    if kind.window is not None:
        words.append(f"window {kind.window}")
    if kind.rope is not None:
        scaling = "" if kind.rope.scaling == "default" else f" ({kind.rope.scaling})"
        words.append(f"rope theta {kind.rope.theta:,.10g}{scaling}")
    return ", ".join(words)


def tensors(source) -> Stored:
    """What a safetensors or .pth checkpoint stores."""
    return {
        name: (t.dtype.name, tuple(t.shape), t.dtype.itemsize * math.prod(t.shape), t.file)
        for name, t in source.tensors.items()
    }


def gguf_tensors(file) -> Stored:
    """What a GGUF file stores, in its own names and quantized types."""
    return {name: (t.type.name, t.shape, t.lines * t.line_bytes, file.path.name) for name, t in file.tensors.items()}


def tokenizer(directory: Path) -> str:
    """What the tokenizer files of a directory say."""
    from jaxlm.checkpoints import files

    found = [name for name in files.TOKENIZER if (directory / name).is_file()]
    if not found:
        return "none"
    settings = files.read_json(directory / "tokenizer_config.json") if "tokenizer_config.json" in found else {}
    words = [settings.get("tokenizer_class", found[0])]
    if "tokenizer.json" in found:
        fast = files.read_json(directory / "tokenizer.json")
        model = fast.get("model", {})
        n_tokens = len({*map(_text, model.get("vocab", ())), *(t["content"] for t in fast.get("added_tokens", ()))})
        words += [str(model.get("type", "")), f"{n_tokens:,} tokens"]
    if settings.get("chat_template") or any(name.startswith("chat_template") for name in found):
        words.append("chat template")
    return ", ".join(word for word in words if word)


def _text(entry: Any) -> str:
    return entry if isinstance(entry, str) else entry[0]  # a Unigram vocabulary has [token, score]


def gguf_tokenizer(metadata: Mapping[str, Any]) -> str:
    """What a GGUF file's metadata says of its tokenizer."""
    if "tokenizer.ggml.tokens" not in metadata:
        return "none"
    model = metadata.get("tokenizer.ggml.model")
    words = [
        {"gpt2": "BPE", "llama": "SentencePiece"}.get(str(model), str(model)),
        f"{len(metadata['tokenizer.ggml.tokens']):,} tokens",
    ]
    return ", ".join(words + ["chat template"] * ("tokenizer.chat_template" in metadata))


def pth_tokenizer(path: Path, vocab_size: int) -> str:
    """Where the tokenizer of a .pth file would come from."""
    from jaxlm.checkpoints.rwkv_tokenizer import locate

    try:
        return str(locate(path.parent, vocab_size))
    except FileNotFoundError:
        return "none"


def by_type(stored: Stored) -> Table:
    """Tensors, parameters and bytes for each type of storage."""
    made = table("stored as", ">tensors", ">parameters", ">bytes")
    types = list(dict.fromkeys(kind for kind, *_ in stored.values()))
    for label, chosen in [(kind, {kind}) for kind in types] + [("all", set(types))] * (len(types) > 1):
        mine = [(math.prod(shape), n_bytes) for kind, shape, n_bytes, _ in stored.values() if kind in chosen]
        made.add_row(label, str(len(mine)), count(sum(n for n, _ in mine)), size(sum(n for _, n in mine)))
    return made


def every(stored: Stored) -> Table:
    """One line for each tensor; the file too, where there are several."""
    several = len({file for *_, file in stored.values()}) > 1
    made = table("tensor", "type", "shape", ">bytes", *["file"] * several)
    for name, (kind, shape, n_bytes, file) in stored.items():
        made.add_row(name, kind, " x ".join(map(str, shape)), size(n_bytes), *[file] * several)
    return made


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter on a mesh: the mesh axes of each dimension, and its bytes in all and on a device."""

    dtype: str
    shape: tuple[int, ...]
    spec: tuple[tuple[str, ...], ...]
    bytes: int
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class Placed:
    """A model's parameters on a mesh. whole: the dimensions that do not divide, as words."""

    mesh: str
    devices: int
    parameters: Mapping[str, Parameter]
    whole: Sequence[str]

    def total(self, name: str) -> int:
        return sum(getattr(parameter, name) for parameter in self.parameters.values())

    def plain(self) -> dict[str, Any]:
        names = ("bytes", "bytes_per_device")
        return dataclasses.asdict(self) | {name: self.total(name) for name in names}

    def tables(self) -> Iterator[Table]:
        made = table("parameter", "dtype", "shape", "cut by", ">bytes", ">a device")
        for path, p in self.parameters.items():
            shape = " x ".join(map(str, p.shape))
            made.add_row(path, p.dtype, shape, cuts(p.spec), size(p.bytes), size(p.bytes_per_device))
        all_, each = self.total("bytes"), self.total("bytes_per_device")
        made.add_row("all parameters", "", "", "", size(all_), size(each))
        yield made
        share = f"{size(each)}, {each * self.devices / all_:.2f} copies over all of them"
        rows = [("mesh", self.mesh), ("devices", str(self.devices)), ("on each", share)]
        yield facts(rows + [("does not divide", words) for words in self.whole])


def cuts(spec: Sequence[Sequence[str]]) -> str:
    """'-, fsdp, tensor': the mesh axes of each dimension; 'whole' where there are none."""
    return ", ".join("+".join(axes) or "-" for axes in spec) if any(spec) else "whole"


def place(fam: Any, config: Any, checkpoint: Any, mesh: str, dtype: str | None) -> Placed:
    """Where `load` would put the parameters: from their shapes and logical axes, on a mesh without devices."""
    import jax
    import jax.numpy as jnp

    from jaxlm.checkpoints.load import flatten
    from jaxlm.model import tensor_names
    from jaxlm.parallel.mesh import abstract_mesh
    from jaxlm.parallel.sharding import shardings

    on = abstract_mesh(mesh)
    shapes = jax.eval_shape(lambda: fam.backbone.init(config, jax.random.key(0)))
    made, whole = shardings(fam.backbone.logical_axes(config), shapes, on)
    leaves = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    kinds: dict[str, set[str]] = {path: {dtype} if dtype else set() for path in leaves}
    for name, binding in tensor_names(fam, config, leaves, checkpoint.tensors).bindings.items():
        for path in binding.paths if name in checkpoint.tensors and not dtype else ():
            kinds[path].add(checkpoint.tensors[name].dtype.name)

    def one(path: str, sharding: jax.sharding.NamedSharding) -> Parameter:
        kind = next(iter(kinds[path])) if len(kinds[path]) == 1 else "float32"  # as `load` widens what differs
        axes = tuple(
            () if part is None else (part,) if isinstance(part, str) else tuple(part) for part in sharding.spec
        )
        here = math.prod(sharding.shard_shape(leaves[path]))
        each = jnp.dtype(kind).itemsize
        return Parameter(kind, leaves[path], axes, each * math.prod(leaves[path]), each * here)

    parameters = {path: one(path, sharding) for path, sharding in flatten(made).items()}
    return Placed(mesh, on.size, parameters, [f"{r.path}: {r.axis}={r.size} over {r.over}" for r in whole])
