"""Checkpoints over Orbax: items `teacher` (what evaluation reads), `train` (all else a run needs to go on) and `meta`."""

import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import options as orbax_options

from cmd_jax import files
from cmd_jax.config import ConfigDict
from cmd_jax.training.state import Params, TrainState

SCHEMA = 1


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, unreadable or of another model."""


class Checkpoints:
    """The checkpoints of one work directory.

    Args:
        workdir: the run's directory; steps lie in its `checkpoints/`.
        keep: number of newest steps that are kept.
        read_only: for evaluation, which must not clean up after a running training.
    """

    def __init__(self, workdir: str, keep: int = 3, read_only: bool = False):
        directory = os.path.join(workdir if "://" in workdir else os.path.abspath(workdir), "checkpoints")
        if read_only and not files.exists(directory):
            raise CheckpointError(f"{directory} does not exist; train first, or give the --workdir of a run")
        handlers = {
            "teacher": ocp.StandardCheckpointHandler(),
            "train": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # A step counts only with its commit file, and is renamed before it is deleted: a kill leaves no half step.
            atomicity_options=orbax_options.AtomicityOptions(mode=orbax_options.AtomicityMode.COMMIT_FILE),
            todelete_subdir=None if read_only else ".trash",
        )
        self._manager = ocp.CheckpointManager(directory, item_handlers=handlers, options=options)

    def steps(self) -> list[int]:
        """Steps on disk, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, config: ConfigDict) -> None:
        """Starts saving a state; the disk is written while training goes on."""
        train = {
            "step": state.step,
            "student": state.student,
            "optimizer": state.optimizer,
            "centers": state.centers,
            "bad_steps": state.bad_steps,
        }
        self._save(int(state.step), config, teacher=state.teacher, train=train)

    def save_teacher(self, teacher: Params, config: ConfigDict) -> None:
        """Starts saving a teacher alone as step 0: it can be evaluated, exported and started from, but not continued."""
        self._save(0, config, teacher=teacher)

    def restore_state(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The newest (or the given) step as a whole state; `abstract` holds shapes, dtypes and shardings."""
        step = self._choose(step)
        train = {
            "step": abstract.step,
            "student": abstract.student,
            "optimizer": abstract.optimizer,
            "centers": abstract.centers,
            "bad_steps": abstract.bad_steps,
        }
        items = self._restore(step, {"teacher": abstract.teacher, "train": train})
        return TrainState(teacher=items["teacher"], **items["train"])

    def restore_teacher(self, abstract: Params, step: int | None = None) -> tuple[int, Params]:
        """(step, teacher) of the newest or the given step; nothing else is read."""
        step = self._choose(step)
        return step, self._restore(step, {"teacher": abstract})["teacher"]

    def read_network(self, network: str, step: int | None = None) -> tuple[int, Params]:
        """Reads one network as it was stored, whatever the model; optimizer and the other network are not read.

        Args:
            network: "teacher" or "student".
            step: of the checkpoint; None is the newest.

        Returns:
            (step, parameters as NumPy arrays).
        """
        step = self._choose(step)
        item = {"teacher": "teacher", "student": "train"}[network]
        stored = self._stored(step, item)
        tree = stored if network == "teacher" else {"student": stored["student"]}
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            read = reader.restore(
                self._manager.directory / str(step) / item,
                args=ocp.args.PyTreeRestore(item=abstract, restore_args=as_arrays, partial_restore=True),
            )
        return step, read if network == "teacher" else read["student"]

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _choose(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self._manager.directory} holds no checkpoint; train first, or give the --workdir of a run")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise CheckpointError(f"{self._manager.directory} has no step {step}; it has {', '.join(map(str, steps))}")
        return step

    def _save(self, step: int, config: ConfigDict, **items: Any) -> None:
        meta = {"schema": SCHEMA, "step": step, "config": config.to_dict(), "jax": jax.__version__}
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        if not self._manager.save(step, force=True, args=ocp.args.Composite(**trees, meta=ocp.args.JsonSave(meta))):
            raise CheckpointError(f"{self._manager.directory}: step {step} was not saved; newer steps {self.steps()} lie there")

    def _stored(self, step: int, item: str) -> Any:
        """Shapes and dtypes of an item on disk."""
        metadata = self._manager.item_metadata(step)
        stored = metadata[item] if item in metadata.keys() else None  # noqa: SIM118, a Composite is no mapping
        if stored is None:
            raise CheckpointError(
                f"{self._manager.directory}/{step} holds an imported teacher alone; to train from it, pass it as "
                "--config.init.weights with another --workdir"
            )
        return getattr(stored, "tree", stored)

    def _restore(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        for name, abstract in items.items():
            differences = _differences(abstract, self._stored(step, name))
            if differences:
                raise CheckpointError(
                    f"{self._manager.directory}/{step} does not fit this model: {len(differences)} arrays differ, first "
                    f"{'; '.join(differences[:3])}; use the config.json beside it or another --workdir"
                )
        restore = {name: ocp.args.StandardRestore(abstract) for name, abstract in items.items()}
        return dict(self._manager.restore(step, args=ocp.args.Composite(**restore)))


def _differences(abstract: Any, stored: Any) -> list[str]:
    """Readable differences between the arrays a model has and those of a checkpoint."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

    model, disk = shapes(abstract), shapes(stored)
    return [
        f"{name}: model {model.get(name, 'nothing')}, checkpoint {disk.get(name, 'nothing')}"
        for name in sorted(model.keys() | disk.keys())
        if model.get(name) != disk.get(name)
    ]
