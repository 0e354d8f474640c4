"""How one token is drawn from logits: the settings and the pure function that applies them.

Order and definitions are those of transformers' `LogitsProcessor` classes: repetition penalty, temperature, top-k,
top-p, min-p, then one draw. Greedy decoding is the largest logit after the repetition penalty.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw a token; hashable, so it is a static argument of the jitted loop.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        finite = math.inf
        self._check("temperature", self.temperature, 0 <= _number(self.temperature) < finite, "a finite number >= 0")
        self._check("top_p", self.top_p, 0 <= _number(self.top_p) <= 1, "a number between 0 and 1")
        self._check("min_p", self.min_p, 0 <= _number(self.min_p) <= 1, "a number between 0 and 1")
        penalty = self.repetition_penalty
        self._check("repetition_penalty", penalty, 0 < _number(penalty) < finite, "a finite number > 0")
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        self._check("top_k", self.top_k, whole and self.top_k >= 0, "a whole number >= 0 (0 is off)")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 1 and 1.0 must hash alike

    @staticmethod
    def _check(name: str, value: object, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name}={value!r}: expected {expected}")

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is taken, so that no random numbers are used."""
        return self.temperature == 0


def _number(value: object) -> float:
    """The value, or NaN (which no range contains) for what is not a number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array | None, seen: jax.Array | None = None) -> jax.Array:
    """Draws one token per row: logits [B, V] -> [B] int32.

    `seen` [B, V] bool marks the tokens of the prompt and of what was generated so far; it is needed for a repetition
    penalty. `key` may be None when greedy.
    """
    scores = process(logits, sampling, seen)
    if sampling.greedy:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError(f"key=None: drawing at temperature={sampling.temperature} needs a random key")
    return jax.random.categorical(key, scores, axis=-1).astype(jnp.int32)


def process(logits: jax.Array, sampling: Sampling, seen: jax.Array | None = None) -> jax.Array:
    """The scores a token is drawn from: float32 [B, V], minus infinity where a token is excluded."""
    if logits.ndim != 2:
        raise ValueError(f"{logits.shape=}: expected [batch, vocabulary]")
    scores = logits.astype(jnp.float32)
    if sampling.repetition_penalty != 1:
        if seen is None or seen.shape != logits.shape:
            found = None if seen is None else seen.shape
            raise ValueError(f"seen has shape {found}: repetition_penalty needs {logits.shape}, like the logits")
        penalty = sampling.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if sampling.greedy:
        return scores
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        # The least of the k, not the last: a slice of top_k makes XLA on a CPU sort the whole vocabulary, 100x slower.
        kth = jax.lax.top_k(scores, sampling.top_k)[0].min(axis=-1, keepdims=True)
        scores = jnp.where(scores < kth, -jnp.inf, scores)  # tokens equal to the k-th stay, as in transformers
    if sampling.top_p < 1:
        scores = jnp.where(_in_nucleus(scores, sampling.top_p), scores, -jnp.inf)
    if sampling.min_p > 0:
        probs = jax.nn.softmax(scores, axis=-1)
        scores = jnp.where(probs < sampling.min_p * probs.max(axis=-1, keepdims=True), -jnp.inf, scores)
    return scores


def _in_nucleus(scores: jax.Array, top_p: float) -> jax.Array:
    """Which tokens top-p keeps: [B, V] bool.

    In ascending order of score, a token goes while the probability summed up to and including it is at most 1 - top_p;
    the last one always stays. The cut is found by bisection on the ordered bits of the scores, 32 sums over the
    vocabulary: a sort of 262144 scores takes 100 ms on a CPU, this 8 ms.
    """
    rest = 1 - top_p
    probs = jax.nn.softmax(scores, axis=-1)
    order = _ordered_bits(scores)

    def mass(included: jax.Array) -> jax.Array:
        return jnp.where(included, probs, 0).sum(axis=-1, keepdims=True)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = mass(order <= middle) > rest
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = order.min(axis=-1, keepdims=True), order.max(axis=-1, keepdims=True)
    _, cut = jax.lax.fori_loop(0, 32, halve, bounds)
    # bfloat16 logits have many equal scores: of those at the cut, as many go as in a sorted list, lowest ids first.
    equal = order == cut
    each = jnp.where(equal, probs, 0).max(axis=-1, keepdims=True)
    removable = (rest - mass(order < cut)) / jnp.maximum(each, jnp.finfo(jnp.float32).tiny)
    removed = jnp.clip(jnp.floor(removable), 0, equal.sum(axis=-1, keepdims=True) - 1)
    return (order > cut) | (equal & (jnp.cumsum(equal, axis=-1) > removed))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 with the same order; both zeros are one value."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)
