"""`jaxlm verify`: a checkpoint's logits, residual stream and greedy text beside those of transformers, in float32."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jaxlm.cli.console import IgnoreFields, Source, err, facts, fetch, load, out
from jaxlm.opening import on_hub, open_checkpoint

TOLERANCE = 1e-5  # float32 rounding through 30 layers gives 1e-6; a wrong constant anywhere gives 1e-4 or more


@dataclasses.dataclass(frozen=True)
class Report:
    """What two implementations of one checkpoint gave for the same tokens."""

    tokens: str  # what the tokens were
    logit_error: float  # largest difference over largest logit
    agreements: tuple[int, int]  # positions whose likeliest token is the same, and positions
    layer_errors: tuple[float, ...]  # of the residual stream: embedding, then after each layer
    greedy: tuple[int, int]  # equal tokens before the first difference, and tokens
    margin: float | None  # how much the reference preferred its own token at that difference

    @property
    def diverging(self) -> str | None:
        """Where the difference first exceeds the tolerance, in words."""
        for i, error in enumerate(self.layer_errors):
            if not error <= TOLERANCE:
                return f"{'embedding' if i == 0 else f'layer {i - 1}'} ({error:.1e})"
        return None if self.logit_error <= TOLERANCE else "final norm or head"

    @property
    def matches(self) -> bool:
        return self.logit_error <= TOLERANCE and self.greedy[0] == self.greedy[1]


def verify(
    source: Source,
    /,
    *,
    tokens: Annotated[int, tyro.conf.arg(metavar="N", help="tokens to compare logits on")] = 512,
    new_tokens: Annotated[int, tyro.conf.arg(metavar="N", help="greedy tokens to compare after them")] = 64,
    ignore_fields: IgnoreFields = (),
) -> int:
    """Compares a checkpoint with transformers' own model in float32, on English text; exit code 1 if they differ.

    They match when no logit differs by more than 1e-5 of the largest one and the greedy continuations are the same. For
    a .gguf file the reference is transformers' GGUF loader. Needs torch, and accelerate for a .gguf file.

    Example: jaxlm verify SmolLM2.gguf --tokens 512 --new-tokens 64
    """
    if not on_hub(source):
        open_checkpoint(source)  # so that a wrong path is the first thing told
    needed = ["torch", "accelerate"] if source.endswith(".gguf") else ["torch"]  # transformers asks for both
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        missed = " ".join(missing)
        raise ValueError(f"verify compares with transformers' own model, which needs more: pip install {missed}")
    if tokens < 1 or new_tokens < 0:
        raise ValueError(f"--tokens {tokens} --new-tokens {new_tokens}: expected at least 1 and 0")
    if source.endswith(".gguf"):
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; transformers' GGUF loader shows bars
    source = fetch(source)
    model = load(source, "float32", ignore_fields)
    if tokens + new_tokens > model.config.max_context:
        raise ValueError(
            f"--tokens {tokens} and --new-tokens {new_tokens} are more than the model's context of "
            f"{model.config.max_context} tokens"
        )
    with err.status("loading the reference"):
        theirs = reference(Path(source))
    with err.status("comparing"):
        report = compare(model, theirs, tokens, new_tokens)
    show(report)
    return 0 if report.matches else 1


def reference(source: Path) -> Any:
    """transformers' model of the same checkpoint: float32, eager attention (the only one that every family has)."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = {"gguf_file": source.name} if source.is_file() else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent if where else source, dtype=torch.float32, attn_implementation="eager", **where
    )
    return model.eval()


def compare(model, theirs, n_tokens: int, new_tokens: int) -> Report:
    """Runs both on the same tokens."""
    import jax

    ids, described = prompt_ids(model, n_tokens)
    with jax.default_matmul_precision("float32"):
        ours = np.asarray(model(ids[None]))[0]
        streams = np.asarray(model(ids[None], output="all_hidden"))[:, 0]
        greedy = np.zeros(0, np.int32)
        if new_tokens:
            stored = tuple(model.generation_config)  # greedy, whatever generation_config.json says
            greedy = model.generate(ids[None], max_new_tokens=new_tokens, temperature=0, eos=(), ignore_fields=stored)[
                0
            ]
    want, want_streams, want_greedy, margins = run_reference(theirs, ids, new_tokens)
    same = np.cumprod(greedy == want_greedy, dtype=int).sum()
    return Report(
        tokens=described,
        logit_error=relative_error(ours, want),
        agreements=(int((ours.argmax(-1) == want.argmax(-1)).sum()), n_tokens),
        layer_errors=tuple(relative_error(a, b) for a, b in zip(streams, want_streams, strict=True)),
        greedy=(int(same), new_tokens),
        margin=None if same == new_tokens else float(margins[same]),
    )


def prompt_ids(model, n: int) -> tuple[np.ndarray, str]:
    """n token ids of English prose, and what they are; drawn at random, and why, where there is no tokenizer."""
    from pydoc_data.topics import topics  # the Python manual, which every Python brings along

    try:
        tokenizer = model.tokenizer
    except (FileNotFoundError, ValueError) as problem:
        ids = np.random.default_rng(0).integers(model.config.vocab_size, size=n)
        return ids.astype(np.int32), f"{n} drawn at random, without a tokenizer: {problem}"
    ids = tokenizer.encode("\n".join(topics.values())[: 20 * n])
    if len(ids) < n:
        raise ValueError(f"--tokens {n}: the built-in text has {len(ids)}")
    return np.asarray(ids[:n], np.int32), f"{n} of English text"


def run_reference(theirs, ids: np.ndarray, new_tokens: int):
    """(logits [T, V], residual streams [1 + layers, T, D], greedy ids [N], lead of each over the runner-up [N])."""
    import torch

    blocks = next(
        module
        for module in theirs.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == theirs.config.num_hidden_layers
    )
    # Not output_hidden_states: its last entry is taken after the final norm.
    streams: list[np.ndarray] = []
    keep = lambda x: streams.append((x[0] if isinstance(x, tuple) else x)[0].numpy().copy())
    hooks = [block.register_forward_hook(lambda _m, _args, output: keep(output)) for block in blocks]
    hooks.append(
        blocks[0].register_forward_pre_hook(
            lambda _m, args, kwargs: keep(args or kwargs["hidden_states"]), with_kwargs=True
        )
    )
    with torch.no_grad():
        got = theirs(torch.asarray(ids[None], dtype=torch.long), use_cache=True)
        for hook in hooks:
            hook.remove()
        logits, greedy, margins = got.logits[0].numpy(), [], []
        for _ in range(new_tokens):
            best = got.logits[0, -1].topk(2)
            greedy.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            step = torch.tensor([[greedy[-1]]])
            got = theirs(step, past_key_values=got.past_key_values, use_cache=True)
    return logits, np.stack(streams), np.asarray(greedy, np.int32), np.asarray(margins)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def show(report: Report) -> None:
    equal, total = report.greedy
    greedy = f"{equal} of {total} equal"
    if report.margin is not None:
        greedy += f", then the reference prefers its token by a logit difference of {report.margin:.1e}"
    verdict = "[bold green]matches[/]" if report.matches else "[bold red]does not match[/]"
    rows = [
        ("tokens", report.tokens),
        ("max relative logit error", f"{report.logit_error:.1e} (at most {TOLERANCE:.0e})"),
        ("argmax agreement", f"{report.agreements[0]} of {report.agreements[1]}"),
        ("first diverging layer", report.diverging or f"none of {len(report.layer_errors) - 1}"),
        ("greedy tokens", greedy),
        ("transformers", verdict),
    ]
    out.print(facts(rows), highlight=False)
