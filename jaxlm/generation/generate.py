"""From token rows to finished continuations: prefill, decode, stop, and what came of it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.generation.loop import Plan, State, bucket, decode, pad_rows, prefill, stream
from jaxlm.generation.streaming import StopFilter, TextStream, first_stop
from jaxlm.parallel.mesh import within

CHECK_EVERY = 16  # tokens between two looks for stop strings


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one call, compilation included where it happened; new tokens are counted over all rows."""

    prompt_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first of each row, which the prefill draws."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """One continuation. tokens int32 [n] with the EOS that ended it, if one did; logprobs float32 [n], natural
    logarithms of the model's own probabilities, before temperature and filters."""

    tokens: np.ndarray
    logprobs: np.ndarray
    text: str | None  # None without a tokenizer; ends before a stop string
    finish: str  # "eos", "stop" or "length"
    timing: Timing


def generate(
    plan: Plan,
    params: Any,
    rows: Sequence[np.ndarray],
    *,
    limit: int,
    seed: int = 0,
    samples: int = 1,
    stop: Sequence[str] = (),
    tokenizer: Any = None,
    emit: Callable[[str], None] | None = None,
) -> list[Generation]:
    """`samples` continuations of each row of ids, at most `limit` tokens each, in the order of the rows.

    emit gets the text of a single continuation as it appears; stop strings and emit need the tokenizer.
    """
    tokens, lengths = pad_rows(rows, min(bucket(max(map(len, rows))), plan.length, plan.config.max_context), plan.pad)
    start = time.perf_counter()
    with within(plan.mesh):
        state = prefill(plan, params, tokens, lengths, jax.random.key(seed), samples)
    state["step"].block_until_ready()
    spent = time.perf_counter() - start
    return finish(
        plan, params, state, limit=limit, stop=stop, tokenizer=tokenizer, emit=emit, prompt=(int(lengths.sum()), spent)
    )[0]


def finish(
    plan: Plan,
    params: Any,
    state: State,
    *,
    limit: int,
    stop: Sequence[str],
    tokenizer: Any,
    emit: Callable[[str], None] | None,
    prompt: tuple[int, float],
) -> tuple[list[Generation], State]:
    """Decodes to the end after a prefill of (tokens, seconds); what came of each row, and the state."""
    start = time.perf_counter()
    with within(plan.mesh):
        if emit is not None:
            state = _streamed(plan, params, state, limit, stop, tokenizer, emit)
        elif stop:
            state = _checked(plan, params, state, limit, stop, tokenizer)
        elif limit > 1:
            state, _ = decode(plan, params, state, limit)
    out = np.asarray(state["out"])
    drawn = min(int(state["step"]), limit)
    logprobs = np.zeros_like(out, np.float32) if state["logprobs"] is None else np.asarray(state["logprobs"])
    kept = [_cut(row[:drawn], plan.eos, stop, tokenizer) for row in out]
    timing = Timing(*prompt, sum(n for n, *_ in kept) - len(kept), time.perf_counter() - start)
    made = [
        Generation(row[:n], logprob[:n], text, ended, timing)
        for row, logprob, (n, text, ended) in zip(out, logprobs, kept, strict=True)
    ]
    return made, state


def _streamed(plan, params, state, limit, stop, tokenizer, emit):
    filtered = StopFilter(stop, emit)
    text = TextStream(tokenizer, filtered.put)

    def on_token(token: int) -> bool:
        if token not in plan.eos:
            text.put(token)
        return not filtered.stopped

    state = stream(plan, params, state, limit, on_token)
    text.end()
    filtered.end()
    return state


def _checked(plan, params, state, limit, stop, tokenizer):
    """Decodes a few tokens at a time, and ends the rows in which a stop string has appeared."""
    while True:
        step, done = int(state["step"]), np.asarray(state["done"])
        found = [_cut(row[:step], plan.eos, stop, tokenizer)[2] == "stop" for row in np.asarray(state["out"])]
        state = state | {"done": jax.numpy.asarray(done | found)}
        if step >= limit or (done | found).all():
            return state
        state, _ = decode(plan, params, state, min(limit, step + CHECK_EVERY))


def _cut(row: np.ndarray, eos: tuple[int, ...], stop: Sequence[str], tokenizer: Any) -> tuple[int, str | None, str]:
    """How many tokens of a row count, its text, and what ended it."""
    ends = np.flatnonzero(np.isin(row, eos))
    ids, finish = (row[: ends[0]], "eos") if len(ends) else (row, "length")
    count = len(row) if finish == "length" else int(ends[0]) + 1
    if tokenizer is None:
        return count, None, finish
    text = _decode(tokenizer, ids)
    at = first_stop(text, stop)
    if at is None:
        return count, text, finish
    # The fewest tokens whose text holds the stop string: it may end inside the text of a token.
    low = next(n for n in range(1, len(ids) + 1) if first_stop(_decode(tokenizer, ids[:n]), stop) is not None)
    return low, text[:at], "stop"


def _decode(tokenizer: Any, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
