"""Fill-in-the-middle: the middle of an example moved to its end, so that a causal model learns to fill it in.

As StarCoder was trained (github.com/bigcode-project/Megatron-LM, gpt_dataset.py, from arXiv 2207.14255), over tokens
and within one row, so that a prefix never stands in another row than its middle:

    PSM: <prefix> P <suffix> S <middle> M        SPM: <prefix> <suffix> S <middle> P M
"""

import dataclasses
from typing import Any

import numpy as np

from jaxlm.data.order import MIDDLE, draws

# Prefix, suffix and middle as families spell them: Qwen2.5-Coder, CodeGemma and Granite; StarCoder; SantaCoder;
# Code Llama; DeepSeek-Coder, whose suffix begins at the hole.
SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
EXTRA = 3  # tokens added


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fim:
    """Token ids of the marks, the share of examples that are changed, and of these the share in SPM order.

    `bos` and `eos`, where an example has them, stay at its ends.
    """

    prefix: int
    suffix: int
    middle: int
    rate: float = 0.5
    spm_rate: float = 0.5
    bos: int | None = None
    eos: int | None = None

    def __post_init__(self):
        for name in ("rate", "spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share from 0 to 1")

    @classmethod
    def of(cls, tokenizer: Any, *, rate: float = 0.5, spm_rate: float = 0.5) -> "Fim":
        """With the marks of a tokenizer; ValueError where it has none."""
        vocab = tokenizer.get_vocab()
        for names in SPELLINGS:
            if all(name in vocab for name in names):
                prefix, suffix, middle = (vocab[name] for name in names)
                ends = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
                return cls(prefix=prefix, suffix=suffix, middle=middle, rate=rate, spm_rate=spm_rate, **ends)
        raise ValueError(
            f"the tokenizer has no fill-in-the-middle tokens; known are {', '.join(' '.join(n) for n in SPELLINGS)}. "
            f"Give the ids of others: Fim(prefix=, suffix=, middle=)"
        )

    def draws(self, seed: int, count: int) -> np.ndarray:
        """float64 [count, 4]: what decides about pieces 0..count-1."""
        return draws(seed, MIDDLE, count)

    def applies(self, drawn: np.ndarray) -> np.ndarray:
        """bool [count]: which pieces are changed, and so `EXTRA` tokens longer."""
        return drawn[:, 0] < self.rate

    def __call__(self, ids: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """The ids [n + 3] of a piece that is changed, by its draws [4]."""
        head = int(len(ids) > 0 and ids[0] == self.bos)
        tail = len(ids) - int(len(ids) > head and ids[-1] == self.eos)
        # Both cuts are uniform over the tail - head + 1 places between tokens, so that any part may be empty.
        low, high = sorted(head + int(draw * (tail - head + 1)) for draw in drawn[1:3])
        before, middle, after = ids[head:low], ids[low:high], ids[high:tail]
        if drawn[3] < self.spm_rate:
            parts = [self.prefix], [self.suffix], after, [self.middle], before, middle
        else:
            parts = [self.prefix], before, [self.suffix], after, [self.middle], middle
        return np.concatenate([ids[:head], *parts, ids[tail:]]).astype(np.int32)
