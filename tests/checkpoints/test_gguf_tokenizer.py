"""Tokenizers rebuilt from GGUF metadata: token for token those of transformers and of SentencePiece."""

import io
import random
import re
import struct
import unicodedata

import numpy as np
import pytest
import sentencepiece
import transformers
from tokenizers import pre_tokenizers

from jaxlm.checkpoints.gguf import GgufFile
from jaxlm.checkpoints.gguf_tokenizer import BYTE, CONTROL, NORMAL, PRE, SPACE, UNKNOWN, USER_DEFINED, tokenizer
from tests.checkpoints.texts import CODE, WORDS, texts

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|im_end|>\n"},
    {"role": "assistant", "content": "Hello! "},
    {"role": "user", "content": "Why is the sky blue?"},
]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    file = GgufFile(smollm2_gguf)
    return file.metadata, tokenizer(file.metadata)


@pytest.fixture(scope="module")
def gemma3(gemma3_gguf):
    file = GgufFile(gemma3_gguf)
    return file.metadata, tokenizer(file.metadata)


def added(ours) -> list[str]:
    return [token.content for token in ours.added_tokens_decoder.values()]


def assert_same(ids: list[list[int]], expected: list[list[int]], strings: list[str]) -> None:
    wrong = [i for i, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b]
    first = wrong[0] if wrong else 0
    assert not wrong, f"{len(wrong)} of {len(strings)} differ, first {strings[first]!r}: {ids[first]} {expected[first]}"


def theirs(path, name: str):
    """transformers' tokenizer of the file. AutoTokenizer gives the same one, after 10 s more on the model's config."""
    return getattr(transformers, name).from_pretrained(path.parent, gguf_file=path.name)


# The real files


@pytest.mark.slow
@pytest.mark.torch
def test_smollm2_equals_transformers(smollm2, smollm2_gguf):
    _, ours = smollm2
    reference = theirs(smollm2_gguf, "TokenizersBackend")
    strings = texts(10_000, added(ours))
    ids = ours(strings)["input_ids"]
    without = [i for i, text in enumerate(strings) if not any(unicodedata.category(c)[0] == "N" for c in text)]
    assert len(without) > 2_000
    expected = reference([strings[i] for i in without])["input_ids"]
    assert_same([ids[i] for i in without], expected, [strings[i] for i in without])
    # transformers' GGUF tokenizer lacks a step of SmolLM2's own: every digit is set apart, which also decides where the
    # white space before it is cut ("\n\n1"). With that step they agree everywhere.
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = reference.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    assert_same(ids, reference(strings)["input_ids"], strings)
    assert ours.special_tokens_map == reference.special_tokens_map
    for prompt in (True, False):
        render = lambda t, prompt=prompt: t.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert render(ours) == render(reference)


@pytest.mark.slow
@pytest.mark.torch
def test_gemma3_equals_transformers(gemma3, gemma3_gguf):
    _, ours = gemma3
    reference = theirs(gemma3_gguf, "GemmaTokenizer")
    strings = texts(10_000, added(ours))
    assert_same(ours(strings)["input_ids"], reference(strings)["input_ids"], strings)
    assert ours.added_tokens_decoder == reference.added_tokens_decoder
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    assert [getattr(ours, name) for name in names] == [getattr(reference, name) for name in names]


def test_smollm2_round_trip(smollm2):
    metadata, ours = smollm2
    strings = texts(10_000, added(ours), seed=1)
    # The vocabulary has no token for some control characters; SmolLM2's own tokenizer drops them, too.
    letters = {byte: letter for letter, byte in transformers.convert_slow_tokenizer.bytes_to_unicode().items()}
    letters = dict(zip(letters.values(), letters, strict=True))
    known = set(metadata["tokenizer.ggml.tokens"])
    dropped = "".join(chr(byte) for byte in range(128) if letters[byte] not in known)
    strings = [re.sub(f"[{re.escape(dropped)}]", "", text) for text in strings]
    ids = ours(strings)["input_ids"]
    whole = [all(letters[byte] in known for byte in text.encode()) for text in strings]
    assert sum(whole) > 9_000
    for text, tokens, complete in zip(strings, ids, whole, strict=True):
        if complete:
            assert ours.decode(tokens) == text


