"""Every schedule at every step, against transformers' own."""

import numpy as np
import pytest

from jaxlm.train.schedules import NAMES, Schedule

STEPS, WARMUP, RATE = 60, 7, 2.0
CASES = {  # ours -> (its settings, transformers' name, its settings)
    "constant": ({}, "constant", {}),
    "constant_with_warmup": ({}, "constant_with_warmup", {}),
    "linear": ({}, "linear", {}),
    "cosine": ({}, "cosine", {}),
    "cosine, cycles": ({"cycles": 1.5}, "cosine", {"num_cycles": 1.5}),
    "cosine, end": ({"end": 0.1}, "cosine_with_min_lr", {"min_lr": 0.1 * RATE}),
    "cosine_with_restarts": ({}, "cosine_with_restarts", {}),
    "cosine_with_restarts, 3": ({"cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
    "polynomial": ({"end": 1e-7 / RATE}, "polynomial", {}),
    "polynomial, 2": ({"end": 0.25, "power": 2.0}, "polynomial", {"lr_end": 0.25 * RATE, "power": 2.0}),
    "inverse_sqrt": ({}, "inverse_sqrt", {}),
    "inverse_sqrt, 30": ({"timescale": 30}, "inverse_sqrt", {"timescale": 30}),
    "warmup_stable_decay": ({"decay": 20}, "warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "linear"}),
}


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case):
    import torch
    import transformers

    ours, name, settings = CASES[case]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    warmup = {} if name == "constant" else {"num_warmup_steps": WARMUP}
    theirs = transformers.get_scheduler(
        name, optimizer, num_training_steps=STEPS, scheduler_specific_kwargs=settings, **warmup
    )
    warmed = {} if name == "constant" else {"warmup": WARMUP}
    schedule = Schedule(name=case.split(",")[0], steps=STEPS, **warmed, **ours)
    for step in range(STEPS):
        np.testing.assert_allclose(schedule(step), theirs.get_last_lr()[0] / RATE, atol=3e-7)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"constant", "reduce_on_plateau"}))
def test_warms_up_from_nothing_and_stays_after_the_end(name):
    decay = {"decay": 5} if name == "warmup_stable_decay" else {}
    schedule = Schedule(name=name, steps=50, warmup=10, **decay)
    assert schedule(0) == 0 and np.isclose(schedule(5), 0.5)
    assert schedule(50) == schedule(70)


@pytest.mark.parametrize("name", ["cosine", "polynomial", "warmup_stable_decay"])
def test_ends_at_a_share(name):
    decay = {"decay": 5} if name == "warmup_stable_decay" else {}
    np.testing.assert_allclose(Schedule(name=name, steps=50, warmup=10, end=0.25, **decay)(50), 0.25, rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"name": "cosin"}, "unknown schedule 'cosin'; there are constant"),
        ({"steps": 0}, "steps=0"),
        ({"warmup": 11}, "warmup=11"),
        ({"end": 1.0}, "end=1.0"),
        ({"name": "warmup_stable_decay", "decay": 11}, "decay=11"),
        ({"name": "warmup_stable_decay"}, "warmup_stable_decay needs decay"),
        ({"end": 0.5}, "end=0.5: the schedule linear has none"),
        ({"name": "constant", "warmup": 3}, "warmup=3: the schedule constant has none: constant_with_warmup has"),
        ({"name": "inverse_sqrt", "cycles": 2.0}, "cycles=2.0: the schedule inverse_sqrt has none"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"steps": 10} | bad)
