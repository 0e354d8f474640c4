"""generation_config.json and the caller's options, made into what the generation loop runs on.

Read strictly: a field that would change the text and is not supported is refused by name, a field nobody knows too.
"""

import dataclasses
from collections.abc import Collection, Mapping

from jaxlm.generation.sampling import Sampling

# transformers' own values when neither the file nor the caller says anything (GenerationConfig's default parameters).
_DEFAULT_TOP_K = 50
_DEFAULT_NEW_TOKENS = 20

_READ = frozenset(
    {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
    | {"eos_token_id", "pad_token_id", "max_new_tokens", "max_length"}
)

# Unsupported fields, with the value at which they do nothing (None and an empty list always do nothing).
_UNSUPPORTED = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "remove_invalid_values": False,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "watermarking_config": None,
}
# The same, but without effect on greedy decoding.
_UNSUPPORTED_SAMPLING = {"epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": None, "typical_p": 1}

# Fields that cannot change which tokens come out here: caches and outputs of transformers, beam search (refused above),
# drafts of speculative decoding (which keep the distribution), and ids used in other kinds of model.
_INERT = frozenset(
    {"_commit_hash", "_from_model_config", "transformers_version", "trust_remote_code"}
    | {"cache_config", "cache_implementation", "max_cache_len", "prefill_chunk_size", "use_cache", "low_memory"}
    | {"compile_config", "continuous_batching_config", "disable_compile"}
    | {"output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"}
    | {"early_stopping", "length_penalty", "renormalize_logits"}
    | {"assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind"}
    | {"is_assistant", "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"}
    | {"prompt_lookup_num_tokens", "speculation_type", "target_lookbehind", "use_mtp"}
    | {"bos_token_id", "decoder_start_token_id"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What one call of generate runs on. `inert` names the fields given that do nothing here."""

    sampling: Sampling
    eos: tuple[int, ...]
    pad: int
    max_new_tokens: int | None
    max_length: int | None
    inert: tuple[str, ...] = ()

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens may follow the prompt: `max_new_tokens`, else what `max_length` leaves, else 20."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return _DEFAULT_NEW_TOKENS
        if self.max_length <= prompt_length:
            raise ValueError(
                f"max_length={self.max_length} of the generation config leaves no room after a prompt of "
                f"{prompt_length} tokens: give max_new_tokens"
            )
        return self.max_length - prompt_length


def settings(
    generation_config: Mapping[str, object],
    overrides: Mapping[str, object] | None = None,
    ignore_fields: Collection[str] = (),
) -> GenerationSettings:
    """generation_config.json with the caller's options (same field names; None is "not given") -> settings.

    Sampling happens when the caller gives a temperature above 0, else as `do_sample` says (default: greedy). A field
    that is refused can be overridden with a harmless value or named in `ignore_fields`; all such are in one ValueError.
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    stored = {name: value for name, value in generation_config.items() if name not in ignore_fields}
    merged = {name: value for name, value in (stored | given).items() if value is not None}

    sampled = _flag("do_sample", merged.get("do_sample", False))
    if "temperature" in given and "do_sample" not in given:
        sampled = given["temperature"] != 0
    inert = _inert(merged, sampled)
    sampling = _sampling(merged, sampled)
    if sampling.greedy and merged.get("temperature") != 0:
        lost = sorted(given.keys() & {"top_k", "top_p", "min_p"})
        if lost:
            values = ", ".join(f"{name}={given[name]!r}" for name in lost)
            raise ValueError(f"{values}: no effect on greedy decoding; expected a temperature > 0 with it")

    eos = _token_ids("eos_token_id", merged.get("eos_token_id", ()))
    pad = _token_ids("pad_token_id", merged.get("pad_token_id", ()))
    if len(pad) > 1:
        raise ValueError(f"pad_token_id={merged['pad_token_id']!r}: expected one token id")
    return GenerationSettings(
        sampling=sampling,
        eos=eos,
        pad=(*pad, *eos, 0)[0],
        max_new_tokens=_count("max_new_tokens", merged),
        max_length=_count("max_length", merged),
        inert=inert,
    )


def _sampling(merged: Mapping[str, object], sampled: bool) -> Sampling:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {name: merged[name] for name in names if name in merged}
    full = Sampling(**({"top_k": _DEFAULT_TOP_K} | options))  # type: ignore[arg-type]  # __post_init__ checks types
    if sampled and not full.greedy:
        return full
    return Sampling(temperature=0.0, repetition_penalty=full.repetition_penalty)


def _inert(merged: Mapping[str, object], sampled: bool) -> tuple[str, ...]:
    """The names of the fields that do nothing, or a ValueError naming all that would do something."""
    unsupported = _UNSUPPORTED | (_UNSUPPORTED_SAMPLING if sampled else {})
    known = _READ | _INERT | _UNSUPPORTED.keys() | _UNSUPPORTED_SAMPLING.keys()
    bad = []
    for name, value in merged.items():
        if name not in known:
            bad.append(f"{name}={value!r} (unknown)")
        elif name in unsupported and value != unsupported[name] and not _is_empty(value):
            neutral = unsupported[name]
            bad.append(f"{name}={value!r} (expected {'none' if neutral is None else neutral})")
    if bad:
        raise ValueError(
            f"generation config: not supported: {', '.join(bad)}; name a field in ignore_fields to drop it"
        )
    return tuple(sorted(merged.keys() - _READ))


def _is_empty(value: object) -> bool:
    return isinstance(value, (list, tuple, dict)) and not value


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected true or false")
    return value


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    ids = []
    for i in value if isinstance(value, (list, tuple, set, frozenset)) else (value,):
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise ValueError(f"{name}={value!r}: expected a token id >= 0 or a list of them")
        ids.append(i)
    return tuple(dict.fromkeys(ids))


def _count(name: str, merged: Mapping[str, object]) -> int | None:
    value = merged.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name}={value!r}: expected a whole number >= 1")
    return value