@pytest.mark.slow
def test_gemma3_round_trip(gemma3):
    _, ours = gemma3
    strings = texts(10_000, added(ours), seed=1)
    decoded = ours.batch_decode(ours(strings)["input_ids"])
    assert decoded == ["<bos>" + text.replace(SPACE, " ") for text in strings]
    assert ours.decode(ours("<start_of_turn>hi<end_of_turn>")["input_ids"], skip_special_tokens=True) == "hi"


def test_smollm2_special_tokens_and_chat(smollm2):
    metadata, ours = smollm2
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.unk_token_id) == (1, 2, 2, 0)
    assert len(ours) == ours.vocab_size == len(metadata["tokenizer.ggml.tokens"])
    assert ours("<|im_start|>user")["input_ids"] == [1, 4093]
    assert ours.padding_side == "left"
    assert ours.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_saved_tokenizer_is_the_same(smollm2, tmp_path):
    _, ours = smollm2
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    strings = texts(500, added(ours), seed=2)
    assert_same(saved(strings)["input_ids"], ours(strings)["input_ids"], strings)
    assert saved.special_tokens_map == ours.special_tokens_map
    assert saved.chat_template == ours.chat_template


def test_several_chat_templates(smollm2):
    metadata, _ = smollm2
    more = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools"}
    templates = tokenizer(metadata | more).chat_template
    assert templates == {"default": metadata["tokenizer.chat_template"], "tool_use": "tools"}


# SentencePiece as the reference: its own encoder on the same vocabulary


def sentencepiece_model(tokens, scores, kinds, unknown: int, prefix: bool) -> bytes:
    """The protocol buffer of a BPE model with byte fallback and nothing normalised."""

    def varint(n: int) -> bytes:
        n %= 2**64
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def field(number: int, value) -> bytes:
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        if isinstance(value, int):
            return varint(number << 3) + varint(int(value))
        raw = value.encode() if isinstance(value, str) else value
        return varint(number << 3 | 2) + varint(len(raw)) + raw

    pieces = zip(tokens, scores, kinds, strict=True)
    trainer = field(3, 2) + field(35, 1) + field(40, unknown) + b"".join(field(i, -1) for i in (41, 42, 43))
    normalizer = field(1, "identity") + field(3, int(prefix)) + field(4, 0) + field(5, 1)
    return (
        b"".join(field(1, field(1, t) + field(2, float(s)) + field(3, int(k))) for t, s, k in pieces)
        + field(2, trainer + field(45, tokens[unknown]))
        + field(3, normalizer)
    )


@pytest.mark.slow
def test_gemma3_equals_sentencepiece(gemma3):
    metadata, ours = gemma3
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    unknown = metadata["tokenizer.ggml.unknown_token_id"]
    visible = [
        token.replace(" ", SPACE) if kind == USER_DEFINED else token
        for token, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=True)
    ]
    kinds[unknown] = UNKNOWN
    model = sentencepiece_model(visible, metadata["tokenizer.ggml.scores"].tolist(), kinds, unknown, prefix=False)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    user = [token for token, kind in zip(visible, kinds, strict=True) if kind == USER_DEFINED]
    # Not compared: control tokens, which SentencePiece does not look for in text; and runs of more than 31 spaces, the
    # longest token, which merges (as in all of Hugging Face's Gemma tokenizers) cut elsewhere than SentencePiece.
    strings = [t for t in texts(10_000, user, seed=3) if "<unused" not in t and " " * 32 not in t and "\0" not in t]
    strings = [t for t in strings if SPACE * 16 not in t.replace(" ", SPACE) or SPACE not in t]
    assert len(strings) > 8_000
    assert_same(ours(strings, add_special_tokens=False)["input_ids"], reference.encode(strings), strings)


