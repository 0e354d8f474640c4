"""Conversations: rendered by the tokenizer's chat template, with loss on the assistant's turns alone.

Where a turn of the assistant begins and ends is found by rendering the conversation up to there. That is right only if
what was rendered, and its tokens, are a prefix of the whole conversation's, so this is checked for every example: a
template that takes back what it wrote earlier (reasoning of former turns, say) is an error, not a shifted mask. A
template with {% generation %} marks says itself which tokens are the assistant's.
"""

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxlm.data.formats import Example, Format, FormatConfig, Texts, Unusable, checked_text, shared
from jaxlm.data.rows import near

ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"))
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Messages(Format):
    """A list of {"role": ..., "content": ...}; "tools", where there are any, are given to the template."""

    required, optional = ("messages",), ("tools",)
    uses_eos = False  # the template ends its turns
    role, content = "role", "content"  # as the keys of a message are called
    roles: Mapping[str, str] = MappingProxyType({role: role for role in ROLES})
    keys = _KEYS

    def __init__(self, config: FormatConfig, tokenizer: Any):
        super().__init__(config, tokenizer)
        if config.chat_template is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template: take that of an instruction-tuned model, or pass chat_template= "
                "(--chat-template FILE)"
            )

    def texts(self, row: Mapping[str, Any]) -> Texts | None:
        messages = self.messages(row)
        tools = row.get(self.names["tools"])
        if isinstance(tools, str):
            tools = _parsed(tools, "column 'tools'")
        try:
            template = self.tokenizer.get_chat_template(self.config.chat_template, tools)
        except ValueError as problem:
            raise Unusable(str(problem)) from problem
        options = {"chat_template": template, "tools": tools or None}
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise Unusable("no turn of the assistant: there is nothing to learn")
        whole = self._render(messages, options)
        self._check_complete(messages, whole, options)
        if self.config.train_on_prompt:
            return Texts((whole,), False, lambda tokens: _example(tokens[0], [(0, len(tokens[0]))]))
        last = self.config.turns == "last"
        if _MARKS.search(template):
            return Texts((), False, lambda _: self._marked(messages, options, last))
        return self._bounded(messages, turns[-1:] if last else turns, whole, options)

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages of a row with the names that templates use."""
        column = self.names[self.required[0]]
        if column not in row:
            raise Unusable(f"no column {column!r}, only {', '.join(map(repr, row))}{near(column, row)}")
        value = row[column]
        if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
            raise Unusable(f"column {column!r} is not a list of messages")
        if not value:
            raise Unusable(f"column {column!r} is empty")
        return [self._message(message, f"message {i}") for i, message in enumerate(value, 1)]

    def _message(self, message: Mapping[str, Any], what: str) -> dict[str, Any]:
        made = {key: value for key, value in message.items() if value is not None}  # Parquet fills keys up with null
        if unknown := sorted(made.keys() - self.keys):
            hint = near(unknown[0], self.keys)
            raise Unusable(f"{what} has {unknown[0]!r}{hint}, expected {self.role} and {self.content}")
        role = made.pop(self.role, None)
        if role not in self.roles:
            hint = near(role, self.roles) if isinstance(role, str) else ""
            raise Unusable(f"{what} has the {self.role} {role!r}{hint}, expected one of {', '.join(self.roles)}")
        if self.content in made:
            made["content"] = checked_text(made.pop(self.content), f"{self.content} of {what}")
        elif "tool_calls" not in made:
            raise Unusable(f"{what} has no {self.content}")
        return {"role": self.roles[role], **made}

    def _render(self, messages: list[dict[str, Any]], options: dict[str, Any], prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, **options)
        except (TemplateError, TypeError, KeyError) as problem:
            raise Unusable(f"the chat template refuses this conversation: {problem}") from problem

    def _check_complete(self, messages: list[dict[str, Any]], whole: str, options: dict[str, Any]) -> None:
        """A template may not know a role and leave its messages out without a word."""
        for i, message in enumerate(messages):
            content = message.get("content", "").strip()
            if message["role"] == "assistant" or content in whole:
                continue
            other = [*messages[:i], message | {"content": "?"}, *messages[i + 1 :]]
            if self._render(other, options) == whole:
                raise Unusable(f"the chat template leaves out message {i + 1}, of the {message['role']}")

    def _marked(self, messages: list[dict[str, Any]], options: dict[str, Any], last: bool) -> Example:
        made = self.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
        mask = np.asarray(made["assistant_masks"], bool)
        if not mask.any():
            raise Unusable("the chat template's generation marks enclose no token")
        if last:
            gaps = np.flatnonzero(~mask[: np.flatnonzero(mask)[-1]])
            mask[: gaps[-1] + 1 if len(gaps) else 0] = False
        return Example(np.asarray(made["input_ids"], np.int32), mask)

    def _bounded(
        self, messages: list[dict[str, Any]], turns: Sequence[int], whole: str, options: dict[str, Any]
    ) -> Texts:
        """The whole conversation, and it up to the start and the end of each turn."""
        texts = [whole]
        for i in turns:
            if i == 0:
                raise Unusable("the conversation begins with the assistant: there is no prompt to learn from")
            start = self._render(messages[:i], options, prompt=True)
            end = whole if i == len(messages) - 1 else self._render(messages[: i + 1], options)
            for text, what in ((start, "before"), (end, "after")):
                if not whole.startswith(text):
                    raise Unusable(_NO_PREFIX.format(what=what, turn=i + 1))
            texts += [start, end]

        def finish(tokens: Sequence[Sequence[int]]) -> Example:
            ids, *bounds = tokens
            spans, merged = [], False
            for i, (start, end) in zip(turns, zip(bounds[::2], bounds[1::2], strict=True), strict=True):
                first, last = shared(start, ids), shared(end, ids)
                # An answer that begins with white space may share its first token with the template's newline.
                if first < len(start) - 1 or last < len(end):
                    what = "before" if first < len(start) - 1 else "after"
                    raise Unusable(
                        f"the tokens {what} message {i + 1} change with what follows: the chat template has no special "
                        f"token there, and a mask would cut a token in two"
                    )
                merged |= first < len(start)
                spans.append((first, last))
            return _example(ids, spans, merged)

        return Texts(texts, False, finish)


_NO_PREFIX = (
    "the chat template renders what stands {what} message {turn} differently once more turns follow, so the "
    "assistant's tokens cannot be told apart: take a template with generation marks (--chat-template FILE), or "
    "turns='last' (--turns last)"
)


class ShareGpt(Messages):
    """A list of {"from": ..., "value": ...} in the column "conversations"."""

    required = ("conversations",)
    role, content = "from", "value"
    keys = frozenset(("from", "value"))
    roles = MappingProxyType(
        {
            "human": "user",
            "user": "user",
            "gpt": "assistant",
            "assistant": "assistant",
            "system": "system",
            "tool": "tool",
        }
    )


def _example(ids: Sequence[int], spans: Sequence[tuple[int, int]], merged: bool = False) -> Example:
    mask = np.zeros(len(ids), bool)
    for start, end in spans:
        mask[start:end] = True
    if not mask.any():
        raise Unusable("no token of the assistant: there is nothing to learn")
    return Example(np.asarray(ids, np.int32), mask, merged)


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise Unusable(f"{what} is no JSON: {problem.msg}") from None
