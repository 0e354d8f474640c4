"""`jaxlm info`: what a checkpoint holds, from its config and the headers of its files; no weights are read."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from jaxlm.cli.console import IgnoreFields, Option, Source, count, facts, fetch, out, size, table

Stored = dict[str, tuple[str, tuple[int, ...], int, str]]  # tensor -> type, shape, bytes, file


def info(
    source: Source,
    /,
    *,
    params: Annotated[bool, Option(help="also list every tensor")] = False,
    ignore_fields: IgnoreFields = (),
) -> int:
    """Says what a checkpoint holds: architecture, kinds of layers, parameters, context length, tokenizer.

    Reads the config and the headers of the files, never the weights.

    Example: jaxlm info SmolLM2.gguf --params
    """
    from jaxlm.checkpoints.gguf import GgufSource
    from jaxlm.models.registry import family
    from jaxlm.opening import open_checkpoint

    source = fetch(source)
    opened = open_checkpoint(source)
    fam = family(opened.model_type)
    config = fam.config(opened.hf_config, ignore_fields)
    checkpoint = opened.source()
    try:
        if isinstance(checkpoint, GgufSource):
            stored, text = gguf_tensors(checkpoint.file), gguf_tokenizer(checkpoint.file.metadata)
        else:
            stored, text = tensors(checkpoint), tokenizer(Path(source))
    finally:
        checkpoint.close()
    rows = [
        ("architecture", f"{fam.name} - {fam.summary}"),
        *architecture(config),
        ("parameters", f"{sum(math.prod(shape) for _, shape, *_ in stored.values()):,}"),
        ("tokenizer", text),
    ]
    out.print(facts(rows), highlight=False)
    out.print()
    out.print(by_type(stored), highlight=False)
    if params:
        out.print()
        out.print(every(stored), highlight=False)
    return 0


def architecture(config: Any) -> Iterator[tuple[str, str]]:
    """What the config of a decoder says, in words."""
    a = config.attention
    yield "layers", f"{len(config.kinds)}: {kinds(config.kinds)}"
    yield "context", f"{config.max_context:,} tokens"
    yield "vocabulary", f"{config.vocab_size:,} tokens, {'tied' if config.tie_embeddings else 'untied'} head"
    yield "width", f"{config.d_model}; {a.n_heads} heads of {a.head_dim}, {a.n_kv_heads} for keys and values"
    if config.mlp is not None:
        yield "feed-forward", f"{config.mlp.d_ff}{', gated' if config.mlp.gated else ''}, {config.mlp.act}"
    if config.moe is not None:
        yield "experts", f"{config.moe.n_experts} of {config.moe.expert.d_ff}, {config.moe.top_k} for each token"


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
    """What a safetensors checkpoint stores."""
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
