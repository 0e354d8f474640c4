"""The tokenizer that a GGUF file's metadata describes, rebuilt as a `tokenizers` pipeline; needs no torch.

The metadata holds a vocabulary, the kind of each token, merges (byte-level BPE) or scores (SentencePiece BPE), and the
name of a pre-tokenizer. What the pipeline around it was, in the model's own tokenizer.json, follows from that name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "\u2581"  # SentencePiece's visible space

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [r"[^\r\n\p{L}\p{N}]?" + _UPPER + a + _LOWER + b for a, b in ("*+", "+*")]
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = "|".join(_CASED) + r"|\p{N}" + _TAIL
_GPT4O = "|".join(cased + r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?" for cased in _CASED) + r"|\p{N}{1,3}" + _TAIL


@dataclasses.dataclass(frozen=True)
class Pre:
    """What a value of tokenizer.ggml.pre stands for, from the tokenizer.json of the model it is named after."""

    split: str | None = None  # None: GPT-2's
    digits: bool = False  # every digit on its own, before the split
    nfc: bool = False
    whole_words: bool = False  # a piece that is in the vocabulary is taken before any merging
    add_bos: bool = False  # when the file does not say


# transformers' own GGUF tokenizer knows only the splits: it leaves out the digits of smollm, starcoder and refact, the
# NFC of Qwen and the whole words of Llama 3 and Tekken, and so differs from these models' tokenizers.
PRE = {
    "gpt-2": Pre(),
    "smollm": Pre(digits=True),
    "starcoder": Pre(digits=True),
    "refact": Pre(digits=True),  # Granite
    "llama-bpe": Pre(_LLAMA3, whole_words=True, add_bos=True),
    "llama-v3": Pre(_LLAMA3, whole_words=True, add_bos=True),
    "llama3": Pre(_LLAMA3, whole_words=True, add_bos=True),
    "dbrx": Pre(_LLAMA3),  # OLMo 2, Phi-4
    "qwen2": Pre(_QWEN2, nfc=True),
    "deepseek-r1-qwen": Pre(_QWEN2, nfc=True),
    "tekken": Pre(_TEKKEN, whole_words=True, add_bos=True),
    "gpt-4o": Pre(_GPT4O),  # Phi-4-mini
}


def tokenizer(metadata: Mapping[str, Any], where: str = "GGUF metadata") -> "PreTrainedTokenizerFast":
    """The tokenizer of a `GgufFile.metadata`; ValueError for one that is not supported. `where` is used in errors."""
    from transformers import PreTrainedTokenizerFast

    vocab = _Vocab(metadata, where)
    model = vocab.required("tokenizer.ggml.model", str)
    if model == "gpt2":
        pipeline, add_bos = _byte_level(vocab)
    elif model == "llama":
        pipeline, add_bos = _sentencepiece(vocab), True
    else:
        raise ValueError(f"{where}: tokenizer.ggml.model {model!r} is not supported; supported: 'gpt2', 'llama'")
    _add_tokens(pipeline, vocab)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask", "sep": "seperator"}
    special = {f"{name}_token": vocab.special(key) for name, key in names.items()}
    ends = [vocab.end("bos", special["bos_token"], add_bos), vocab.end("eos", special["eos_token"], False)]
    _add_ends(pipeline, *ends)
    # transformers copies the pipeline, which is through JSON and takes 4 s for Gemma's; nobody else holds this one.
    pipeline.__deepcopy__ = lambda memo: pipeline  # pyright: ignore
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        chat_template=_chat_template(metadata),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        # Also a token that is not set is named, for transformers would make up "<s>" and "</s>".
        **{name: token for name, token in special.items() if token is not None or name in ("bos_token", "eos_token")},
    )
    del pipeline.__deepcopy__  # pyright: ignore
    return wrapped


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template, or by name where the file has several."""
    prefix, default = "tokenizer.chat_template", metadata.get("tokenizer.chat_template")
    named = [name for name in metadata.get("tokenizer.chat_templates", ()) if f"{prefix}.{name}" in metadata]
    if default is None or not named:
        return default
    return {"default": default} | {name: metadata[f"{prefix}.{name}"] for name in named}


class _Vocab:
    """The vocabulary as it is stored: tokens, kinds, and the ids of the special ones, checked against each other."""

    def __init__(self, metadata: Mapping[str, Any], where: str):
        self.metadata, self.where = metadata, where
        self.tokens: list[str] = self.required("tokenizer.ggml.tokens", list)
        kinds = metadata.get("tokenizer.ggml.token_type")
        self.kinds: list[int] = [NORMAL] * len(self.tokens) if kinds is None else kinds.tolist()
        if len(self.kinds) != len(self.tokens):
            raise ValueError(f"{where}: {len(self.kinds)} tokenizer.ggml.token_type for {len(self.tokens)} tokens")

    def required(self, key: str, kind: type) -> Any:
        value = self.metadata.get(key)
        if not isinstance(value, kind):
            raise ValueError(
                f"{self.where}: {key!r} is missing" if value is None else f"{self.where}: {key!r} is {value!r}"
            )
        return value

    def special(self, key: str) -> str | None:
        """The token of tokenizer.ggml.<key>_token_id."""
        token_id = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            return None
        if not 0 <= token_id < len(self.tokens):
            raise ValueError(f"{self.where}: tokenizer.ggml.{key}_token_id {token_id} of {len(self.tokens)} tokens")
        return self.tokens[token_id]

    def end(self, name: str, token: str | None, default: bool) -> str | None:
        """The token, if it is to be added around every text."""
        if self.metadata.get(f"tokenizer.ggml.add_{name}_token") and token is None:
            raise ValueError(f"{self.where}: tokenizer.ggml.add_{name}_token is set, but there is no {name}_token_id")
        return token if self.metadata.get(f"tokenizer.ggml.add_{name}_token", default) else None

    def ids(self, tokens: Sequence[str]) -> dict[str, int]:
        """Token -> id; a token that is there twice could be written but never read back."""
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(ids) != len(tokens):
            twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
            raise ValueError(f"{self.where}: the vocabulary holds the token {twice!r} twice")
        return ids


