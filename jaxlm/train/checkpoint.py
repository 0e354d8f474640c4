"""Checkpoints of a run through orbax: asynchronous, atomic, rotated, the best one kept.

orbax writes to a temporary name and renames when everything is on disk, so a kill at any moment leaves the earlier
checkpoints whole. Frozen parameters are not saved: they come from the model the run began with.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxlm.checkpoints.run import shard_axes
from jaxlm.train.partition import by_path
from jaxlm.train.step import TrainState

METRIC = "eval_loss"


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a checkpoint was saved without an evaluation, which is no mistake."""
    return "tracked_metric" not in record.getMessage()


class Checkpoints:
    """The checkpoints under a directory: the newest `keep` are kept, and the one with the least evaluation loss.

    With several processes all of them call every method together; each writes what its devices hold.
    """

    def __init__(self, directory: Path, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.WARNING)
        logging.getLogger("absl").addFilter(_is_news)
        loss = lambda metrics: metrics[METRIC]
        best = policies.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(max(1, keep)), best]),
            best_fn=loss,
            best_mode="min",
            cleanup_tmp_directories=True,  # what a killed run left behind
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, state: TrainState, about: dict[str, Any], eval_loss: float | None = None) -> None:
        """Begins to save; returns when the arrays are copied. about: JSON that comes back with the state."""
        tree = _tree(state)
        apart = {"trainable": by_path(state.trainable, lambda path: ocp.SaveArgs(shard_axes=shard_axes(path)))}
        rest = {name: jax.tree.map(lambda _: ocp.SaveArgs(), part) for name, part in tree.items()}
        saved = ocp.args.StandardSave(tree, save_args=rest | apart)
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(state=saved, about=ocp.args.JsonSave(about)),
            metrics=None if eval_loss is None else {METRIC: eval_loss},
            force=True,
        )

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step with the least evaluation loss; None when none was evaluated."""
        return self._manager.best_step()

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore(self, state: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """A state like `state` (its shapes, dtypes and shardings) with the values saved, and what was said about it.

        On however many devices and processes, and over whatever mesh, they were saved.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(state))
        found = self._manager.restore(
            self.latest if step is None else step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(target), about=ocp.args.JsonRestore()),
        )
        values = dict(found["state"])
        values["key"] = jax.random.wrap_key_data(values["key"])
        return dataclasses.replace(state, **values), found["about"]

    def wait(self) -> None:
        """Returns when everything asked for is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _tree(state: TrainState) -> dict[str, Any]:
    names = ("step", "trainable", "optimizer", "scale", "lr_scale")
    return {name: getattr(state, name) for name in names} | {"key": jax.random.key_data(state.key)}
