"""Pallas TPU kernels on a CPU with the memory of a TPU: unwritten memory is NaN, copies land when waited for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

# jax 0.12 raises at a race unless told to go on, so that what was read can be seen; 0.10 only goes on.
GO_ON = {"on_race": "warn"} if "on_race" in {f.name for f in dataclasses.fields(pltpu.InterpretParams)} else {}
STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", **GO_ON)


def run_strictly(call: Callable[[], Any]) -> tuple[Any, bool]:
    """The result of a call whose kernels run with STRICT, and whether a race was found."""
    pltpu.reset_tpu_interpret_mode_state()
    result = jax.block_until_ready(call())
    assert interpreter.races is not None, "no kernel ran in this mode"
    found = interpreter.races.races_found
    pltpu.reset_tpu_interpret_mode_state()
    return result, found