def _byte_level(vocab: _Vocab) -> tuple["Tokenizer", bool]:
    """GPT-2's BPE over bytes spelled as letters, and whether such files mean a BOS token when they do not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = vocab.required("tokenizer.ggml.pre", str)
    if name not in PRE:
        raise ValueError(f"{vocab.where}: tokenizer.ggml.pre {name!r} is not supported; supported: {', '.join(PRE)}")
    pre = PRE[name]
    merges = [tuple(merge.split(" ")) for merge in vocab.required("tokenizer.ggml.merges", list)]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise ValueError(f"{vocab.where}: tokenizer.ggml.merges has {' '.join(wrong)!r}, expected two tokens")
    ids = vocab.ids(vocab.tokens)
    try:
        model = models.BPE(vocab=ids, merges=merges, ignore_merges=pre.whole_words)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{vocab.where}: tokenizer.ggml.merges do not fit the vocabulary: {error}") from error
    pipeline = Tokenizer(model)
    if pre.nfc:
        pipeline.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(steps)
    pipeline.decoder = decoders.ByteLevel()
    return pipeline, pre.add_bos


def _sentencepiece(vocab: _Vocab) -> "Tokenizer":
    """SentencePiece's BPE: spaces made visible, the best-scored pair merged first, bytes for what is left over."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    # llama.cpp's converter spells user-defined runs of spaces as spaces; here they meet text whose spaces are visible.
    tokens = [
        SPACE * len(token) if kind == USER_DEFINED and not token.strip(" ") else token
        for token, kind in zip(vocab.tokens, vocab.kinds, strict=True)
    ]
    pipeline = Tokenizer(
        models.BPE(
            vocab=vocab.ids(tokens),
            merges=_merges(tokens, vocab),
            unk_token=vocab.special("unknown"),
            fuse_unk=True,
            byte_fallback=BYTE in vocab.kinds,
        )
    )
    if vocab.metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise ValueError(f"{vocab.where}: tokenizer.ggml.remove_extra_whitespaces is not supported")
    replace = normalizers.Replace(" ", SPACE)
    restore = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    is_gemma = vocab.metadata.get("general.architecture", "").startswith("gemma")  # whose oldest files lack the key
    if vocab.metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma):
        # As SentencePiece, llama.cpp and the tokenizer.json of Llama 2, the first Mistral and Phi-3 have it: always one
        # more space, also before a space and after a special token. transformers' GGUF tokenizer adds none there, but
        # for Phi-3.
        pipeline.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        pipeline.decoder = decoders.Sequence([*restore, decoders.Strip(" ", left=1)])
    else:
        pipeline.normalizer = replace
        pipeline.decoder = decoders.Sequence(restore)
    return pipeline


def _merges(tokens: list[str], vocab: _Vocab) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in SentencePiece's order of preference.

    User-defined tokens come first, as SentencePiece matches them before anything else; then the better score; then,
    for want of a better rule, the longer left part, as transformers has it.
    """
    scores = vocab.metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        count = "no" if scores is None else len(scores)
        raise ValueError(f"{vocab.where}: {count} tokenizer.ggml.scores for {len(tokens)} tokens")
    known = set(tokens)
    made = [
        (kind != USER_DEFINED, 0.0 if kind == USER_DEFINED else -score, i)
        for i, (kind, score) in enumerate(zip(vocab.kinds, scores.tolist(), strict=True))
        if kind in (NORMAL, USER_DEFINED, UNUSED)
    ]
    made.sort()
    return [
        (left, right)
        for *_, i in made
        for token in (tokens[i],)
        for end in range(len(token) - 1, 0, -1)
        if (left := token[:end]) in known and (right := token[end:]) in known
    ]


def _add_tokens(pipeline: "Tokenizer", vocab: _Vocab) -> None:
    """Control tokens as special ones, user-defined ones as plain ones; both are found in the text before all else."""
    from tokenizers import AddedToken

    # Phi-3's own tokenizer swallows the white space after these. The file does not say so; llama.cpp goes by name.
    strips = vocab.metadata.get("general.architecture") == "phi3" and vocab.metadata["tokenizer.ggml.model"] == "llama"
    kept = ("<unk>", "<s>", "<|endoftext|>")
    added: dict[bool, list[AddedToken]] = {True: [], False: []}
    for token, kind in zip(vocab.tokens, vocab.kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and pipeline.token_to_id(token) is not None:
            special = kind != USER_DEFINED
            rstrip = strips and special and token not in kept
            added[special].append(AddedToken(token, normalized=False, special=special, rstrip=rstrip))
    pipeline.add_special_tokens(added[True])
    pipeline.add_tokens(added[False])


def _add_ends(pipeline: "Tokenizer", bos: str | None, eos: str | None) -> None:
    """Adds these tokens around every text."""
    from tokenizers import processors

    around = lambda body, n: [f"{bos}:{n}"] * (bos is not None) + [f"{body}:{n}"] + [f"{eos}:{n}"] * (eos is not None)
    pipeline.post_processor = processors.TemplateProcessing(
        single=around("$A", 0),
        pair=around("$A", 0) + around("$B", 1),
        special_tokens=[(token, pipeline.token_to_id(token)) for token in {bos, eos} if token is not None],
    )
