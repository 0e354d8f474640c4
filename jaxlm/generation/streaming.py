"""Text out of a stream of token ids, without breaking characters that span several tokens."""

from collections.abc import Callable
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
