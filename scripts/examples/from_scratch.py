#!/usr/bin/env python3
"""A small Llama from scratch on real text, beside the same model trained with torch and transformers.

The text is Python's own language reference, which every Python carries (`pydoc_data.topics`, PSF licence); every tenth
topic is held out. Both sides begin from the same weights and see the same batches in the same order, with AdamW,
warm-up, a cosine schedule, decay and clipping. Prints the two held-out curves; fails when they part by more than 1 %.
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import jaxlm
from jaxlm.train.config import TrainConfig, parse
from jaxlm.train.loop import Run
from jaxlm.train.setup import Job, setup

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}


def write_ground(out: Path) -> None:
    """The text in two files, a tokenizer learnt from the first, and config.json."""
    texts = [text for _, text in sorted(topics.items())]
    parts = {"train": [t for i, t in enumerate(texts) if i % 10], "eval": texts[::10]}
    for name, rows in parts.items():
        (out / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(parts["train"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>").save_pretrained(str(out / "tokenizer"))
    (out / "config.json").write_text(json.dumps(CONFIG))


def with_torch(job: Job, start: Path) -> list[tuple[int, float]]:
    """The same run in torch: (step, held-out loss) at every evaluation."""
    import torch
    from transformers import AutoModelForCausalLM

    config = job.config
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="eager")
    groups: dict[bool, list] = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.ndim > 1].append(parameter)
    decay = [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(decay, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.optim.weight_decay)

    def total(batch: dict) -> tuple:
        """The summed loss; packed examples are kept apart by an explicit mask."""
        t = {name: torch.tensor(array, dtype=torch.long) for name, array in batch.items()}
        same = (t["segments"][:, :, None] == t["segments"][:, None, :]) & torch.ones(
            t["tokens"].shape[1:] * 2
        ).tril().bool()
        mask = torch.where(same, 0.0, torch.finfo(torch.float32).min)[:, None]
        logits = model(t["tokens"], attention_mask=mask, position_ids=t["positions"].clamp(min=0)).logits
        keep = t["targets"] != -100
        return torch.nn.functional.cross_entropy(logits[keep], t["targets"][keep], reduction="sum"), keep.sum()

    curve = []
    for step in range(job.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.optim.rate * float(job.settings.schedule(step))
        loss, count = total(job.train[step])
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % config.eval_every == 0:
            assert job.eval
            with torch.no_grad():
                sums = np.array([[float(x) for x in total(job.eval[i])] for i in range(len(job.eval))]).sum(0)
            curve.append((step + 1, sums[0] / sums[1]))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new directory for text, tokenizer and run")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--alone", action="store_true", help="without torch")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    write_ground(args.out)
    settings = {
        "model": str(args.out / "config.json"),
        "tokenizer": str(args.out / "tokenizer"),
        "out": str(args.out / "run"),
        "data": {
            "train": str(args.out / "train.jsonl"),
            "eval": str(args.out / "eval.jsonl"),
            "seq_len": 128,
            "batch_size": 8,
        },
        "optim": {"rate": 3e-3, "schedule": "cosine", "warmup": 0.1, "weight_decay": 0.1},
        "steps": args.steps,
        "eval_every": max(1, args.steps // 5),
    }
    job = setup(parse(TrainConfig, settings, "settings"))
    job.model.with_params(job.state.variables["params"]).save(args.out / "start")
    theirs = [] if args.alone else with_torch(job, args.out / "start")
    console = Console()
    for name, value in job.plan():
        console.print(f"{name:12}{value}", highlight=False)
    Run(job).train()
    rows = [json.loads(line) for line in (args.out / "run/metrics.jsonl").read_text().splitlines()]
    ours = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    table = Table("step", "held-out loss", "torch", "apart", title="a small Llama from scratch")
    for i, (step, loss) in enumerate(ours):
        other = theirs[i][1] if theirs else None
        table.add_row(
            str(step), f"{loss:.4f}", f"{other:.4f}" if other else "", f"{loss / other - 1:+.2%}" if other else ""
        )
    console.print(table)
    written = jaxlm.load(args.out / "run/model").generate("The ", max_new_tokens=40, temperature=0)
    console.print("it writes:", repr(written), highlight=False)
    if theirs and max(abs(a / b - 1) for (_, a), (_, b) in zip(ours, theirs, strict=True)) > 0.01:
        raise SystemExit("the curves part by more than 1 %")


if __name__ == "__main__":
    main()
