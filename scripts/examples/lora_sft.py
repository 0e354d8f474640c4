#!/usr/bin/env python3
"""LoRA on a real model: SmolLM2-135M-Instruct learns to answer in a form of its own, measured on held-out questions.

The task turns a sentence into fields: "Ada bought 7 lamps in Oslo." -> "who=Ada; what=lamps; count=7; where=Oslo".
Names and towns of the held-out questions never occur in training. Prints the share answered exactly before and after,
and with --check compares the merged export's answers with transformers'. About five minutes on two CPU cores.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

import jaxlm
from jaxlm.model import Model
from jaxlm.train.config import TrainConfig, parse
from jaxlm.train.loop import Run
from jaxlm.train.setup import setup

NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gita",
    "Hugo",
    "Iris",
    "Jon",
    "Kim",
    "Lea",
    "Max",
    "Nora",
    "Otto",
    "Pia",
    "Quinn",
    "Rosa",
    "Sam",
    "Tess",
]
TOWNS = [
    "Oslo",
    "Rome",
    "Lima",
    "Cairo",
    "Delhi",
    "Paris",
    "Tokyo",
    "Quito",
    "Bern",
    "Riga",
    "Accra",
    "Hanoi",
    "Doha",
    "Minsk",
    "Sofia",
    "Dublin",
]
THINGS = ["lamps", "books", "chairs", "apples", "hats", "clocks", "maps", "cups", "bells", "rugs"]
VERBS = ["bought", "sold", "lost", "found"]


def questions(names: list[str], towns: list[str], count: int, seed: int) -> list[tuple[str, str]]:
    """(sentence, answer) pairs, all different."""
    every = list(itertools.product(names, VERBS, range(2, 60), THINGS, towns))
    drawn = random.Random(seed).sample(every, count)
    return [
        (f"{who} {verb} {n} {what} in {where}.", f"who={who}; what={what}; count={n}; where={where}")
        for who, verb, n, what, where in drawn
    ]


def chat(sentence: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Fields of: {sentence}"}]


def exact(model: Model, pairs: list[tuple[str, str]]) -> float:
    """The share answered exactly, greedily."""
    prompts = [model.chat_tokens(chat(sentence)) for sentence, _ in pairs]
    answers = model.generate(prompts, max_new_tokens=40, temperature=0, repetition_penalty=1)
    texts = [model.tokenizer.decode(list(ids), skip_special_tokens=True).strip() for ids in answers]
    return sum(text == answer for text, (_, answer) in zip(texts, pairs, strict=True)) / len(pairs)


def check(model: Model, directory: Path, pairs: list[tuple[str, str]]) -> None:
    """The merged export answers the same in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for sentence, _ in pairs:
        ids = model.chat_tokens(chat(sentence))
        made = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
        ours = model.generate([ids], max_new_tokens=40, temperature=0, repetition_penalty=1)[0].tolist()
        if made[: len(ours)] != ours:
            raise SystemExit(f"transformers answers otherwise: {made} against {ours}")
    print(f"transformers gives the same {len(pairs)} answers from the merged export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="SmolLM2-135M-Instruct: a directory or .gguf file")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--check", action="store_true", help="compare with transformers (needs torch)")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    held_out = questions(NAMES[15:], TOWNS[12:], args.held_out, seed=1)
    with (args.out / "train.jsonl").open("w", encoding="utf-8") as file:
        for sentence, answer in questions(NAMES[:15], TOWNS[:12], 800, seed=0):
            file.write(json.dumps({"messages": [*chat(sentence), {"role": "assistant", "content": answer}]}) + "\n")
    before = exact(jaxlm.load(args.source), held_out)
    settings = {
        "model": args.source,
        "out": str(args.out / "run"),
        "data": {"train": str(args.out / "train.jsonl"), "format": "messages", "seq_len": 256, "batch_size": 2},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
        "optim": {"rate": 1e-3, "schedule": "cosine", "warmup": 0.1},
        "steps": args.steps,
        "remat": "dots",
    }
    result = Run(setup(parse(TrainConfig, settings, "settings"))).train()
    assert result.model is not None
    model = jaxlm.load(result.model)
    after = exact(model, held_out)
    print(f"answered exactly, of {args.held_out} held-out questions: {before:.0%} before, {after:.0%} after")
    if after <= before:
        raise SystemExit("it has learnt nothing")
    if args.check:
        check(model, result.model, held_out[:8])


if __name__ == "__main__":
    main()
