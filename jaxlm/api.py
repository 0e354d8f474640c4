"""The convenience layer: a checkpoint, its config and its tokenizer as one object over the pure functions."""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoints import files
from jaxlm.checkpoints.export import staged, write_checkpoint
from jaxlm.checkpoints.load import Names, Progress, flatten, stored, unflatten
from jaxlm.checkpoints.load import load as load_arrays
from jaxlm.checkpoints.manifest import Manifest
from jaxlm.generation.config import settings
from jaxlm.generation.loop import Plan, generate
from jaxlm.generation.streaming import TextStream
from jaxlm.models.decoder import Runtime
from jaxlm.models.registry import Family, family
from jaxlm.opening import Opened, open_checkpoint

OUTPUTS = ("logits", "hidden", "all_hidden")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(eq=False, kw_only=True)
class Model:
    """A family's pure functions with one set of parameters. Fields may be replaced; nothing is cached from them."""

    family: Family
    config: Any
    params: dict[str, Any]
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    runtime: Runtime
    opened: Opened | None = None  # where it was loaded from
    manifest: Manifest | None = None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer (a transformers tokenizer), loaded at first use."""
        if self.opened is None:
            raise ValueError("this model was not loaded from a checkpoint, so it has no tokenizer")
        return self.opened.tokenizer()

    def __call__(
        self, tokens: Any, attention_mask: Any = None, *, output: str = "logits", rope_len: int | None = None
    ) -> jax.Array:
        """tokens [B, T] int -> logits [B, T, V] float32.

        attention_mask [B, T]: 0 marks padding, on either side; positions count the rest. output: "hidden" is the
        final norm's [B, T, D]; "all_hidden" the embedding and the stream after each layer, [L + 1, B, T, D]. rope_len:
        the length that `dynamic` and `longrope` frequencies are made for, default T.
        """
        if output not in OUTPUTS:
            raise ValueError(f"unknown output {output!r}; there are {', '.join(OUTPUTS)}")
        tokens = _checked_tokens(tokens, self.config)
        valid = None if attention_mask is None else _checked_mask(attention_mask, tokens.shape)
        return _forward(self.family.backbone, self.config, self.runtime, output, rope_len, self.params, tokens, valid)

    def generate(
        self,
        prompts: str | Sequence[str] | Any = None,
        *,
        chat: Sequence[Mapping[str, str]] | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos: int | Sequence[int] | None = None,
        seed: int = 0,
        stream: Callable[[str], None] | None = None,
        ignore_fields: Sequence[str] = (),
    ) -> Any:
        """What follows the prompts: a string for a string, a list for a list of strings, int32 [B, n] for token ids.

        chat, a list of {"role", "content"}, is rendered by the checkpoint's template instead of a prompt. What is not
        given comes from generation_config.json; temperature=0 is greedy. Rows that end early are filled with the pad
        id. stream gets the text of a single prompt as it appears. ignore_fields: names in generation_config.json to
        pass over.
        """
        options = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "eos_token_id": eos if eos is None or isinstance(eos, int) else list(eos),
        }
        chosen = settings(self.generation_config, options, ignore_fields)
        rows, as_text = self._rows(prompts, chat)
        longest = max(map(len, rows))
        new = chosen.new_tokens(longest)
        limit = self.config.max_context
        if longest + new > limit:
            raise ValueError(f"{longest} prompt tokens and {new} new ones do not fit the model's context of {limit}")
        plan = Plan(
            backbone=self.family.backbone,
            config=self.config,
            runtime=self.runtime,
            sampling=chosen.sampling,
            eos=chosen.eos,
            pad=chosen.pad,
            new_tokens=new,
            length=longest + new,
        )
        if stream is not None and len(rows) != 1:
            raise ValueError(f"stream needs a single prompt, got {len(rows)}")
        text = None if stream is None else TextStream(self.tokenizer, stream)
        ids = generate(plan, self.params, rows, seed, None if text is None else text.put)
        if text is not None:
            text.end()
        if not as_text:
            return ids
        texts = [self.tokenizer.decode(_until_end(row, chosen.eos), skip_special_tokens=True) for row in ids]
        return texts[0] if isinstance(prompts, str) or chat is not None else texts

    def save(
        self,
        directory: str | Path,
        dtype: str | None = None,
        *,
        overwrite: bool = False,
        max_shard_bytes: int = 5_000_000_000,
        progress: Progress | None = None,
    ) -> None:
        """Writes config.json, generation_config.json, tokenizer files and safetensors that other programs read.

        dtype None gives every tensor its dtype in the loaded checkpoint back (from a .gguf file: the parameters' own).
        The directory appears, or is replaced (overwrite=True), in one step at the end.
        """
        _check_dtype(dtype)
        arrays = flatten(self.params)
        names = _names(self.family, self.config, arrays, () if self.manifest is None else self.manifest.tensors)
        tensors, read = stored(arrays, names, self.manifest, dtype)
        with staged(directory, overwrite) as staging:
            write_checkpoint(staging, tensors, read, self.manifest, max_shard_bytes, progress)
            self._write_files(staging, dtype)

    def _write_files(self, staging: Path, dtype: str | None) -> None:
        config = self.hf_config
        if dtype is not None:
            config = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")} | {"dtype": dtype}
        source = None if self.opened is None else self.opened.directory
        for name, value in ((files.CONFIG, config), (files.GENERATION, self.generation_config)):
            # Untouched files are copied, so that they too come back bit for bit.
            if source and (source / name).exists() and files.read_json(source / name) == value:
                shutil.copyfile(source / name, staging / name)
            elif value:
                files.write_json(staging / name, value)
        if self.opened is not None:
            self.opened.write_tokenizer(staging)

    def _rows(self, prompts: Any, chat: Any) -> tuple[list[np.ndarray], bool]:
        """Token ids of each prompt, and whether text goes back."""
        if (prompts is None) == (chat is None):
            raise ValueError("generate needs either prompts or chat=[...]")
        if chat is not None:
            rendered = self.tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=True)
            rows, as_text = [rendered["input_ids"]], True
        elif as_text := isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], str)):
            rows = [self.tokenizer(p)["input_ids"] for p in ([prompts] if isinstance(prompts, str) else prompts)]
        else:
            rows = list(prompts)
        if not rows:
            raise ValueError("generate got no prompts")
        return [_checked_row(row, self.config) for row in rows], as_text


def load(
    source: str | Path,
    *,
    dtype: str | None = None,
    ignore_fields: Sequence[str] = (),
    attention: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """A model from a checkpoint directory (config.json and safetensors) or a .gguf file.

    dtype: of the parameters and the computation; default the checkpoint's on an accelerator, float32 on a CPU. A field
    of config.json or a tensor that is unknown or missing is a ValueError naming it; ignore_fields names fields to pass
    over. attention names an implementation, default the best that can. progress is told (bytes done, bytes in all).
    """
    _check_dtype(dtype)
    opened = open_checkpoint(source)
    fam = family(opened.model_type)
    config = fam.config(opened.hf_config, tuple(ignore_fields))
    shapes = parameter_shapes(fam, config)
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    tensors = opened.source()
    try:
        names = _names(fam, config, shapes, tensors.tensors)
        arrays, manifest = load_arrays(
            tensors, names, shapes, where=opened.where, buffers=fam.buffers, dtype=dtype, progress=progress
        )
    finally:
        tensors.close()
    return Model(
        family=fam,
        config=config,
        params=unflatten(arrays),
        hf_config=opened.hf_config,
        generation_config=opened.generation_config,
        runtime=Runtime(dtype=dtype, attention=attention),
        opened=opened,
        manifest=manifest,
    )


def init(
    config: str | Path | Mapping[str, Any],
    *,
    key: jax.Array | None = None,
    dtype: str = "float32",
    ignore_fields: Sequence[str] = (),
) -> Model:
    """A model from scratch: fresh parameters for a config.json (a path to it, or its contents)."""
    _check_dtype(dtype)
    hf = dict(config) if isinstance(config, Mapping) else files.read_json(_config_path(Path(config)))
    if "model_type" not in hf:
        raise ValueError("config.json has no 'model_type', which names the architecture")
    fam = family(hf["model_type"])
    made = fam.config(hf, tuple(ignore_fields))
    cast = lambda key: jax.tree.map(lambda a: a.astype(dtype), fam.backbone.init(made, key))
    params = jax.jit(cast)(jax.random.key(0) if key is None else key)
    return Model(
        family=fam, config=made, params=params, hf_config=hf, generation_config={}, runtime=Runtime(dtype=dtype)
    )


def parameter_shapes(fam: Family, config: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every parameter, without making any."""
    tree = jax.eval_shape(lambda: fam.backbone.init(config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def _names(fam: Family, config: Any, leaves: Mapping[str, Any], have) -> Names:
    shapes = {path: leaf if isinstance(leaf, tuple) else leaf.shape for path, leaf in leaves.items()}
    groups = [layer.group for layer in fam.backbone.layers(config)]
    return Names(fam.rules(config), shapes, groups, fam.base, have)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _forward(backbone, config, runtime, output: str, rope_len: int | None, params, tokens, valid):
    positions = None if valid is None else backbone.count_positions(valid)
    x = backbone.embed(config, params, tokens, positions=positions, runtime=runtime)
    hidden, _, aux = backbone.trunk(
        config,
        params,
        x,
        positions=positions,
        valid=valid,
        rope_len=rope_len,
        taps=("residual",) if output == "all_hidden" else (),
        runtime=runtime,
    )
    if output == "all_hidden":
        return jnp.concatenate([x[None], aux["residual"]])
    return hidden if output == "hidden" else backbone.head(config, params, hidden)


def _checked_tokens(tokens: Any, config: Any) -> jax.Array:
    """int32 [B, T] within the vocabulary and the context."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T] with at least one token, got {tokens.dtype} {tokens.shape}")
    if tokens.shape[1] > config.max_context:
        raise ValueError(f"{tokens.shape[1]} tokens do not fit the model's context of {config.max_context}")
    if not isinstance(tokens, jax.core.Tracer):
        _check_vocabulary(np.asarray(tokens), config)
    return tokens.astype(jnp.int32)


def _checked_row(row: Any, config: Any) -> np.ndarray:
    row = np.asarray(row)
    if row.size == 0:
        raise ValueError("a prompt is empty: it has no tokens")
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"a prompt must be text or integers [T], got {row.dtype} {row.shape}")
    _check_vocabulary(row, config)
    return row.astype(np.int32)


def _check_vocabulary(tokens: np.ndarray, config: Any) -> None:
    # An index out of range would be clamped silently by the embedding's gather.
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary 0..{config.vocab_size - 1}")


def _checked_mask(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    mask = jnp.asarray(mask)
    if mask.shape != shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, expected that of the tokens, {shape}")
    return mask != 0


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")


def _config_path(path: Path) -> Path:
    path = path / files.CONFIG if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config.json")
    return path


def _until_end(row: np.ndarray, eos: tuple[int, ...]) -> list[int]:
    """The ids of a row up to its first EOS."""
    ends = np.flatnonzero(np.isin(row, eos))
    return row[: ends[0]].tolist() if len(ends) else row.tolist()
