"""`jaxlm generate`: text from a prompt, streamed."""

import sys
import time
from typing import Annotated, Literal

import tyro

from jaxlm.cli.console import IgnoreFields, Source, err, load

Option = tyro.conf.arg


def generate(
    source: Source,
    prompt: Annotated[str, Option(metavar="PROMPT", help="the text to continue; - reads it from standard input")],
    /,
    *,
    chat: Annotated[bool, Option(help="answer the prompt as a chat, through the checkpoint's template")] = False,
    system: Annotated[str | None, Option(metavar="TEXT", help="the system message of the chat")] = None,
    max_new_tokens: Annotated[int | None, Option(metavar="N", help="stop after so many tokens")] = None,
    temperature: Annotated[float | None, Option(metavar="T", help="0 takes the likeliest token each time")] = None,
    top_k: Annotated[int | None, Option(metavar="K", help="draw from the K likeliest tokens; 0 is off")] = None,
    top_p: Annotated[float | None, Option(metavar="P", help="draw from the likeliest tokens that sum to P")] = None,
    min_p: Annotated[float | None, Option(metavar="P", help="drop tokens below P times the likeliest one")] = None,
    repetition_penalty: Annotated[float | None, Option(metavar="R", help="above 1 disfavours tokens seen")] = None,
    seed: Annotated[int, Option(metavar="N", help="of the random draws")] = 0,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, Option(help="to compute in")] = None,
    ignore_fields: IgnoreFields = (),
) -> int:
    """Continues PROMPT, or answers it with --chat, and streams the text to standard output.

    What no option gives comes from the checkpoint's generation_config.json.

    Example: jaxlm generate SmolLM2.gguf "Why is the sky blue?" --chat --max-new-tokens 200
    """
    if system is not None and not chat:
        raise ValueError("--system is the first message of a chat: add --chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    model = load(source, dtype, ignore_fields)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})

    start = time.perf_counter()
    first: list[float] = []

    def write(piece: str) -> None:
        if not first:
            first.append(time.perf_counter())
        print(piece, end="", flush=True)

    answer = model.generate(None if chat else [text], chat=messages if chat else None, stream=write, **options)
    end = time.perf_counter()
    print(flush=True)
    report(model, answer, start, first[0] if first else end, end)
    return 0


def report(model, answer, start: float, first: float, end: float) -> None:
    """Says on stderr how fast it went; the time to the first token includes compilation."""
    (text,) = answer
    tokens = len(model.tokenizer.encode(text, add_special_tokens=False))
    rate = f", then {(tokens - 1) / (end - first):.1f} tokens/s" if tokens > 1 else ""
    err.print(f"{tokens} tokens; first after {first - start:.2f} s{rate}", style="dim", highlight=False)
