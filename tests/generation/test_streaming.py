"""Text out of ids: nothing is lost, doubled or broken, whatever the tokens cut."""

import itertools

import pytest

from jaxlm.generation.streaming import TextStream


class Bytes:
    """One id per byte, as byte-level and byte-fallback tokenizers may produce."""

    def decode(self, ids, **options):
        return bytes(ids).decode("utf-8", errors="replace")


class Words:
    """A decoder that puts a space before every word but the first, as SentencePiece's does."""

    words = ("alpha", "beta", "gamma")

    def decode(self, ids, **options):
        return " ".join(self.words[i] for i in ids)


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語のテキスト", "👩‍👩‍👧 family", "mixed ü and 字 and 🙂"])
def test_characters_of_several_tokens_come_whole(text):
    pieces = []
    stream = TextStream(Bytes(), pieces.append)
    for byte in text.encode():
        stream.put(byte)
    stream.end()
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(text)  # each character as soon as it is complete


def test_spaces_between_tokens_are_kept():
    pieces = []
    stream = TextStream(Words(), pieces.append)
    for i in (0, 1, 2, 1):
        stream.put(i)
    stream.end()
    assert pieces == ["alpha", " beta", " gamma", " beta"]


def test_a_character_cut_off_at_the_end_is_shown_as_such():
    pieces = []
    stream = TextStream(Bytes(), pieces.append)
    for byte in "a字".encode()[:-1]:
        stream.put(byte)
    stream.end()
    assert pieces == ["a", "\ufffd"]


def test_a_real_replacement_character_is_not_held_back_for_ever():
    pieces = []
    stream = TextStream(Bytes(), pieces.append)
    for byte in "a\ufffdb".encode():
        stream.put(byte)
    stream.end()
    assert "".join(pieces) == "a\ufffdb"


def test_every_prefix_is_a_prefix_of_the_text():
    text = "é" * 5 + "🙂" * 3
    pieces = []
    stream = TextStream(Bytes(), pieces.append)
    for byte in text.encode():
        stream.put(byte)
    stream.end()
    assert all(text.startswith(part) for part in itertools.accumulate(pieces))
