"""The tokenizers of RWKV checkpoints: World (the longest token that fits, byte by byte), and GPT-NeoX's for the Pile's.

World's vocabulary is a text file, a line for a token: its id, its bytes as a Python literal, and how many they are. Its
rule becomes a pipeline of `tokenizers`: bytes spelled as letters, one regular expression that is the trie of all
tokens, and a table of ids. A regular expression takes the deepest branch that fits, and that is the longest token.
"""

import ast
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.checkpoints import files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORLD, PILE = files.RWKV_WORLD, files.RWKV_PILE
END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"  # as the published checkpoints call token 0, which no text has
_WORLD_IDS = 65530  # the published vocabulary ends before this id
_LONGEST = 512  # bytes of a token; the published ones have 128


def locate(directory: Path, vocab_size: int) -> Path:
    """The tokenizer's file for a checkpoint in `directory`: beside it, or World's of the installed package `rwkv`.

    Where both kinds lie there, the size of the model's vocabulary says which. FileNotFoundError with what to do.
    """
    order = (WORLD, PILE) if vocab_size >= _WORLD_IDS else (PILE, WORLD)
    for name in ("tokenizer.json", *order):
        if (directory / name).is_file():
            return directory / name
    spec = importlib.util.find_spec("rwkv")
    for place in (spec and spec.submodule_search_locations) or ():
        if vocab_size >= _WORLD_IDS and (Path(place) / WORLD).is_file():
            return Path(place) / WORLD
    wanted = (
        f"{WORLD} there, install the package that has it (pip install --no-deps rwkv), or name it: --tokenizer PATH"
    )
    if vocab_size < _WORLD_IDS:
        wanted = (
            f"{PILE} or another tokenizer.json there, or name it: --tokenizer PATH ({WORLD} is for vocabularies of "
            f"65536, and this has {vocab_size})"
        )
    raise FileNotFoundError(f"{directory} has no tokenizer for this model: put {wanted}")


def load(path: Path, vocab_size: int | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer in a file that `locate` found; tokenizer_config.json and chat template beside it are read."""
    made = world(path) if path.name == WORLD else _json(path)
    last = max(made.get_vocab().values())
    if vocab_size is not None and last >= vocab_size:
        raise ValueError(f"{path} has tokens up to id {last}, the model a vocabulary of {vocab_size}")
    return made


def _json(path: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    if path.name == "tokenizer.json":
        # Not AutoTokenizer, which warns of model types that transformers does not have.
        made = PreTrainedTokenizerFast.from_pretrained(path.parent, local_files_only=True)
    else:
        template = _settings(path.parent)["chat_template"]
        made = PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=template, **_SHAPE)
    end = made.convert_ids_to_tokens(0)
    if made.eos_token is None and end in made.added_tokens_encoder:
        made.add_special_tokens({"bos_token": end, "eos_token": end})
    return made


_SHAPE: dict[str, Any] = {
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
    "model_input_names": ["input_ids", "attention_mask"],
}


def world(path: Path) -> "PreTrainedTokenizerFast":
    """The World tokenizer with the vocabulary in a file; token for token that of the package `rwkv`.

    Token 0, which begins and ends documents, is the one special token: where a text spells it out, it is that. Its name
    and the chat template are those of the published files beside the vocabulary, if they are there.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    ids = {"".join(letters[byte] for byte in token): i for token, i in vocabulary(path).items()}
    settings = _settings(path.parent)
    end = settings["end_of_text"]
    pipeline = Tokenizer(models.WordLevel(ids | {end: 0}, unk_token=end))  # every byte is a token: nothing is unknown
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex(_longest(ids)), behavior="isolated"),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    pipeline.__deepcopy__ = lambda memo: pipeline  # pyright: ignore (transformers would copy it through JSON)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        chat_template=settings["chat_template"],
        **_SHAPE,
    )
    del pipeline.__deepcopy__  # pyright: ignore
    return wrapped


def vocabulary(path: Path) -> dict[bytes, int]:
    """Token -> id, of a file of lines `id 'literal' bytes`; ValueError, naming the line, for anything else."""
    ids: dict[bytes, int] = {}
    taken: dict[int, int] = {}  # id -> line
    for number, line in enumerate(path.read_bytes().rstrip().split(b"\n"), 1):
        where = f"{path}, line {number}"
        token, i = _entry(line, where)
        if i in taken:
            raise ValueError(f"{where}: id {i} is that of line {taken[i]}")
        if token in ids:
            raise ValueError(f"{where}: the token {token!r:.60} is that of line {taken[ids[token]]}")
        ids[token], taken[i] = i, number
    if missing := [byte for byte in range(256) if bytes([byte]) not in ids]:
        raise ValueError(f"{path}: byte {missing[0]} is no token of its own, so not every text could be written")
    return ids


def _entry(line: bytes, where: str) -> tuple[bytes, int]:
    try:
        first, rest = line.decode("utf-8").split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        i, count, token = int(first), int(length), ast.literal_eval(literal)
        token = token.encode("utf-8") if isinstance(token, str) else token
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{where}: expected `id 'token' bytes`, found {line[:60]!r}") from None
    if not isinstance(token, bytes) or not 0 < len(token) <= _LONGEST or i < 1:
        raise ValueError(f"{where}: expected an id from 1 on and a token of 1 to {_LONGEST} bytes, found {line[:60]!r}")
    if len(token) != count:
        raise ValueError(f"{where}: the token {token!r:.60} has {len(token)} bytes, not {count}")
    return token, i


def _longest(tokens: dict[str, int]) -> str:
    """A regular expression that matches the longest of the tokens at a place."""
    trie: dict[str, dict] = {}
    for token in tokens:
        node = trie
        for letter in token:
            node = node.setdefault(letter, {})
        node[""] = {}  # a token ends here
    return _branches(trie)


def _branches(node: dict[str, dict]) -> str:
    """The expression for what may follow; empty where nothing does."""
    ends = [letter for letter, after in node.items() if letter and after.keys() == {""}]
    made = [_escaped(letter) + _branches(after) for letter, after in node.items() if letter and letter not in ends]
    if ends:
        made.append(f"[{''.join(map(_escaped, ends))}]")
    if not made:
        return ""
    return f"(?:{'|'.join(made)})" + "?" * ("" in node)


def _escaped(letter: str) -> str:
    return f"\\x{{{ord(letter):x}}}" if ord(letter) < 128 and not letter.isalnum() else letter


def _settings(directory: Path) -> dict[str, Any]:
    """What the tokenizer_config.json of a published checkpoint says of token 0, and its chat template."""
    file, template = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    config = files.read_json(file) if file.is_file() else {}
    zero = config.get("added_tokens_decoder", {}).get("0", config.get("bos_token"))
    name = zero.get("content") if isinstance(zero, dict) else zero
    return {
        "end_of_text": name if isinstance(name, str) and name else END_OF_TEXT,
        "chat_template": template.read_text("utf-8") if template.is_file() else config.get("chat_template"),
    }
