"""`jaxlm convert`: a checkpoint of any kind we read, written as Hugging Face safetensors."""

import time
from pathlib import Path
from typing import Annotated

from jaxlm.cli.console import Dtype, IgnoreFields, Option, Source, Tokenizer, err, fetch, progress, size


def convert(
    source: Source,
    out: Annotated[str, Option(metavar="OUT", help="the directory to write")],
    /,
    *,
    dtype: Annotated[Dtype, Option(metavar="DTYPE", help="to write: float32, bfloat16 or float16")] = None,
    tokenizer: Tokenizer = None,
    overwrite: Annotated[bool, Option(help="replace what OUT holds")] = False,
    ignore_fields: IgnoreFields = (),
) -> int:
    """Writes a checkpoint as Hugging Face safetensors with its config, tokenizer and template files.

    Without --dtype the tensors of safetensors and .pth come out bit for bit; a GGUF file is dequantized to float32. The
    directory of a `jaxlm train` run is its last checkpoint, RUN/checkpoints/STEP an earlier one. One tensor is in
    memory at a time.

    Example: jaxlm convert SmolLM2.gguf SmolLM2-bf16 --dtype bfloat16
    """
    directory = Path(out)
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise ValueError(f"{out} exists and is not empty: choose another directory, or add --overwrite")
    from jaxlm import api

    found, start = fetch(source), time.perf_counter()
    with progress(f"writing {out}") as step:
        api.convert(
            found,
            directory,
            dtype=dtype,
            tokenizer=tokenizer,
            overwrite=overwrite,
            ignore_fields=ignore_fields,
            progress=step,
        )
    files = sorted(directory.glob("*.safetensors"))
    written = size(sum(file.stat().st_size for file in files))
    err.print(
        f"wrote {out}: {len(files)} safetensors, {written}, {time.perf_counter() - start:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    return 0
