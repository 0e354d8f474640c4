"""RWKV's tokenizers: World token for token as the package `rwkv` has it, and its vocabulary's file checked."""

import importlib.util
import json
import random
import types
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from jaxlm.checkpoints import rwkv_tokenizer
from jaxlm.checkpoints.rwkv_tokenizer import END_OF_TEXT, PILE, WORLD, load, locate, vocabulary, world
from jaxlm.data.cache import fingerprint
from jaxlm.data.prepare import load_tokenizer
from jaxlm.generation.streaming import TextStream
from tests.checkpoints.texts import texts
from tests.conftest import packaged

TOKENS = {b"ab": 257, b"abc": 258, b"abcde": 259, "é".encode(): 260, "é".encode()[:1] + b"x": 262, b"\n\n": 299}


def lines(tokens: dict[bytes, int]) -> list[str]:
    """As the published file has them: text where a token is text, else bytes."""

    def literal(token: bytes) -> str:
        try:
            return repr(token.decode())
        except UnicodeDecodeError:
            return repr(token)

    return [f"{i} {literal(token)} {len(token)}" for token, i in tokens.items()]


SINGLE = {bytes([i]): i + 1 for i in range(256)}


def write_vocabulary(directory: Path, tokens: dict[bytes, int] = TOKENS, end: str = "\n") -> Path:
    path = directory / WORLD
    path.write_bytes("".join(line + end for line in lines(SINGLE | tokens)).encode())
    return path


def longest(raw: bytes, ids: dict[bytes, int]) -> list[int]:
    """The rule, spelt out."""
    found, most = [], max(map(len, ids))
    while raw:
        token = next(raw[:n] for n in range(min(most, len(raw)), 0, -1) if raw[:n] in ids)
        found.append(ids[token])
        raw = raw[len(token) :]
    return found


# The published vocabulary


@pytest.fixture(scope="module")
def published():
    path = packaged("rwkv", WORLD)
    return path, world(path)


@pytest.fixture(scope="module")
def reference(published):
    """rwkv/rwkv_tokenizer.py of the package, which is 100 lines without imports."""
    spec = importlib.util.spec_from_file_location("rwkv_tokenizer_reference", published[0].parent / "rwkv_tokenizer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TRIE_TOKENIZER(str(published[0]))


def test_world_equals_the_reference(published, reference):
    _, ours = published
    chance, tokens = random.Random(0), list(reference.idx2token.values())
    some = lambda: b"".join(chance.choice(tokens) for _ in range(chance.randint(1, 6))).decode(errors="ignore")
    strings = [text + some() for text in texts(2000, ["User: ", "\n\nAssistant:", "<s>"])] + [
        "",
        "\x00",
        "a" * 5000,
        " " * 5000,
    ]
    for text, ids in zip(strings, ours(strings)["input_ids"], strict=True):
        assert ids == reference.encode(text), text
        assert ours.decode(ids) == text


def test_decoding_equals_the_reference(published, reference):
    """Any ids: bytes that are no UTF-8 become U+FFFD, as in Python; and a stream says the same, piece by piece."""
    _, ours = published
    chance = random.Random(1)
    for _ in range(300):
        ids = [chance.choice((chance.randrange(1, 257), chance.randrange(1, 65530))) for _ in range(12)]
        expected = reference.decodeBytes(ids).decode("utf-8", errors="replace")
        assert ours.decode(ids) == expected
    pieces: list[str] = []
    stream = TextStream(ours, pieces.append)
    text = "".join(texts(40, [""]))
    for byte in text.encode():
        stream.put(byte + 1)  # a token for each byte
    stream.end()
    assert "".join(pieces) == text and len(pieces) > 500


def test_special_token_and_ids_that_are_none(published):
    _, ours = published
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.eos_token) == (0, 0, 0, END_OF_TEXT)
    assert ours(f"a{END_OF_TEXT}a")["input_ids"] == [98, 0, 98]
    assert ours.decode([0, 98, 65533, 98], skip_special_tokens=True) == "aa"
    assert max(ours.get_vocab().values()) == 65529 and len(ours.get_vocab()) == 65530


