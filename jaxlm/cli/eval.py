"""`jaxlm eval`: how well a model predicts a text, or does on the tasks of lm-evaluation-harness."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

from jaxlm.cli.console import Dtype, IgnoreFields, Option, Source, facts, load, out, progress, table


def eval(
    source: Source,
    /,
    *,
    text: Annotated[str | None, Option(metavar="FILE", help="a text file, UTF-8, to measure the perplexity of")] = None,
    window: Annotated[int | None, Option(metavar="N", help="tokens read at a time; the context, at most 2048")] = None,
    stride: Annotated[int | None, Option(metavar="N", help="how far a window moves on; half of it")] = None,
    tasks: Annotated[str | None, Option(metavar="A,B", help="tasks of lm-evaluation-harness")] = None,
    num_fewshot: Annotated[int | None, Option(metavar="N", help="examples before each question of a task")] = None,
    limit: Annotated[int | None, Option(metavar="N", help="only the first questions of each task")] = None,
    batch_size: Annotated[int, Option(metavar="N", help="questions at a time")] = 8,
    json_: Annotated[bool, Option(name="json", help="print JSON instead of a table")] = False,
    dtype: Annotated[Dtype, Option(metavar="DTYPE", help="to compute in: float32, bfloat16 or float16")] = None,
    ignore_fields: IgnoreFields = (),
) -> int:
    """Measures the perplexity of a text, each token scored once in overlapping windows, or the scores of tasks.

    Tasks need lm-evaluation-harness: pip install lm_eval

    Example: jaxlm eval SmolLM2.gguf --text book.txt --window 1024
    """
    if (text is None) == (tasks is None):
        raise ValueError("expected either --text FILE or --tasks NAME,NAME")
    if text is None:
        from jaxlm import harness

        harness.require()
        results = run_tasks(source, tasks or "", num_fewshot, limit, batch_size, dtype, ignore_fields)
        rows = [(task, name, value) for task, scores in results.items() for name, value in scores.items()]
        made = table("task", "measure", ">value")
        for task, name, value in rows:
            made.add_row(task, name, f"{value:.4f}" if isinstance(value, float) else str(value))
    else:
        results = run_text(source, text, window, stride, dtype, ignore_fields)
        made = facts([(name.replace("_", " "), shown(value)) for name, value in results.items()])
    if json_:
        out.file.write(json.dumps(results, indent=2) + "\n")
    else:
        out.print(made, highlight=False)
    return 0


def run_text(source, text: str, window, stride, dtype, ignore_fields) -> dict[str, Any]:
    """What there is to say of one text."""
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"--text {text}: no such file")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise ValueError(f"--text {text} is not UTF-8: {problem}") from problem
    if not content:
        raise ValueError(f"--text {text} is empty")
    model = load(source, dtype, ignore_fields)
    times: list[tuple[float, int]] = []
    start = time.perf_counter()
    with progress("reading", in_bytes=False) as step:

        def told(done: int, total: int) -> None:
            times.append((time.perf_counter(), done))
            step(done, total)

        found = model.perplexity(content, window=window, stride=stride, progress=told)
    # The first window waits for its program to be compiled; with several, the others say how fast it is.
    (began, before), (ended, after) = (times[0] if len(times) > 1 else (start, 0)), times[-1]
    return {
        "perplexity": found.value,
        "nats_per_token": found.nll,
        "tokens": found.tokens,
        "windows": len(times),
        "seconds": ended - start,
        "tokens_per_second": (after - before) / (ended - began),
    }


def run_tasks(source, tasks: str, num_fewshot, limit, batch_size: int, dtype, ignore_fields) -> dict[str, Any]:
    """{task: {measure: value}}."""
    from jaxlm import harness

    names = [name for name in tasks.split(",") if name]
    if not names:
        raise ValueError(f"--tasks {tasks!r}: expected names with commas between them")
    model = load(source, dtype, ignore_fields)
    return harness.evaluate(model, names, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size)


def shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if value < 1000 else f"{value:,.1f}"
