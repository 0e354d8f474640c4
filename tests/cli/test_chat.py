"""`jaxlm chat`: turns through the template, the cache between them, commands, and what interrupts them."""

import io
import itertools
import re

import numpy as np
import pytest

import jaxlm
from jaxlm.cli.chat import Conversation
from jaxlm.generation.session import Session

OPTIONS = ("--max-new-tokens", 6, "--temperature", 0)


@pytest.fixture
def talk(cli, tiny, monkeypatch):
    """Runs the command on lines of a pipe."""

    def run(text: str, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return cli("chat", tiny, *(options or OPTIONS))

    return run


@pytest.fixture
def terminal(cli, tiny, monkeypatch):
    """Runs the command at a prompt; an exception among the lines is raised where it stands."""

    def run(*lines):
        feed = itertools.chain(lines, [EOFError()])

        def read(prompt: str) -> str:
            line = next(feed)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
        return cli("chat", tiny, *OPTIONS)

    return run


def expected(model, *questions, system=None) -> list[str]:
    """What `generate` answers to each question, with all turns before it."""
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answers.append(model.generate(chat=messages, max_new_tokens=6, temperature=0))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_each_line_is_a_turn_and_the_cache_is_reused(talk, tiny):
    code, out, err = talk("abc\n\n  de \n")
    assert code == 0
    first = expected(jaxlm.load(tiny), "abc")[0]
    assert out.startswith(first + "\n")
    # <user>abc<assistant> is 20 bytes; the last of 6 tokens drawn is not yet in the cache.
    assert [int(n) for n in re.findall(r"(\d+) tokens reused", err)] == [0, 25]
    # That token and <user>de<assistant>.
    assert [int(n) for n in re.findall(r"(\d+) prompt tokens at [\d.]+/s, 6 new at [\d.]+/s", err)] == [20, 20]


def test_the_second_answer_knows_the_first(tiny):
    """Drawn tokens stay as they are: the tiny model draws bytes that are no text, which no tokenizer gives back."""
    model = jaxlm.load(tiny)
    conversation, session = Conversation(model), model.session(max_new_tokens=6, temperature=0)
    one = session.answer(conversation.ask("abc"), 6, tokenizer=model.tokenizer)
    conversation.answered(one.text, one)
    ids = conversation.ask("de")
    encode = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [*encode("<user>abc<assistant>"), *one.tokens.tolist(), *encode("<user>de<assistant>")]
    two = session.answer(ids, 6, tokenizer=model.tokenizer)
    assert two.tokens.tolist() == model.generate([ids], max_new_tokens=6, temperature=0)[0].tolist()


def test_eos_comes_once(tiny):
    """The template writes it after the answer, so the one drawn is not added to it."""
    model = jaxlm.load(tiny)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    conversation = Conversation(model)
    first = conversation.ask("ab")
    eos = model.tokenizer(";")["input_ids"][0]
    made = type("Made", (), {"tokens": np.array([5, eos]), "finish": "eos"})
    conversation.answered(model.tokenizer.decode([5]), made)
    assert conversation.ask("c") == [*first, 5, eos, *model.tokenizer("c;")["input_ids"]]


def test_a_template_that_rewrites_the_past_is_followed(tiny):
    model = jaxlm.load(tiny)
    model.tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    conversation = Conversation(model)
    conversation.ask("ab")
    conversation.answered("x", type("Made", (), {"tokens": np.array([5]), "finish": "length"}))
    assert conversation.ask("c") == model.tokenizer("3abxc")["input_ids"]


@pytest.mark.slow
def test_system_message_and_reset(talk, tiny):
    model = jaxlm.load(tiny)
    want = expected(model, "abc", system="S")[0] + "\n"
    code, out, err = talk("abc\n/reset\nabc\n/exit\nunread\n", *OPTIONS, "--system", "S")
    assert (code, out) == (0, want * 2)
    assert "the conversation is empty" in err and "25 tokens reused" not in err


def test_help_and_an_unknown_command_at_a_prompt(terminal):
    code, out, err = terminal("/help", "/rest", KeyboardInterrupt(), "abc")
    assert code == 0 and out.count("\n") == 3  # the line given up, the answer, Ctrl-D
    assert err.count("/reset forgets") == 2 and "error: no command '/rest': expected /reset, /exit or /help" in err
    assert "6 new" in err


@pytest.mark.slow
def test_interrupting_an_answer_keeps_what_was_said(terminal, monkeypatch):
    whole, calls, seen = Session.answer, [], []

    def answer(self, ids, limit, *, tokenizer, emit):
        calls.append(list(ids))
        seen.append(tokenizer.decode(ids))
        if len(calls) == 2:
            raise KeyboardInterrupt  # before a word
        if len(calls) == 3:
            emit("some")
            raise KeyboardInterrupt
        return whole(self, ids, limit, tokenizer=tokenizer, emit=emit)

    monkeypatch.setattr(Session, "answer", answer)
    code, _, err = terminal("a", "b", "c", "d")
    assert code == 0 and err.count("stopped") == 2
    assert seen[2].endswith("<user>c<assistant>") and "<user>b" not in seen[2]
    assert seen[3].endswith("<user>c<assistant>some<user>d<assistant>")
    assert [int(n) for n in re.findall(r"(\d+) tokens reused", err)] == [0, 0]


def test_a_full_context_is_told_and_reset_helps(terminal):
    code, out, err = terminal("x" * 300, "/reset", "abc")
    assert code == 0 and "fills the model's context of 256: /reset starts a new one" in err
    assert "6 new" in err and len(out) > 1


def test_the_answer_is_cut_where_the_context_ends(talk):
    code, _, err = talk("x" * 235 + "\n")  # 252 tokens in all
    assert code == 0 and "252 prompt tokens" in err and ", 4 new" in err


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("x" * 300, (), "the conversation has 317 tokens and fills the model's context of 256"),
        ("/rest\n", (), "no command '/rest'"),
        ("abc\n", ("--max-new-tokens", 0), "max_new_tokens=0"),
        ("abc\n", ("--temperature", -1), "temperature=-1"),
        ("abc\n", ("--temperature", 1, "--top-p", 1.5), "top_p=1.5"),
    ],
)
def test_bad_input(talk, text, options, message):
    code, out, err = talk(text, *options)
    assert code == 2 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_templates_that_are_missing_or_refuse(tiny):
    model = jaxlm.load(tiny)
    model.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match="template refuses this conversation: no system role"):
        Conversation(model, "S").ask("a")
    model.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Conversation(model)