# The rule


def test_the_longest_token_over_any_bytes():
    """Random vocabularies over few letters, so that branches end and go on everywhere; also bytes that are no UTF-8."""
    chance = random.Random(2)
    for _ in range(60):
        alphabet = "ab.ÃĠ\\"[: chance.randint(2, 6)]
        words = ("".join(chance.choice(alphabet) for _ in range(chance.randint(2, 6))) for _ in range(12))
        ids = {word: i for i, word in enumerate(dict.fromkeys([*alphabet, *words]))}
        split = pre_tokenizers.Split(Regex(rwkv_tokenizer._longest(ids)), behavior="isolated")
        pipeline = Tokenizer(models.WordLevel(ids, unk_token=""))
        pipeline.pre_tokenizer = split  # pyright: ignore
        text = "".join(chance.choice(alphabet) for _ in range(80))
        expected = longest(text.encode(), {word.encode(): i for word, i in ids.items()})
        assert pipeline.encode(text).ids == expected, (ids, text)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_small_vocabulary(tmp_path, end):
    path = write_vocabulary(tmp_path, end=end)
    ids = vocabulary(path)
    assert ids == SINGLE | TOKENS
    ours = world(path)
    for text in ("abcdabcde", "abcab", "", "é\n\nèÃx", "\n\n\n"):
        assert ours(text)["input_ids"] == longest(text.encode(), ids)
        assert ours.decode(ours(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("300 'ab' 2", "the token b'ab' is that of line 257"),
        ("257 'xy' 2", "id 257 is that of line 257"),
        ("300 'xy' 3", "the token b'xy' has 2 bytes, not 3"),
        ("300 'é' 1", "has 2 bytes, not 1"),
        ("0 'xy' 2", "expected an id from 1 on"),
        ("-1 'xy' 2", "expected an id from 1 on"),
        ("300 '' 0", "a token of 1 to 512 bytes"),
        ("300 'x' * 2 2", "expected `id 'token' bytes`"),
        ("300 __import__('os').system('true') 2", "expected `id 'token' bytes`"),
        ("300 ['x'] 1", "expected an id from 1 on and a token"),
        ("300 'x", "expected `id 'token' bytes`"),
        ("300", "expected `id 'token' bytes`"),
        ("x 'xy' 2", "expected `id 'token' bytes`"),
        ("300 '\\ud800' 3", "expected `id 'token' bytes`"),
        ("300 " + "(" * 9999 + " 2", "expected `id 'token' bytes`"),
        (f"300 {'x' * 600!r} 600", "a token of 1 to 512 bytes"),
    ],
)
def test_vocabularies_that_are_refused(tmp_path, line, expected):
    path = write_vocabulary(tmp_path)
    at = len(SINGLE | TOKENS) + 1
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    with pytest.raises(ValueError) as caught:
        vocabulary(path)
    assert f"{path}, line {at}: " in str(caught.value) and expected in str(caught.value)


def test_a_byte_that_no_token_has(tmp_path):
    path = tmp_path / WORLD
    path.write_text("\n".join(line for line in lines(SINGLE) if not line.startswith("66 ")))
    with pytest.raises(ValueError, match="byte 65 is no token of its own"):
        vocabulary(path)
    path.write_bytes(b"1 '\xff' 1")
    with pytest.raises(ValueError, match="line 1: expected"):
        vocabulary(path)


# Files around it


