"""`jaxlm generate`: text from a prompt, streamed."""

import sys
import time
from typing import Annotated

from jaxlm.cli.console import Dtype, IgnoreFields, IgnoreGenerationFields, Option, Source, err, load, out


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
    dtype: Annotated[Dtype, Option(metavar="DTYPE", help="to compute in: float32, bfloat16 or float16")] = None,
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
    model = load(source, dtype, ignore_fields)

    start = time.perf_counter()
    arrivals: list[float] = []

    def write(piece: str) -> None:
        arrivals.append(time.perf_counter())
        out.file.write(piece)
        out.file.flush()

    answer = model.generate(
        None if chat else text,
        chat=messages if chat else None,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stream=write,
        ignore_fields=ignore_generation_fields,
    )
    end = time.perf_counter()
    out.file.write("\n")
    n_tokens = len(model.tokenizer.encode(answer, add_special_tokens=False))
    # Both of the first two tokens wait for a compilation, of the prompt's program and of the next tokens'.
    steady = arrivals[-1] - arrivals[1] if len(arrivals) > 2 else 0
    rate = f"; {(n_tokens - 2) / steady:.1f} tokens/s once compiled" if steady > 0 else ""
    err.print(f"{n_tokens} tokens in {end - start:.1f} s{rate}", style="dim", highlight=False, soft_wrap=True)
    return 0
