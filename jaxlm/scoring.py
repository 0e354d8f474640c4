"""What a model thinks of a text: the log-probability of each token, and perplexity over windows of long texts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import inputs
from jaxlm.generation.loop import bucket, pad_rows
from jaxlm.parallel.mesh import within
from jaxlm.parallel.sharding import everywhere

if TYPE_CHECKING:
    from jaxlm.model import Model

CHUNK = 512  # positions whose logits exist at a time
WINDOW = 2048  # of a perplexity where none is asked for; a long context would be a slow and unusual choice


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Of `tokens` tokens, all but the text's first: value = exp(nll), nll the mean of -log p in nats."""

    value: float
    nll: float
    tokens: int


def token_logprobs(model: "Model", tokens: Any, attention_mask: Any = None) -> jax.Array:
    """float32 [B, T-1]: the log-probability of tokens[:, 1:], each given those before it; 0 where either is padding.

    At most 512 positions' logits are in memory at a time.
    """
    return score(model, tokens, attention_mask)[0]


def score(model: "Model", tokens: Any, attention_mask: Any = None, rope_len: int | None = None):
    """token_logprobs, and [B, T-1] bool: whether the token is the likeliest one."""
    tokens = inputs.tokens(tokens, model.config, predicted=1, virtual=model.virtual)
    if tokens.shape[1] < 2:
        raise ValueError(f"tokens have shape {tokens.shape}: expected at least two in a row, the first is given")
    valid = None if attention_mask is None else inputs.mask(attention_mask, tokens.shape)
    params, adapters = model.calling()
    with within(model.mesh):
        return _score(model.family.backbone, model.config, model.runtime, rope_len, params, tokens, valid, adapters)


def score_rows(
    model: "Model", rows: Sequence[np.ndarray], width: int | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`score` of rows of ids of any lengths, in one batch: (logprobs, likeliest) [len(row) - 1] for each."""
    longest = max(map(len, rows))
    length_matters = depends_on_length(model)
    if length_matters and any(len(row) != longest for row in rows):
        raise ValueError("rows of different lengths in one batch, and this model's RoPE depends on the length")
    width = min(width or bucket(longest), model.config.max_context + 1)
    tokens, lengths = pad_rows(rows, width, 0)
    valid = np.arange(width) < lengths[:, None]
    found = score(model, tokens, valid, longest if length_matters else None)
    logprobs, likeliest = map(np.asarray, found)
    return [(a[: n - 1], b[: n - 1]) for a, b, n in zip(logprobs, likeliest, lengths, strict=True)]


def depends_on_length(model: "Model") -> bool:
    """Whether the frequencies of RoPE change with the length of the sequence."""
    return any(kind.rope and kind.rope.depends_on_length for kind in getattr(model.config, "kinds", ()))


def perplexity(
    model: "Model",
    text_or_ids: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """exp of the mean -log p of every token but the first, each scored once, in windows that overlap.

    As transformers' guide has it: a window of `window` tokens (default: the context, at most 2048) moves on by `stride`
    (default: half of it), and scores the tokens that no window before it has. So a token sees at least window - stride
    tokens before it, unless the text begins there. A text gets the special tokens that its tokenizer adds. progress is
    told (tokens scored, tokens in all).
    """
    context: int = model.config.max_context
    window = min(context, WINDOW) if window is None else window
    inputs.positive("window", window)
    stride = max(1, window // 2) if stride is None else stride
    inputs.positive("stride", stride)
    if not 2 <= window <= context:
        raise ValueError(f"window={window}: expected 2 to {context}, the model's context")
    if stride >= window:
        raise ValueError(f"stride={stride}: expected less than the window of {window}, so that each token has a past")
    if isinstance(text_or_ids, str):
        # verbose=False: a text longer than the context is what windows are for, and needs no warning.
        text_or_ids = model.tokenizer(text_or_ids, verbose=False)["input_ids"]
    ids = inputs.row(text_or_ids, model.config)
    if len(ids) < 2:
        raise ValueError("the text has one token: expected at least two, the first is given")
    total, done = 0.0, 0
    for begin, end, first in windows(len(ids), window, stride):
        ((logprobs, _),) = score_rows(model, [ids[begin:end]], window if len(ids) > window else None)
        total -= float(logprobs[first - begin - 1 :].sum(dtype=np.float64))
        done += end - first
        if progress:
            progress(done, len(ids) - 1)
    nll = total / done
    return Perplexity(value=math.exp(nll) if nll < 700 else math.inf, nll=nll, tokens=done)


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first) of each window over a text; it scores the tokens from `first` on."""
    first = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        yield begin, end, first
        if end == length:
            return
        first = end


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _score(backbone, config, runtime, rope_len: int | None, params, tokens, valid, adapters=None):
    fed, targets = tokens[:, :-1], tokens[:, 1:]
    known = positions = None
    if valid is not None:
        known = valid[:, :-1]
        positions = backbone.count_positions(known)
    both = {"positions": positions, "runtime": runtime} | ({} if adapters is None else {"adapters": adapters})
    x = backbone.embed(config, params, fed, **both)
    hidden, _, _ = backbone.trunk(config, params, x, valid=known, rope_len=rope_len or tokens.shape[1], **both)

    def chunk(pair):
        hidden, targets = pair
        logits = backbone.head(config, params, hidden)  # [B, t, V]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), chosen >= logits.max(-1)

    pair = hidden, targets
    logprobs, likeliest = chunk(pair) if targets.shape[1] <= CHUNK else _in_chunks(chunk, pair)
    if valid is not None:
        both = valid[:, 1:] & valid[:, :-1]
        logprobs, likeliest = jnp.where(both, logprobs, 0), likeliest & both
    return everywhere((logprobs, likeliest))


def _in_chunks(chunk, arrays):
    """chunk(arrays), whose second axis is the positions, a few at a time."""
    length = arrays[0].shape[1]
    n = -(-length // CHUNK)
    split = lambda a: jnp.moveaxis(
        jnp.pad(a, ((0, 0), (0, n * CHUNK - length)) + ((0, 0),) * (a.ndim - 2)).reshape(
            a.shape[0], n, CHUNK, *a.shape[2:]
        ),
        1,
        0,
    )
    join = lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)[:, :length]
    return jax.tree.map(join, jax.lax.map(chunk, tuple(map(split, arrays))))
