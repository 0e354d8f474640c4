"""What a row says: text, a prompt with its completion, Alpaca's instruction, or a conversation (chat.py).

A format turns a row into the texts to be tokenized and a function that makes an example of their tokens, so that the
tokenizer gets many texts at a time, which is several times faster than one by one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.data.rows import BadRow, near

FORMATS = ("text", "prompt", "alpaca", "messages", "sharegpt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatConfig:
    """How rows are read.

    `columns` renames: (("text", "content"),) reads the column "content" where the format says "text".
    `ignore_columns` are columns to do without, ("*",) for all that the format does not know. `eos` ends an example with
    the tokenizer's EOS token (a conversation ends as its template ends it). `train_on_prompt` puts loss on prompts too;
    `turns` is "all" or "last": the assistant's turns with loss. `chat_template` replaces the tokenizer's.
    """

    name: str = "text"
    columns: tuple[tuple[str, str], ...] = ()
    ignore_columns: tuple[str, ...] = ()
    eos: bool = True
    train_on_prompt: bool = False
    turns: str = "all"
    chat_template: str | None = None

    def __post_init__(self):
        if self.name not in FORMATS:
            raise ValueError(f"format {self.name!r}: expected one of {', '.join(FORMATS)}{near(self.name, FORMATS)}")
        if self.turns not in ("all", "last"):
            raise ValueError(f"turns={self.turns!r}: expected 'all' or 'last'")


@dataclasses.dataclass(frozen=True)
class Example:
    """ids int32 [n]; mask bool [n], the tokens to be predicted. `merged`: a prompt's last token took in more."""

    ids: np.ndarray
    mask: np.ndarray
    merged: bool = False


@dataclasses.dataclass(frozen=True)
class Texts:
    """What to tokenize, with the tokenizer's own special tokens or without, and what to make of it."""

    texts: Sequence[str]
    special: bool
    finish: Callable[[Sequence[Sequence[int]]], Example]


class Unusable(ValueError):
    """Why a row is bad."""


