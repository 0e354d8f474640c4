"""`jaxlm generate`: text from a prompt, streamed."""

import sys
from typing import Annotated

from jaxlm.cli.console import (
    Dtype,
    IgnoreFields,
    IgnoreGenerationFields,
    Option,
    Source,
    Tokenizer,
    err,
    load,
    out,
    rates,
)


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
    stop: Annotated[tuple[str, ...], Option(metavar="TEXT", help="end before this text; may be given again")] = (),
    samples: Annotated[int, Option(metavar="N", help="continuations to draw; several are not streamed")] = 1,
    seed: Annotated[int, Option(metavar="N", help="of the random draws")] = 0,
    dtype: Annotated[Dtype, Option(metavar="DTYPE", help="to compute in: float32, bfloat16 or float16")] = None,
    tokenizer: Tokenizer = None,
    ignore_fields: IgnoreFields = (),
    ignore_generation_fields: IgnoreGenerationFields = (),
) -> int:
    """Continues PROMPT, or answers it with --chat, and streams the text to standard output.

    What no option gives comes from the checkpoint's generation_config.json.

    Example: jaxlm generate SmolLM2.gguf "Why is the sky blue?" --chat --max-new-tokens 200
    """
    if system is not None and not chat:
        raise ValueError("--system is the first message of a chat: add --chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("the prompt is empty")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    model = load(source, dtype, ignore_fields, tokenizer)

    def write(piece: str) -> None:
        out.file.write(piece)
        out.file.flush()

    made = model.generate(
        None if chat else text,
        chat=messages if chat else None,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        samples=samples,
        seed=seed,
        stream=write if samples == 1 else None,
        details=True,
        ignore_fields=ignore_generation_fields,
    )
    if samples == 1:
        out.file.write("\n")
        err.print(rates(made), style="dim", highlight=False, soft_wrap=True)
        return 0
    for i, one in enumerate(made, 1):
        err.print(f"--- {i} of {samples}: {len(one.tokens)} tokens", style="dim", highlight=False, soft_wrap=True)
        err.file.flush()
        write(one.text + "\n")
    timing = made[0].timing
    speed = f"{timing.new_tokens} new tokens at {timing.decode_rate:.1f}/s, over all samples"
    err.print(speed, style="dim", highlight=False, soft_wrap=True)
    return 0
