"""The files of a checkpoint directory beside its weights."""

import json
from pathlib import Path
from typing import Any

from jaxlm.checkpoints.safetensors_header import parse_json

CONFIG, GENERATION = "config.json", "generation_config.json"
RWKV_WORLD, RWKV_PILE = "rwkv_vocab_v20230424.txt", "20B_tokenizer.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    RWKV_WORLD,
    RWKV_PILE,
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else is a ValueError naming the file and place."""
    problems: list[str] = []
    value = parse_json(path.read_bytes(), str(path), problems)
    if problems or value is None:
        raise ValueError("; ".join(problems))
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
