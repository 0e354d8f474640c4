"""Strict reading of config.json: every key is read by the family, or inert, or an error."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

# Keys that change nothing a checkpoint computes: provenance, defaults of generation, hints for other programs.
# fmt: off
INERT = frozenset((
    "architectures", "auto_map", "transformers_version", "model_type", "torch_dtype", "dtype", "use_cache",
    "_name_or_path", "name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "task_specific_params", "return_dict", "output_hidden_states", "output_attentions",
    "torchscript", "_commit_hash", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
    "gradient_checkpointing", "id2label", "label2id", "problem_type", "finetuning_task", "tokenizer_class", "prefix",
    "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "keys_to_ignore_at_inference",
    "cache_implementation", "hybrid_cache_max_batch", "unsloth_version", "unsloth_fixed",
))
# fmt: on


_REQUIRED = object()


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# What the values of keys must be, whichever architecture reads them.
_TYPES = (
    (
        frozenset(
            """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads
            num_key_value_heads head_dim max_position_embeddings original_max_position_embeddings sliding_window
            num_experts num_local_experts num_experts_per_tok decoder_sparse_step n_embd n_head n_layer n_inner
            n_positions sliding_window_pattern _sliding_window_pattern context_length attention_hidden_size head_size
            head_size_divisor num_heads time_mix_extra_dim time_decay_extra_dim decay_low_rank_dim a_low_rank_dim
            v_low_rank_dim gate_low_rank_dim""".split()  # noqa: SIM905
        ),
        _is_size,
        "a whole number above 0",
    ),
    (
        frozenset(
            """rms_norm_eps layer_norm_epsilon rope_theta rope_local_base_freq partial_rotary_factor attention_dropout
            attn_pdrop resid_pdrop embd_pdrop initializer_range query_pre_attn_scalar attn_logit_softcapping
            final_logit_softcapping embedding_multiplier residual_multiplier attention_multiplier logits_scaling factor
            norm_eps hidden_ratio rescale_every
            low_freq_factor high_freq_factor beta_fast beta_slow mscale mscale_all_dim attention_factor""".split()  # noqa: SIM905
        ),
        _is_number,
        "a finite number",
    ),
    (
        frozenset(
            """tie_word_embeddings attention_bias mlp_bias use_sliding_window norm_topk_prob truncate scale_attn_weights
            scale_attn_by_inverse_layer_idx""".split()  # noqa: SIM905
        ),
        lambda value: isinstance(value, bool),
        "true or false",
    ),
    (
        frozenset(("layer_types", "mlp_only_layers", "short_factor", "long_factor")),
        lambda value: isinstance(value, (list, tuple)),
        "a list",
    ),
)


class Reader:
    """Hands out the keys of a config.json and remembers which; `finish` raises on what nobody read."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json", ignore: Iterable[str] = ()):
        self.values, self.where, self.ignore = values, where, frozenset(ignore)
        self._read: set[str] = set()
        self._parts: list[Reader] = []

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        """The value of a required key; a missing or null one raises."""
        value = self.get(key, _REQUIRED)
        if value is _REQUIRED:
            near = difflib.get_close_matches(key, self.values, 1)
            hint = f"; it has {near[0]!r}" if near else ""
            raise ValueError(f"{self.where} has no {key!r}, which this architecture needs{hint}")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default when it is missing or null."""
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        for keys, fits, expected in _TYPES:
            if key in keys and not fits(value):
                raise ValueError(f"{self.where}: {key}={value!r} is not supported; expected {expected}")
        return value

    def choice(self, key: str, table: Mapping[Any, Any], default: Any = _REQUIRED) -> Any:
        """The entry of `table` that the key's value names."""
        value = self[key] if default is _REQUIRED else self.get(key, default)
        if not isinstance(value, str) or value not in table:
            raise ValueError(f"{self.where}: {key}={value!r} is not supported; supported: {', '.join(map(str, table))}")
        return table[value]

    def inert(self, *keys: str) -> None:
        """Keys that change nothing this library computes; the caller's comment says why."""
        self._read.update(keys)

    def expect(self, key: str, *allowed: Any) -> None:
        """For a feature that is not implemented: any value but these raises; the first is the default."""
        if (value := self.get(key, allowed[0])) not in allowed:
            raise ValueError(
                f"{self.where}: {key}={value!r} is not supported; expected {' or '.join(map(repr, allowed))}"
            )

    def part(self, key: str) -> "Reader":
        """A reader of the object under a key (empty when missing), finished together with this one."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.where}: {key} must be an object, got {value!r}")
        mine = [name.removeprefix(f"{key}.") for name in self.ignore if name.startswith(f"{key}.")]
        part = Reader(value, f"{self.where}: {key}", mine)
        self._parts.append(part)
        return part

    def _useless(self) -> list[str]:
        """Names to ignore that nobody would otherwise complain about."""
        mine = [name for name in self.ignore if "." not in name and (name not in self.values or name in self._read)]
        parts = {part.where.removeprefix(f"{self.where}: "): part for part in self._parts}
        nested = [name for name in self.ignore if "." in name and name.split(".")[0] not in parts]
        return mine + nested + [f"{key}.{name}" for key, part in parts.items() for name in part._useless()]

    def unread(self) -> list[str]:
        known = self._read | INERT | self.ignore
        mine = [f"{key}={value!r}" for key, value in self.values.items() if key not in known]
        return mine + [f"{p.where.removeprefix(self.where + ': ')}.{u}" for p in self._parts for u in p.unread()]

    def finish(self) -> None:
        """Raises, naming every key that no one read."""
        if useless := self._useless():
            raise ValueError(
                f"ignore_fields names {', '.join(sorted(useless))}, which {self.where} does not have, or which this "
                f"architecture reads: nothing would be ignored"
            )
        if unread := self.unread():
            raise ValueError(
                f"{self.where} has fields this architecture does not know: {', '.join(unread)}. If they do not "
                f"matter, pass ignore_fields=[...] (command line: --ignore-field NAME)"
            )