class Format:
    """One kind of row. `required` and `optional` are its columns."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def __init__(self, config: FormatConfig, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer
        known = self.required + self.optional
        for name, _ in config.columns:
            if name not in known:
                raise ValueError(
                    f"columns: the format {config.name!r} has no {name!r}{near(name, known)}, only {', '.join(known)}"
                )
        self.names = {name: dict(config.columns).get(name, name) for name in known}
        self.known = frozenset(self.names.values()) | frozenset(config.ignore_columns)
        self.eos: int | None = tokenizer.eos_token_id if config.eos else None
        if config.eos and self.eos is None and self.uses_eos:
            raise ValueError("the tokenizer has no EOS token to end examples with: pass eos=False (--no-eos)")

    uses_eos = True

    def check_columns(self, columns: Sequence[str], where: str) -> None:
        """ValueError for a column that the format does not know."""
        unknown = [name for name in columns if name not in self.known and "*" not in self.config.ignore_columns]
        if unknown:
            wanted = [name for name in self.names.values() if name not in columns]
            hints = "".join(near(name, wanted) for name in unknown[:1])
            raise ValueError(
                f"{where}: column{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))} not known to the format "
                f"{self.config.name!r}, which reads {', '.join(self.names.values())}{hints}; rename one with columns= "
                f"(--column NAME=COLUMN), or leave it out with ignore_columns= (--ignore-column NAME, '*' for all)"
            )

    def check_schema(self, columns: Sequence[str], where: str) -> None:
        """The same for a schema, which also says what every row lacks."""
        for name in self.required:
            if self.names[name] not in columns:
                raise ValueError(
                    f"{where}: no column {self.names[name]!r}, only {', '.join(columns)}"
                    f"{near(self.names[name], columns)}; name it with columns= (--column {name}=COLUMN)"
                )
        self.check_columns(columns, where)

    def text(self, row: Mapping[str, Any], name: str) -> str:
        """The text in a column."""
        column = self.names[name]
        if column not in row:
            raise Unusable(f"no column {column!r}, only {', '.join(map(repr, row))}{near(column, row)}")
        return checked_text(row[column], f"column {column!r}")

    def texts(self, row: Mapping[str, Any]) -> Texts | None:
        """What a row holds, or None for an empty one; Unusable with the reason for a bad one."""
        raise NotImplementedError

    def ended(self, ids: Sequence[int]) -> np.ndarray:
        """The tokens with EOS at their end, once."""
        ends = self.eos is not None and (not len(ids) or ids[-1] != self.eos)
        return np.asarray([*ids, self.eos] if ends else ids, np.int32)


class Text(Format):
    """A text to be learnt whole."""

    required = ("text",)

    def texts(self, row: Mapping[str, Any]) -> Texts | None:
        text = self.text(row, "text")
        if not text.strip():
            return None

        def finish(tokens: Sequence[Sequence[int]]) -> Example:
            ids = self.ended(tokens[0])
            return Example(ids, np.ones(len(ids), bool))

        return Texts((text,), True, finish)


class Prompt(Format):
    """A prompt and its completion, which has the loss; they are tokenized together, as one text."""

    required = ("prompt", "completion")

    def parts(self, row: Mapping[str, Any]) -> tuple[str, str]:
        return self.text(row, "prompt"), self.text(row, "completion")

    def texts(self, row: Mapping[str, Any]) -> Texts | None:
        prompt, completion = self.parts(row)
        if not completion:
            raise Unusable(f"column {self.names[self.required[-1]]!r} is empty: there is nothing to learn")
        return Texts((prompt, prompt + completion), True, self._finish)

    def _finish(self, tokens: Sequence[Sequence[int]]) -> Example:
        prompt, whole = tokens
        if len(prompt) and prompt[-1] == self.tokenizer.eos_token_id:  # added by the tokenizer
            prompt = prompt[:-1]
        first = shared(prompt, whole)
        ids = self.ended(whole)
        mask = np.arange(len(ids)) >= (0 if self.config.train_on_prompt else first)
        return Example(ids, mask, merged=first < len(prompt))


# The templates of github.com/tatsu-lab/stanford_alpaca, train.py (Apache-2.0).
_ALPACA = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:"
)
_PAIRED = ", paired with an input that provides further context"


class Alpaca(Prompt):
    """Stanford Alpaca's columns, rendered with its template."""

    required, optional = ("instruction", "output"), ("input",)

    def parts(self, row: Mapping[str, Any]) -> tuple[str, str]:
        given = self.text(row, "input") if row.get(self.names["input"]) is not None else ""
        instruction = self.text(row, "instruction")
        # Not str.format on a made template: instructions hold braces.
        prompt = _ALPACA.format(
            paired=_PAIRED if given else "",
            instruction=instruction,
            input=f"### Input:\n{given}\n\n" if given else "",
        )
        return prompt, self.text(row, "output")


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def checked_text(value: Any, what: str) -> str:
    """Text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise Unusable(f"{what} is {type(value).__name__}, expected text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as problem:
            raise Unusable(f"{what} is not Unicode: half of a surrogate pair at character {problem.start}") from None
    return value


def formatter(config: FormatConfig, tokenizer: Any) -> Format:
    """The format that a config names; ValueError where the tokenizer cannot serve it."""
    from jaxlm.data.chat import Messages, ShareGpt

    made = {"text": Text, "prompt": Prompt, "alpaca": Alpaca, "messages": Messages, "sharegpt": ShareGpt}
    return made[config.name](config, tokenizer)


def examples(
    made: Format, rows: Sequence[Mapping[str, Any] | BadRow], where: Callable[[int], str]
) -> list[Example | BadRow | None]:
    """The examples of rows, None for an empty one; `where(i)` says where row i stands.

    ValueError, which is no BadRow, for a column that the format does not know.
    """
    results: list[Example | BadRow | None] = [row if isinstance(row, BadRow) else None for row in rows]
    found: list[tuple[int, Texts]] = []
    for i, row in enumerate(rows):
        if isinstance(row, BadRow):
            continue
        if not made.known.issuperset(row):
            made.check_columns(tuple(row), where(i))
        try:
            if texts := made.texts(row):
                found.append((i, texts))
        except Unusable as problem:
            results[i] = BadRow(where(i), str(problem))
    encoded = _encode(made.tokenizer, [texts for _, texts in found])
    for (i, texts), tokens in zip(found, encoded, strict=True):
        try:
            results[i] = texts.finish(tokens)
        except Unusable as problem:
            results[i] = BadRow(where(i), str(problem))
    return results


def _encode(tokenizer: Any, found: Sequence[Texts]) -> list[list[list[int]]]:
    """The tokens of all texts, each text once: a call with the tokenizer's special tokens, and one without."""
    tokens: dict[bool, dict[str, list[int]]] = {}
    for special in (True, False):
        texts = list(dict.fromkeys(text for one in found if one.special == special for text in one.texts))
        options = {"add_special_tokens": special, "return_attention_mask": False, "return_token_type_ids": False}
        ids = tokenizer(texts, verbose=False, **options)["input_ids"] if texts else []
        tokens[special] = dict(zip(texts, ids, strict=True))
    return [[tokens[one.special][text] for text in one.texts] for one in found]
