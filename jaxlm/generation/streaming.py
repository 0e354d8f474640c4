"""Text out of a stream of token ids, without breaking characters that span several tokens."""

from collections.abc import Callable, Sequence
from typing import Any


class TextStream:
    """Feed ids with `put`; `emit` gets text that later ids cannot change. `end` flushes what is left."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]):
        self.tokenizer, self.emit = tokenizer, emit
        self.ids: list[int] = []
        self.start = 0  # ids before this are settled: their text is out, and they only give context to the next
        self.shown = 0  # ids before this have been emitted

    def put(self, token: int) -> None:
        self.ids.append(token)
        self._flush(final=False)

    def end(self) -> None:
        self._flush(final=True)

    def _flush(self, final: bool) -> None:
        # Decoders join tokens (spaces, byte fallback), so text is compared with that of the ids already shown.
        before = self._decode(self.ids[self.start : self.shown])
        after = self._decode(self.ids[self.start :])
        if len(after) <= len(before) or (after.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return
        self.emit(after[len(before) :])
        self.start, self.shown = self.shown, len(self.ids)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopFilter:
    """Passes text on up to the first of some stop strings, holding back what might become one."""

    def __init__(self, stops: Sequence[str], emit: Callable[[str], None]):
        self.stops, self.emit = tuple(stops), emit
        self.held = ""
        self.stopped = False

    def put(self, text: str) -> None:
        if self.stopped:
            return
        self.held += text
        at = first_stop(self.held, self.stops)
        if at is not None:
            self.stopped = True
            self._release(at)
        else:
            self._release(len(self.held) - self._risky())

    def end(self) -> None:
        if not self.stopped:
            self._release(len(self.held))

    def _risky(self) -> int:
        """Characters at the end of the held text that begin a stop string."""
        longest = max(map(len, self.stops), default=0)
        tails = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in tails if any(stop.startswith(self.held[-n:]) for stop in self.stops)), 0)

    def _release(self, n: int) -> None:
        if n:
            self.emit(self.held[:n])
        self.held = self.held[n:]


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(found, default=None)
