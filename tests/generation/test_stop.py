"""Stop strings: the text ends before the first of them, however tokens cut it, streamed or not, in every row."""

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.generation.generate import _cut
from jaxlm.generation.streaming import StopFilter, TextStream
from tests.generation.test_loop import LLAMA

PROMPTS = [np.array(p) for p in ([3, 5, 7], [8, 1], [6, 30, 12, 4])]
NEW = 24


class Words:
    """Every id is a piece of text; the pieces of "héé" and of "ab" cross the borders of tokens."""

    pieces = [b"ab", b"a", b"b", b" ", b"\xc3", b"\xa9", b"h\xc3", b"\xa9\xc3", b"c", b"dab"] + [
        bytes([ord("e") + i % 20]) for i in range(31)
    ]

    def decode(self, ids, **options):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def model():
    made = jaxlm.init(LLAMA, key=jax.random.key(3))
    made.__dict__["tokenizer"] = Words()
    return made


@pytest.fixture(scope="module")
def free(model):
    """What is drawn when nothing stops it, and its texts."""
    made = model.generate(PROMPTS, max_new_tokens=NEW, temperature=1.0, seed=4, details=True)
    return [one.tokens for one in made], [Words().decode(one.tokens) for one in made]


def cut(text: str, stops) -> str:
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return text[: min(ends)] if ends else text


def stops_of(text: str) -> list[tuple[str, ...]]:
    """Strings that begin and end inside tokens, at the start, in the middle, at the end, and nowhere."""
    return [(text[:1],), (text[5:8],), (text[-2:],), (text[12:14], text[4:9]), ("nowhere",)]


@pytest.mark.parametrize("which", range(5))
def test_text_ends_before_the_stop_string_in_every_row(model, free, which):
    tokens, texts = free
    stops = stops_of(texts[0])[which]
    made = model.generate(PROMPTS, max_new_tokens=NEW, temperature=1.0, seed=4, stop=stops, details=True)
    for one, ids, text in zip(made, tokens, texts, strict=True):
        assert one.text == cut(text, stops)
        hit = any(stop in text for stop in stops)
        assert one.finish == ("stop" if hit else "length")
        assert one.tokens.tolist() == ids[: len(one.tokens)].tolist()
        # The fewest tokens that hold the stop string.
        assert any(stop in Words().decode(one.tokens) for stop in stops) == hit
        assert not any(stop in Words().decode(one.tokens[:-1]) for stop in stops)
        assert len(one.logprobs) == len(one.tokens)


@pytest.mark.parametrize("which", range(5))
def test_streamed_text_is_the_same(model, which):
    alone = model.generate(PROMPTS[:1], max_new_tokens=NEW, temperature=1.0, seed=4, details=True)[0]
    text = Words().decode(alone.tokens)
    stops, pieces = stops_of(text)[which], []
    options = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 4, "stop": stops, "details": True}
    (made,) = model.generate(PROMPTS[:1], stream=pieces.append, **options)
    assert "".join(pieces) == made.text == cut(text, stops)
    assert made.finish == ("stop" if any(stop in text for stop in stops) else "length")
    (whole,) = model.generate(PROMPTS[:1], **options)
    assert (whole.text, whole.tokens.tolist()) == (made.text, made.tokens.tolist())


def test_a_stop_string_of_characters_that_tokens_cut():
    """h\xc3, \xa9\xc3, \xa9 is "héé"; it must be found, and no half of a character shown before it."""
    tokens = np.array([8, 6, 7, 5, 8])
    pieces: list[str] = []
    filtered = StopFilter(["éé"], pieces.append)
    stream = TextStream(Words(), filtered.put)
    for token in tokens.tolist():
        stream.put(token)
    stream.end()
    filtered.end()
    assert "".join(pieces) == "ch" and filtered.stopped
    assert _cut(tokens, (), ["éé"], Words()) == (4, "ch", "stop")
    # Inside a token: "éé" ends with the fourth one, "ab" begins in the middle of "dab".
    assert _cut(np.array([8, 9, 8]), (), ["ab"], Words()) == (2, "cd", "stop")


def test_what_might_become_a_stop_string_is_held_back_and_released():
    pieces: list[str] = []
    filtered = StopFilter(["STOP", "\n\n"], pieces.append)
    for piece in ("aS", "T", "OX", "\n", "b", "ST"):
        filtered.put(piece)
    assert pieces == ["a", "STOX", "\nb"]
    filtered.end()
    assert "".join(pieces) == "aSTOX\nbST" and not filtered.stopped


def test_nothing_comes_after_a_stop_string():
    pieces: list[str] = []
    filtered = StopFilter(["b"], pieces.append)
    for piece in ("ab", "c", "d"):
        filtered.put(piece)
    filtered.end()
    assert pieces == ["a"] and filtered.stopped


def test_eos_before_a_stop_string_wins(model, free):
    tokens, texts = free
    eos = int(tokens[0][3])
    n = tokens[0].tolist().index(eos)
    late = texts[0][len(Words().decode(tokens[0][: n + 1])) :][2:5]
    (made,) = model.generate(
        PROMPTS, max_new_tokens=NEW, temperature=1.0, seed=4, stop=[late + "never"], eos=eos, details=True
    )[:1]
    assert made.finish == "eos" and made.tokens.tolist() == tokens[0][: n + 1].tolist()
    assert made.text == Words().decode(tokens[0][:n])


def test_samples_stop_each_for_itself(model):
    options = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 1, "samples": 3, "details": True}
    (whole,) = model.generate(PROMPTS[:1], **options)
    texts = [Words().decode(one.tokens) for one in whole]
    stop = texts[1][6:8]
    (made,) = model.generate(PROMPTS[:1], stop=stop, **options)
    assert [one.text for one in made] == [cut(text, [stop]) for text in texts]


def test_bad_input(model):
    for stop in ("", ["a", ""], [3]):
        with pytest.raises(ValueError, match="expected strings that are not empty"):
            model.generate(PROMPTS, stop=stop, max_new_tokens=2)
    with pytest.raises(ValueError, match="it has no tokenizer"):
        jaxlm.init(LLAMA).generate(PROMPTS, stop="a", max_new_tokens=2)
