"""Tokenizers of a few hundred tokens, and caches made by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxlm.data.cache import CacheWriter, TokenCache, open_cache
from jaxlm.data.formats import Example, FormatConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"]


def tokenizer(template: str | None = CHATML, merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """A token for each byte, and for each merge; EOS is <|endoftext|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        chat_template=template,
    )


def cache(directory: Path, examples: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]] = ()) -> TokenCache:
    """A cache of these ids."""
    directory.mkdir(parents=True)
    made = [np.asarray(ids, np.int32) for ids in examples]
    wanted = [np.asarray(mask, bool) for mask in masks] or [np.ones(len(ids), bool) for ids in made]
    with CacheWriter(directory, max((int(ids.max()) for ids in made), default=0) + 1) as writer:
        writer.add([Example(ids, mask) for ids, mask in zip(made, wanted, strict=True)])
        about = {"source": "none", "fingerprint": "none"}
        writer.finish(tokenizer=about, format=FormatConfig(), sources=(), rows={}, data={})
    return open_cache(directory)


def numbered(lengths: Sequence[int]) -> list[np.ndarray]:
    """Examples whose tokens are all different: 1, 2, 3, ..."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end) + 1 for end, n in zip(ends, lengths, strict=True)]


def long_tailed(count: int, seed: int = 0, longest: int = 2048) -> np.ndarray:
    """Lengths as of instructions and answers: log-normal, median 150, cut at `longest`."""
    drawn = np.random.default_rng(seed).lognormal(np.log(150), 0.9, count)
    return np.clip(drawn, 4, longest).astype(np.int64)