@pytest.fixture(scope="module")
def trained():
    """A small SentencePiece model with the settings of Llama 2, and the metadata that llama.cpp's converter writes."""
    rng = random.Random(0)
    words = WORDS + [word for code in CODE for word in code.split()]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choice(words) for _ in range(12)) for _ in range(3_000)),
        model_writer=out,
        vocab_size=900,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        user_defined_symbols=["<|tool|>"],
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    kind = lambda i: (
        UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i) else BYTE if model.is_byte(i) else
        USER_DEFINED if model.id_to_piece(i) == "<|tool|>" else NORMAL
    )  # fmt: skip
    ids = range(model.vocab_size())
    return model, {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array([kind(i) for i in ids], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_llama_equals_sentencepiece(trained):
    model, metadata = trained
    ours = tokenizer(metadata)
    strings = [text for text in texts(10_000, [" "], seed=4) if "\0" not in text]
    ids = ours(strings, add_special_tokens=False)["input_ids"]
    assert_same(ids, model.encode(strings), strings)
    assert ours.batch_decode(ids) == [text.replace(SPACE, " ") for text in strings]
    assert ours("  hi")["input_ids"] == [1, *model.encode("  hi")]


def test_ends_are_added_as_the_file_says(trained):
    _, metadata = trained
    plain = tokenizer(metadata)("hi", add_special_tokens=False)["input_ids"]
    for bos, eos in ((True, True), (False, True), (False, False)):
        flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
        ours = tokenizer(metadata | flags)
        assert ours("hi")["input_ids"] == [1] * bos + plain + [2] * eos
        assert ours("hi", "hi")["input_ids"] == 2 * ([1] * bos + plain + [2] * eos)
    assert tokenizer(metadata)("hi")["input_ids"] == [1, *plain]  # llama.cpp's default for SentencePiece


def test_gemma_never_has_a_space_prefix(trained):
    """Its first files do not say so."""
    ours = tokenizer({**trained[1], "general.architecture": "gemma"})
    assert ours.decode(ours("the", add_special_tokens=False)["input_ids"]) == "the"
    assert ours.tokenize("the")[0] != SPACE + "the"


def test_special_tokens_inside_text(trained):
    _, metadata = trained
    ours = tokenizer(metadata)
    assert ours.tokenize("<s>the</s>x<|tool|>y")[::2] == ["<s>", "</s>", "<|tool|>"]
    assert ours.decode([1, *ours("the", add_special_tokens=False)["input_ids"]], skip_special_tokens=True) == "the"


def test_phi3_swallows_space_after_special_tokens(trained):
    _, metadata = trained
    kinds = metadata["tokenizer.ggml.token_type"].copy()
    kinds[metadata["tokenizer.ggml.tokens"].index("<|tool|>")] = CONTROL
    metadata = {**metadata, "tokenizer.ggml.token_type": kinds}
    kept, swallowed = (tokenizer({**metadata, "general.architecture": arch}) for arch in ("llama", "phi3"))
    text = "<|tool|> \n the<s> the"
    assert kept.tokenize(text)[:5] == ["<|tool|>", SPACE, SPACE, "<0x0A>", SPACE + "the"]
    expected = ["<|tool|>", SPACE + "the", "<s>", SPACE, SPACE + "the"]
    assert swallowed.convert_ids_to_tokens(swallowed(text, add_special_tokens=False)["input_ids"]) == expected


# Pre-tokenizers


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["A", "'ll", " 123", " \n", "\n", "x", "'", "LL"]),
        ("smollm", ["A", "'ll", " ", "1", "2", "3", " \n", "\n", "x", "'", "LL"]),
        ("llama-bpe", ["A", "'ll", " ", "123", " \n\n", "x", "'LL"]),
        ("qwen2", ["A", "'ll", " ", "1", "2", "3", " \n\n", "x", "'LL"]),
        ("tekken", ["A", "'ll", " ", "1", "2", "3", " \n\n", "x", "'LL"]),
        ("gpt-4o", ["A'll", " ", "123", " \n\n", "x'LL"]),
    ],
)
def test_pre_tokenizer(smollm2, name, pieces):
    metadata, _ = smollm2
    backend = tokenizer({**metadata, "tokenizer.ggml.pre": name}).backend_tokenizer
    spelled = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("A'll 123 \n\nx'LL")]
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in spelled] == pieces


