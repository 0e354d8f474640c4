"""`jaxlm train`: a run from its settings, resumed where it stopped."""

import contextlib
from pathlib import Path
from typing import Annotated

import tyro
import yaml

from jaxlm.cli.console import Option, err, facts, out, progress, table


def train(
    config: Annotated[str, Option(metavar="CONFIG", help="a YAML file of settings")],
    settings: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        Option(metavar="NAME=VALUE", help="settings that win over the file's, as in optim.rate=1e-4"),
    ] = (),
    /,
    *,
    show: Annotated[bool, Option(help="print all settings as YAML, defaults included, and stop")] = False,
    dry_run: Annotated[bool, Option(help="prepare the data and print the plan, and stop")] = False,
    coordinator: Annotated[str | None, Option(metavar="HOST:PORT", help="where process 0 is reached")] = None,
    processes: Annotated[int | None, Option(metavar="N", help="how many processes run together")] = None,
    process_id: Annotated[int | None, Option(metavar="I", help="which of them this is, from 0")] = None,
) -> int:
    """Trains a model: goes on from the newest checkpoint under `out`, writes metrics there and, at the end, the model.

    The file needs model (a checkpoint, or a config.json to begin from scratch with), out and data.train (a cache of
    `jaxlm prepare`, or a source for it). SIGTERM saves and exits; the same command then goes on.

    On several hosts, start the same command on each: under SLURM, Open MPI, GKE and on TPU pods they find each other,
    elsewhere --coordinator, --processes and --process-id say how. `out` and the data are on a file system they share.

    Example: jaxlm train run.yaml optim.rate=1e-4 steps=1000
    """
    from jaxlm.train.config import plain, read

    if not Path(config).is_file():
        raise FileNotFoundError(f"{config}: no such file; `out`, `model` and `data` are its least contents")
    chosen = read(config, settings)
    if show:
        out.file.write(yaml.safe_dump(plain(chosen), sort_keys=False))
        return 0
    from jaxlm.parallel import hosts

    hosts.initialize(coordinator, processes, process_id)
    with hosts.failing_together("start all of them again, and the run goes on from its last checkpoint"):
        return _run(chosen, dry_run, hosts.leads())


def _run(chosen, dry_run: bool, leads: bool) -> int:
    """Trains; only the first of several processes says anything."""
    from jaxlm.train.loop import Run
    from jaxlm.train.setup import setup

    if not leads:
        job = setup(chosen)
        return 0 if dry_run or Run(job).train().ended != "SIGTERM" else 143
    with contextlib.ExitStack() as bars:
        job = setup(chosen, lambda label: bars.enter_context(progress(label, in_bytes=False)))
    out.print(facts(job.plan()), highlight=False)
    if dry_run:
        return 0
    with progress("training", in_bytes=False) as bar:
        run = Run(job, [Printer(chosen.data.eval is not None)], bar)
        result = run.train()
    rows = [("ended", result.ended), ("steps", f"{result.step:,}"), ("loss", f"{result.loss:.4f}")]
    if result.eval_loss is not None:
        rows.append(("evaluation", f"{result.eval_loss:.4f} (best checkpoint: step {result.best_step})"))
    rows.append(("model", str(result.model) if result.model else "not exported; the same command goes on"))
    out.print(facts(rows), highlight=False)
    return 0 if result.ended != "SIGTERM" else 143


class Printer:
    """A line for every log and evaluation."""

    def __init__(self, evaluates: bool):
        self.columns = ["step", "loss", "rate", "grad norm", "tokens/s", "evaluation"][: 6 if evaluates else 5]
        self.begun = False

    def line(self, *cells: str) -> None:
        made = table(*(f">{name}" for name in self.columns))
        made.show_header, self.begun = not self.begun, True
        for column in made.columns:
            column.min_width = 10
        made.add_row(*cells[: len(self.columns)])
        err.print(made, highlight=False)

    def on_log(self, run, step: int, values: dict[str, float]) -> None:
        kinds = {"loss": ".4f", "learning_rate": ".2e", "grad_norm": ".3f", "tokens_per_second": ",.0f"}
        self.line(f"{step:,}", *(f"{values.get(name, float('nan')):{kind}}" for name, kind in kinds.items()), "")

    def on_evaluate(self, run, step: int, values: dict[str, float]) -> None:
        self.line(f"{step:,}", "", "", "", "", f"{values['eval_loss']:.4f}")

    def on_save(self, run, step: int) -> None: ...

    def on_end(self, run, result) -> None: ...
