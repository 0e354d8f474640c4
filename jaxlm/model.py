"""A checkpoint's config, parameters and tokenizer as one object over the pure functions."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm import adapted, inputs, scoring
from jaxlm.checkpoints.export import staged, write_checkpoint
from jaxlm.checkpoints.load import Names, Progress, flatten, stored
from jaxlm.checkpoints.manifest import Manifest
from jaxlm.checkpoints.peft import Adapters
from jaxlm.generation.config import GenerationSettings, settings
from jaxlm.generation.generate import generate
from jaxlm.generation.loop import Plan, bucket
from jaxlm.generation.session import Session
from jaxlm.models.adapters import virtual
from jaxlm.models.decoder import Runtime
from jaxlm.models.registry import Family
from jaxlm.models.view import Weights
from jaxlm.opening import Opened, write_files
from jaxlm.parallel import hosts
from jaxlm.parallel.mesh import within
from jaxlm.parallel.sharding import everywhere
from jaxlm.resize import resize_embeddings

OUTPUTS = ("logits", "hidden", "all_hidden", "embeddings")
POOLINGS = ("mean", "last", "first")
LAYERS = ("auto", "stacked", "unrolled")


@dataclasses.dataclass(eq=False, kw_only=True)
class Model:
    """A family's pure functions with one set of parameters."""

    family: Family
    config: Any
    weights: Weights
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    runtime: Runtime
    layers: str = "auto"  # how layers run: stacked in scans, unrolled, or auto: unrolled on a single CPU device
    mesh: Mesh | None = None  # over which the parameters are laid out
    opened: Opened | None = None  # where it was loaded from
    manifest: Manifest | None = None
    adapters: Adapters | None = None
    _merged: Weights | None = dataclasses.field(default=None, init=False, repr=False)  # what generates with adapters

    @property
    def params(self) -> dict[str, Any]:
        """The parameters: a nested dict of arrays, layers stacked on axis 0."""
        return self.weights.stacked

    @params.setter
    def params(self, params: dict[str, Any]) -> None:
        self.weights, self._merged = Weights(self.config, params), None

    def with_params(self, params: dict[str, Any]) -> "Model":
        """The same model with other parameters, of the same shapes."""
        return dataclasses.replace(self, weights=Weights(self.config, params))

    def with_adapters(
        self,
        source: str | Path | Adapters | dict[str, Any] | None,
        config: Any = None,
        *,
        ignore_fields: Sequence[str] = (),
    ) -> "Model":
        """The same parameters with adapters: a directory of peft's, or a tree (and its config, to save it), or None.

        Calls and logprobs compute with the low-rank pairs beside the weights. Generation merges them first, into copies
        of the weights that they target, which are kept. Virtual tokens stand before every sequence, in no result.
        ValueError for what we do not compute; ignore_fields: keys of adapter_config.json to pass over.
        """
        attached = None if source is None else adapted.attach(self, source, config, ignore_fields)
        return dataclasses.replace(self, adapters=attached)

    def merge_adapters(self) -> "Model":
        """A model without adapters whose weights have them in, added in float32; `save` writes those."""
        if self.adapters is None:
            raise ValueError("this model has no adapters: with_adapters() first")
        if self.virtual:
            raise ValueError("a prefix or prompt is no part of the weights: only low-rank pairs can be merged")
        return dataclasses.replace(self, weights=adapted.merged(self), adapters=None)

    def save_adapters(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Writes the adapters alone, as a directory that peft loads."""
        adapted.save(self, directory, overwrite)

    @property
    def virtual(self) -> int:
        """How many virtual tokens the adapters put before the first."""
        return virtual(None if self.adapters is None else self.adapters.tree)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer (a transformers tokenizer), loaded at first use."""
        if self.opened is None:
            raise ValueError("this model was not loaded from a checkpoint, so it has no tokenizer")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would print that PyTorch was not found
        return self.opened.tokenizer()

    def __call__(
        self,
        tokens: Any,
        attention_mask: Any = None,
        *,
        output: str = "logits",
        pooling: str = "mean",
        rope_len: int | None = None,
    ) -> jax.Array:
        """tokens [B, T] int -> logits [B, T, V] float32.

        attention_mask [B, T]: 0 marks padding, on either side; positions count the rest. output: "hidden" is the
        final norm's [B, T, D]; "all_hidden" the embedding and the stream after each layer, [L + 1, B, T, D];
        "embeddings" one vector a row, [B, D] float32: the mean, last or first of its hidden states (pooling). rope_len:
        the length that `dynamic` and `longrope` frequencies are made for, default T.
        """
        inputs.choice("output", output, OUTPUTS)
        inputs.choice("pooling", pooling, POOLINGS)
        if rope_len is not None:
            inputs.positive("rope_len", rope_len)
        tokens = inputs.tokens(tokens, self.config, virtual=self.virtual)
        valid = None if attention_mask is None else inputs.mask(attention_mask, tokens.shape)
        output = f"{output}:{pooling}" if output == "embeddings" else output
        params, adapters = self.calling()
        with within(self.mesh):
            return _forward(
                self.family.backbone, self.config, self.runtime, output, rope_len, params, tokens, valid, adapters
            )

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
        stop: str | Sequence[str] = (),
        samples: int = 1,
        seed: int = 0,
        stream: Callable[[str], None] | None = None,
        details: bool = False,
        ignore_fields: Sequence[str] = (),
    ) -> Any:
        """What follows the prompts: a string for a string, a list for a list of strings, int32 [B, n] for token ids.

        chat, a list of {"role", "content"}, is rendered by the checkpoint's template instead of a prompt. What is not
        given comes from generation_config.json; temperature=0 is greedy. stop: strings at which a text ends, themselves
        left out. samples > 1 draws as many continuations of each prompt: one more list level, or [B, samples, n]. Rows
        of ids that end early are filled with the pad id. stream gets the text of a single prompt as it appears. details
        gives a Generation (tokens, logprobs, text, finish, timing) for each instead. ignore_fields: names in
        generation_config.json to pass over.
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
        inputs.positive("samples", samples)
        inputs.whole("seed", seed)
        stops = _stops(stop)
        chosen = self._settings(options, ignore_fields)
        rows, as_text = self._rows(prompts, chat)
        if beyond := [token for token in chosen.eos if token >= self.config.vocab_size]:
            raise ValueError(f"eos token {beyond[0]} is outside the vocabulary 0..{self.config.vocab_size - 1}")
        if stream is not None and len(rows) * samples != 1:
            raise ValueError(f"stream needs a single prompt and sample, got {len(rows)} and {samples}")
        longest = max(map(len, rows))
        new = chosen.new_tokens(longest)
        limit = self.config.max_context - self.virtual
        if longest + new > limit:
            raise ValueError(f"{longest} prompt tokens and {new} new ones do not fit the model's context of {limit}")
        made = generate(
            self._plan(chosen, bucket(longest) + bucket(new), new, longest + new, details),
            self.running_params(),
            rows,
            limit=new,
            seed=seed,
            samples=samples,
            stop=stops,
            tokenizer=self.tokenizer if as_text or stops or stream else None,
            emit=stream,
        )
        if as_text or details:
            results = made if details else [one.text for one in made]
            nested = [results[i : i + samples] for i in range(0, len(results), samples)] if samples > 1 else results
            return nested[0] if isinstance(prompts, str) or chat is not None else nested
        ids = np.full((len(made), max(len(one.tokens) for one in made)), chosen.pad, np.int32)
        for into, one in zip(ids, made, strict=True):
            into[: len(one.tokens)] = one.tokens
        return ids.reshape(len(rows), samples, -1) if samples > 1 else ids

    def session(
        self, *, max_new_tokens: int = 512, seed: int = 0, ignore_fields: Sequence[str] = (), **options
    ) -> Session:
        """A conversation that keeps its cache between turns; options as `generate` has them for drawing."""
        inputs.positive("max_new_tokens", max_new_tokens)
        chosen = self._settings(options | {"max_new_tokens": max_new_tokens}, ignore_fields)
        plan = lambda length: self._plan(chosen, length, max_new_tokens, length, True)
        return Session(self.running_params, plan, max_new_tokens, self.config.max_context - self.virtual, seed)

    def logprobs(self, tokens: Any, attention_mask: Any = None) -> jax.Array:
        """tokens [B, T] int -> float32 [B, T-1], each token's log-probability after those before it; 0 at padding."""
        return scoring.token_logprobs(self, tokens, attention_mask)

    def perplexity(
        self,
        text_or_ids: Any,
        *,
        window: int | None = None,
        stride: int | None = None,
        progress: Progress | None = None,
    ) -> scoring.Perplexity:
        """Of one text of any length, in overlapping windows (`jaxlm.scoring.perplexity`)."""
        return scoring.perplexity(self, text_or_ids, window=window, stride=stride, progress=progress)

    def resize_embeddings(
        self, n: int, *, multiple_of: int = 1, key: jax.Array | None = None, force: bool = False
    ) -> None:
        """A vocabulary of n tokens, rounded up to a multiple; new rows are the mean (`jaxlm.resize`)."""
        resize_embeddings(self, n, multiple_of=multiple_of, key=key, force=force)

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
        The directory appears, or is replaced (overwrite=True), in one step at the end. A tensor at a time is gathered
        from the mesh; where that has several hosts all must call this, and the first one writes.
        """
        inputs.choice("dtype", dtype, (None, *inputs.DTYPES))
        if self.adapters is not None:
            raise ValueError("this model has adapters: merge_adapters().save() or save_adapters()")
        arrays = flatten(self.params)
        names = tensor_names(self.family, self.config, arrays, () if self.manifest is None else self.manifest.tensors)
        tensors, read = stored(arrays, names, self.manifest, dtype)
        shared = hosts.spans_hosts(self.mesh)
        if shared and not hosts.leads():
            write_checkpoint(None, tensors, read, self.manifest, max_shard_bytes)
        else:
            with staged(directory, overwrite) as staging:
                write_checkpoint(staging, tensors, read, self.manifest, max_shard_bytes, progress)
                write_files(staging, self.hf_config, self.generation_config, self.opened, dtype)
        if shared:
            hosts.wait_for_all(f"saved {directory}")

    def _settings(self, options: Mapping[str, Any], ignore_fields: Sequence[str]) -> GenerationSettings:
        """Without a generation_config.json the special tokens are those of config.json, as transformers has it."""
        special = {k: self.hf_config[k] for k in inputs.SPECIAL_TOKENS if self.hf_config.get(k) is not None}
        return settings(special | self.generation_config, options, ignore_fields)

    def _plan(self, chosen: GenerationSettings, length: int, new: int, rope_len: int, logprobs: bool) -> Plan:
        """Sizes are rounded up, so that few lengths compile anew; the length that RoPE depends on is exact."""
        ropes = {kind.rope for kind in getattr(self.config, "kinds", ())} - {None}
        return Plan(
            backbone=self.family.backbone,
            config=self.config,
            runtime=self.runtime,
            sampling=chosen.sampling,
            eos=chosen.eos,
            pad=chosen.pad,
            capacity=bucket(new),
            length=self.config.max_context if hasattr(self.family.backbone, "CONSTANT_CACHE") else length,
            virtual=self.virtual,
            rope_len=rope_len + self.virtual if any(rope.depends_on_length for rope in ropes) else None,
            logprobs=logprobs,
            mesh=self.mesh,
        )

    def calling(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Parameters and adapters for one pass."""
        if self.adapters is None:
            # A conversion for one call would not pay: "auto" takes the form at hand, stacked until something was
            # generated.
            return self.weights.current if self.layers == "auto" else self.running_params(), None
        if self.layers != "unrolled":
            return self.params, self.adapters.tree
        params = self.running_params()
        return params, params.get("adapters")

    def running_params(self) -> dict[str, Any]:
        """The parameters in the form that runs fastest here (view.py); adapters merged, or their virtual tokens."""
        weights, tree = self.weights, {} if self.adapters is None else self.adapters.tree
        if adapted.has_pairs(tree):
            self._merged = weights = self._merged or adapted.merged(self)
        unroll = self.layers == "unrolled"
        if self.layers == "auto":
            unroll = jax.default_backend() == "cpu" and weights.on_one_device and hasattr(self.family.backbone, "VIEW")
        params = weights.unrolled if unroll else weights.stacked
        return params | {"adapters": tree} if self.virtual else params

    def _rows(self, prompts: Any, chat: Any) -> tuple[list[np.ndarray], bool]:
        """Token ids of each prompt, and whether text goes back."""
        if (prompts is None) == (chat is None):
            raise ValueError("generate needs either prompts or chat=[...]")
        if chat is not None:
            rows, as_text = [self.chat_tokens(chat)], True
        elif as_text := isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], str)):
            rows = [self.tokenizer(p)["input_ids"] for p in ([prompts] if isinstance(prompts, str) else prompts)]
        else:
            rows = list(prompts)
        if not rows:
            raise ValueError("generate got no prompts")
        return [inputs.row(row, self.config) for row in rows], as_text

    def chat_tokens(self, chat: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation as ids, by the checkpoint's template, up to where the model's answer begins."""
        if self.tokenizer.chat_template is None:
            raise ValueError("this checkpoint has no chat template: give the prompt as text")
        rendered = self.tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=True)
        return rendered["input_ids"]


def tensor_names(fam: Family, config: Any, leaves: Mapping[str, Any], have) -> Names:
    """The stored names of a model's parameters; leaves: {path: array or shape}."""
    shapes = {path: leaf if isinstance(leaf, tuple) else leaf.shape for path, leaf in leaves.items()}
    groups = [layer.group for layer in fam.backbone.layers(config)]
    return Names(fam.table(config, have), shapes, groups, fam.base, have)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _forward(backbone, config, runtime, output: str, rope_len: int | None, params, tokens, valid, adapters=None):
    positions = None if valid is None else backbone.count_positions(valid)
    both = {"positions": positions, "runtime": runtime} | ({} if adapters is None else {"adapters": adapters})
    x = backbone.embed(config, params, tokens, **both)
    hidden, _, aux = backbone.trunk(
        config,
        params,
        x,
        valid=valid,
        rope_len=rope_len,
        taps=("residual",) if output == "all_hidden" else (),
        **both,
    )
    if output == "all_hidden":
        return everywhere(jnp.concatenate([x[None], aux["residual"]]))
    if output.startswith("embeddings"):
        return everywhere(_pool(hidden.astype(jnp.float32), valid, output.split(":")[1]))
    return everywhere(hidden if output == "hidden" else backbone.head(config, params, hidden))


def _pool(hidden: jax.Array, valid: jax.Array | None, pooling: str) -> jax.Array:
    """[B, T, D] -> [B, D] over valid tokens."""
    valid = jnp.ones(hidden.shape[:2], bool) if valid is None else valid
    if pooling == "mean":
        return (hidden * valid[..., None]).sum(1) / jnp.maximum(valid.sum(1), 1)[:, None]
    first = valid.argmax(1)
    last = valid.shape[1] - 1 - valid[:, ::-1].argmax(1)
    at = first if pooling == "first" else last
    return jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(s, str) or not s for s in stops):
        raise ValueError(f"stop={stop!r}: expected strings that are not empty")
    return stops