def test_settings_of_the_published_files(tmp_path):
    """Token 0 has many names; what the config calls eos is not a new token, as the published Python makes it."""
    path = write_vocabulary(tmp_path)
    named = {"added_tokens_decoder": {"0": {"content": "<s>"}}, "eos_token": "\n\n", "bos_token": "<x>"}
    for config, name in (
        (named, "<s>"),
        ({"bos_token": {"content": "<x>"}}, "<x>"),
        ({"bos_token": None}, END_OF_TEXT),
    ):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(config | {"chat_template": "{{ messages[0].content }}"})
        )
        ours = world(path)
        assert (ours.bos_token, ours.eos_token, ours.eos_token_id, len(ours)) == (
            name,
            name,
            0,
            len(SINGLE | TOKENS) + 1,
        )
        assert ours(f"a\n\n{name}")["input_ids"] == [98, 299, 0]
    made = ours.apply_chat_template([{"role": "user", "content": "abc"}], return_dict=True)
    assert made["input_ids"] == [258]
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}b")
    assert world(path).apply_chat_template([{"role": "user", "content": "a"}], return_dict=True)["input_ids"] == [257]


def test_saved_as_a_directory_that_transformers_reads(tmp_path):
    (tmp_path / "out").mkdir()
    ours = world(write_vocabulary(tmp_path))
    ours.save_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = f"abcdé\n\n{END_OF_TEXT}"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"] == [258, 101, 260, 299, 0]
    assert theirs.decode(theirs(text)["input_ids"]) == text and theirs.eos_token_id == 0
    assert fingerprint(theirs) == fingerprint(ours)


def pile(path: Path, count: int = 300) -> Path:
    ids = {"<|endoftext|>": 0, **{chr(0x4E00 + i): i for i in range(1, count)}}
    made = Tokenizer(models.WordLevel(ids, unk_token="<|endoftext|>"))
    made.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")  # pyright: ignore
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(path))
    return path


def test_which_file(tmp_path, monkeypatch):
    absent = lambda name: None
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(
        FileNotFoundError, match=rf"put {WORLD} there, install the package that has it.*--tokenizer PATH"
    ):
        locate(tmp_path, 65536)
    with pytest.raises(
        FileNotFoundError,
        match=rf"put {PILE} or another tokenizer.json there, or .*--tokenizer PATH.*and this has 50277",
    ):
        locate(tmp_path, 50277)
    installed = tmp_path / "installed"
    installed.mkdir()
    write_vocabulary(installed)
    spec = types.SimpleNamespace(submodule_search_locations=[str(installed)])
    monkeypatch.setattr(importlib.util, "find_spec", {"rwkv": spec}.get)
    assert locate(tmp_path, 65536) == installed / WORLD
    with pytest.raises(FileNotFoundError):
        locate(tmp_path, 300)
    write_vocabulary(tmp_path)
    assert locate(tmp_path, 300) == locate(tmp_path, 65536) == tmp_path / WORLD
    pile(tmp_path / PILE)
    assert locate(tmp_path, 65536) == tmp_path / WORLD and locate(tmp_path, 50277) == tmp_path / PILE
    (tmp_path / "tokenizer.json").write_text("{}")
    assert locate(tmp_path, 65536) == tmp_path / "tokenizer.json"


def test_tokenizers_of_the_pile(tmp_path):
    ours = load(pile(tmp_path / PILE), 300)
    assert ours("\u4e01\u4e02<|endoftext|>")["input_ids"] == [1, 2, 0]
    assert (ours.bos_token_id, ours.eos_token_id) == (0, 0)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "\u4e03", "chat_template": "{{ messages[0].content }}"}'
    )
    assert load(tmp_path / PILE).chat_template and load(tmp_path / PILE).eos_token_id == 0
    assert load(pile(tmp_path / "tokenizer.json")).eos_token_id == 3
    for path in (tmp_path / PILE, write_vocabulary(tmp_path)):
        with pytest.raises(ValueError, match=r"tokens up to id 299, the model a vocabulary of 299"):
            load(path, 299)


def test_as_the_tokenizer_of_data(tmp_path):
    assert load_tokenizer(str(write_vocabulary(tmp_path)))("abc")["input_ids"] == [258]
    assert load_tokenizer(str(pile(tmp_path / PILE)))("\u4e01")["input_ids"] == [1]
