"""`jaxlm chat`: a conversation in the terminal, or one message per line of a pipe."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Annotated, Any

from jaxlm.cli.console import (
    Dtype,
    IgnoreFields,
    IgnoreGenerationFields,
    Option,
    Source,
    Tokenizer,
    err,
    load,
    out,
    rates,
)

HELP = """/reset forgets the conversation   /exit or Ctrl-D leaves   /help shows this   Ctrl-C stops an answer"""


@dataclasses.dataclass
class Conversation:
    """The messages so far, and their tokens as the model has seen them."""

    model: Any
    system: str | None = None
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    text: str = ""  # the messages as the template renders them, answers included
    ids: list[int] = dataclasses.field(default_factory=list)  # their tokens, answers as they were drawn

    def __post_init__(self):
        if self.model.tokenizer.chat_template is None:
            raise ValueError("this checkpoint has no chat template: use `jaxlm generate` for plain text")
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.text, self.ids = "", []

    def ask(self, message: str) -> list[int]:
        """Adds a message, and gives the tokens up to where its answer begins.

        The tokens of the turns before stay what the model has read and drawn, since the text of an answer may have
        other tokens when it is read again; only a template that rewrites earlier turns makes all of them anew.
        """
        import jinja2

        self.messages.append({"role": "user", "content": message})
        tokenizer = self.model.tokenizer
        try:
            rendered = tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as problem:
            raise ValueError(f"the checkpoint's chat template refuses this conversation: {problem}") from problem
        known, ids = (self.text, self.ids) if self.ids and rendered.startswith(self.text) else ("", [])
        self.ids = ids + tokenizer(rendered[len(known) :], add_special_tokens=False)["input_ids"]
        self.text = rendered
        return self.ids

    def answered(self, text: str, made: Any = None) -> None:
        """Adds the answer; without its Generation, its tokens are not known."""
        self.messages.append({"role": "assistant", "content": text})
        if made is None:
            self.text, self.ids = "", []
            return
        # The EOS is left to the template: it is read together with what follows, which may depend on it.
        drawn = made.tokens[:-1] if made.finish == "eos" else made.tokens
        self.ids, self.text = [*self.ids, *drawn.tolist()], self.text + text

    def take_back(self) -> None:
        """Removes the last message, which was not answered."""
        self.messages.pop()
        self.text, self.ids = "", []


def chat(
    source: Source,
    /,
    *,
    system: Annotated[str | None, Option(metavar="TEXT", help="the system message")] = None,
    max_new_tokens: Annotated[int, Option(metavar="N", help="the longest answer, in tokens")] = 512,
    temperature: Annotated[float | None, Option(metavar="T", help="0 takes the likeliest token each time")] = None,
    top_k: Annotated[int | None, Option(metavar="K", help="draw from the K likeliest tokens; 0 is off")] = None,
    top_p: Annotated[float | None, Option(metavar="P", help="draw from the likeliest tokens that sum to P")] = None,
    min_p: Annotated[float | None, Option(metavar="P", help="drop tokens below P times the likeliest one")] = None,
    repetition_penalty: Annotated[float | None, Option(metavar="R", help="above 1 disfavours tokens seen")] = None,
    seed: Annotated[int, Option(metavar="N", help="of the random draws")] = 0,
    dtype: Annotated[Dtype, Option(metavar="DTYPE", help="to compute in: float32, bfloat16 or float16")] = None,
    tokenizer: Tokenizer = None,
    ignore_fields: IgnoreFields = (),
    ignore_generation_fields: IgnoreGenerationFields = (),
) -> int:
    """Talks with a model through its chat template; what was said stays in its cache from turn to turn.

    Reads one message per line, also from a pipe. /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops
    an answer. What no option gives comes from the checkpoint's generation_config.json.

    Example: jaxlm chat SmolLM2.gguf --system "Answer in one sentence." --temperature 0.7
    """
    model = load(source, dtype, ignore_fields, tokenizer)
    session = model.session(
        max_new_tokens=max_new_tokens,
        seed=seed,
        ignore_fields=ignore_generation_fields,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    conversation = Conversation(model, system)
    interactive = sys.stdin.isatty()
    if interactive:
        note(HELP)
    for message in messages(interactive):
        if message == "/exit":
            break
        if message == "/reset":
            conversation.reset()
            note("the conversation is empty")
        elif message == "/help":
            note(HELP)
        elif message.startswith("/") and " " not in message:
            complain(f"no command {message!r}: expected /reset, /exit or /help", interactive)
        else:
            try:
                answer(conversation, session, message, max_new_tokens)
            except ValueError as problem:
                conversation.take_back()
                complain(str(problem), interactive)
    return 0


def answer(conversation: Conversation, session: Any, message: str, max_new_tokens: int) -> None:
    """One turn: streams the answer, and says how fast it was."""
    model, pieces = conversation.model, []
    ids = conversation.ask(message)
    room = session.context - len(ids)
    if room < 1:
        raise ValueError(
            f"the conversation has {len(ids)} tokens and fills the model's context of {session.context}: "
            "/reset starts a new one"
        )

    def write(piece: str) -> None:
        pieces.append(piece)
        out.file.write(piece)
        out.file.flush()

    try:
        made = session.answer(ids, min(max_new_tokens, room), tokenizer=model.tokenizer, emit=write)
    except KeyboardInterrupt:
        out.file.write("\n")
        note("stopped")
        # What was said stays said; without a word of answer the question goes, too.
        if pieces:
            conversation.answered("".join(pieces))
        else:
            conversation.take_back()
        return
    out.file.write("\n")
    out.file.flush()
    conversation.answered(made.text, made)
    note(f"{rates(made)}; {session.reused} tokens reused")


def messages(interactive: bool) -> Iterator[str]:
    """The lines that are not empty, from a prompt or a pipe."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history for input)
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # a line given up
            print()
            continue
        if not line and not interactive:
            return
        if line.strip():
            yield line.strip()


def complain(message: str, interactive: bool) -> None:
    """A mistake ends a pipe; at a prompt it can be corrected."""
    if not interactive:
        raise ValueError(message)
    err.print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