@pytest.mark.parametrize(("name", "reference"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_equals_the_class_of_the_original(smollm2, name, reference):
    """transformers' class for the model that the pre-tokenizer is named after, on SmolLM2's vocabulary."""
    metadata, _ = smollm2
    ours = tokenizer({**metadata, "tokenizer.ggml.pre": name})
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    original = getattr(transformers, reference)(vocab=vocab, merges=merges)
    strings = texts(2_000, ["e\u0301", "\ufb01", "가"], seed=5)
    encode = lambda t: [e.ids for e in t.backend_tokenizer.encode_batch(strings, add_special_tokens=False)]
    assert_same(encode(ours), encode(original), strings)


def byte_level(**changes) -> dict:
    tokens = [*"abcd", "ab", "abc", "cd", "<x>", "ж"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([NORMAL] * 7 + [CONTROL, USER_DEFINED], np.int32),
        "tokenizer.ggml.merges": ["a b", "c d"],
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def test_whole_words_need_no_merges():
    assert tokenizer(byte_level()).tokenize("abc") == ["ab", "c"]
    assert tokenizer(byte_level(pre="llama-bpe")).tokenize("abc") == ["abc"]


def test_added_tokens_outside_the_byte_alphabet():
    """As DeepSeek's control tokens are; their ids stay their own."""
    ours = tokenizer(byte_level())
    assert ours("abж<x>cd")["input_ids"] == [4, 8, 7, 6]
    assert ours.decode([4, 8, 7, 6]) == "abж<x>cd"
    assert len(ours) == 9 and ours.all_special_ids in ([], [7])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "'tokenizer.ggml.tokens' is missing"),
        (byte_level(model="rwkv"), "tokenizer.ggml.model 'rwkv' is not supported; supported: 'gpt2', 'llama'"),
        (byte_level(pre="default"), "tokenizer.ggml.pre 'default' is not supported; supported: gpt-2, smollm"),
        (byte_level(pre=None), "'tokenizer.ggml.pre' is missing"),
        (byte_level(merges=None), "'tokenizer.ggml.merges' is missing"),
        (byte_level(merges=["a b c"]), "tokenizer.ggml.merges has 'a b c', expected two tokens"),
        (byte_level(merges=["a z"]), "tokenizer.ggml.merges do not fit the vocabulary"),
        (byte_level(tokens=["a", "b", "a"], token_type=None), "the vocabulary holds the token 'a' twice"),
        (byte_level(token_type=np.ones(3, np.int32)), "3 tokenizer.ggml.token_type for 9 tokens"),
        (byte_level(bos_token_id=9), "tokenizer.ggml.bos_token_id 9 of 9 tokens"),
        (byte_level(model="llama"), "no tokenizer.ggml.scores for 9 tokens"),
        (byte_level(model="llama", scores=np.zeros(2)), "2 tokenizer.ggml.scores for 9 tokens"),
        (
            byte_level(model="llama", scores=np.zeros(9), remove_extra_whitespaces=True),
            "tokenizer.ggml.remove_extra_whitespaces is not supported",
        ),
        (byte_level(add_bos_token=True), "tokenizer.ggml.add_bos_token is set, but there is no bos_token_id"),
    ],
)
def test_bad_vocabulary(metadata, message):
    with pytest.raises(ValueError, match=f"^x.gguf: {re.escape(message)}"):
        tokenizer(metadata, "x.gguf")


def test_every_pre_tokenizer_builds(smollm2):
    metadata, _ = smollm2
    for name in PRE:
        ours = tokenizer({**metadata, "tokenizer.ggml.pre": name})
        assert ours.decode(ours("Hello, world 12!")["input_ids"], skip_special_tokens=True) == "Hello, world 12!"
