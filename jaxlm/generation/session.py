"""A conversation whose cache is kept between turns, so that each turn reads only what is new."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.generation.generate import Generation, finish
from jaxlm.generation.loop import Plan, State, bucket, extend, pad_rows, prefill
from jaxlm.parallel.mesh import within


class Session:
    """Continues ever longer token sequences; what the cache already holds of one is not computed again.

    params() gives the model's present parameters. make_plan(length) is the static plan for a cache of that many
    positions; `room` is how many tokens one turn may draw.
    """

    def __init__(
        self, params: Callable[[], Any], make_plan: Callable[[int], Plan], room: int, context: int, seed: int = 0
    ):
        self.params, self.make_plan, self.room, self.context = params, make_plan, room, context
        self.key = jax.random.key(seed)
        self.plan: Plan | None = None
        self.state: State | None = None
        self.cached: list[int] = []  # the tokens in the cache
        self.reused = 0  # of the last turn's tokens, how many the cache already had

    def answer(
        self,
        ids: Sequence[int],
        limit: int,
        *,
        stop: Sequence[str] = (),
        tokenizer: Any = None,
        emit: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continues the whole sequence so far; ValueError when that and `limit` new tokens outgrow the context."""
        if not 1 <= limit <= self.room:
            raise ValueError(f"limit={limit}: this session draws 1 to {self.room} tokens a turn (its max_new_tokens)")
        if len(ids) + limit > self.context:
            raise ValueError(
                f"the conversation has {len(ids)} tokens; {limit} new ones do not fit the model's context of "
                f"{self.context}"
            )
        start = time.perf_counter()
        plan, state = self._read(list(ids), limit)
        state["step"].block_until_ready()
        prompt = (len(ids) - self.reused, time.perf_counter() - start)
        (made,), self.state = finish(
            plan, self.params(), state, limit=limit, stop=stop, tokenizer=tokenizer, emit=emit, prompt=prompt
        )
        # The last token drawn was never fed.
        self.cached = [*ids, *np.asarray(self.state["out"])[0, : int(self.state["step"]) - 1].tolist()]
        return made

    def _read(self, ids: list[int], limit: int) -> tuple[Plan, State]:
        """The state after reading `ids`: continued where the cache holds their beginning, else made anew."""
        known, begun = len(self.cached), ids[: len(self.cached)] == self.cached
        # Until the turn is over the cache is in motion: an interrupted turn must not leave a stale list behind.
        self.cached = []
        plan, state = self.plan, self.state
        if plan and state and 0 < known < len(ids) and begun and len(ids) + limit <= plan.length:
            self.reused = known
            tokens, lengths = pad_rows([np.array(ids[known:])], min(bucket(len(ids) - known), self.context), plan.pad)
            with within(plan.mesh):
                return plan, extend(plan, self.params(), state, tokens, lengths)
        self.reused = 0
        self.plan = plan = self.make_plan(min(self.context, 2 * bucket(len(ids) + limit)))
        tokens, lengths = pad_rows([np.array(ids)], min(bucket(len(ids)), plan.length), plan.pad)
        self.key, key = jax.random.split(self.key)
        with within(plan.mesh):
            return plan, prefill(plan, self.params(), tokens, lengths, key)
