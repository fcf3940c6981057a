"""Saves and restores training states with Orbax: items `teacher` (for evaluation), `train` (the rest of the state) and `meta`.

`meta` holds shape, dtype and fingerprint of every array and a digest of itself. All are compared whenever a step is read, since
Orbax's own checks miss most changed bytes. A step that does not hold what was saved is skipped for the next older one, in all
processes alike, and a training run renames it to STEP.damaged-TIME.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint import options as orbax_options

from cmd_jax import files
from cmd_jax.config import BEST_METRICS, ConfigDict
from cmd_jax.errors import CheckpointError, SaveError
from cmd_jax.models.build import Params
from cmd_jax.training import processes
from cmd_jax.training.fingerprint import array_differences, array_records, digest, fingerprints
from cmd_jax.training.state import TrainState

SCHEMA = 2
TRASH = ".trash"
DAMAGED = ".damaged-"


class _Damaged(Exception):
    """A step that does not hold what was saved."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Always false: Orbax would poll JAX's preemption service in process 0 alone, and the others would wait."""
        return False


class Checkpoints:
    """Reads and writes the checkpoints of a work directory.

    Args:
        workdir: the run's directory; steps lie in its `checkpoints/`.
        keep: number of newest steps that are kept.
        best_metric: the step with the best value of it (of equal ones the first) is kept too, and is the result; None: the
            newest is.
        read_only: for evaluation, which must not clean up after a running training.
    """

    def __init__(self, workdir: str, keep: int = 3, best_metric: str | None = None, read_only: bool = False):
        directory = os.path.join(workdir if "://" in workdir else os.path.abspath(workdir), "checkpoints")
        if read_only and not files.exists(directory):
            raise CheckpointError(f"{directory} does not exist; train first, or give the --workdir of a run")
        handlers = {
            "teacher": ocp.StandardCheckpointHandler(),
            "train": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), _KeepBest(self)]),
            read_only=read_only,
            # A step counts only with its commit file, and is renamed before it is deleted: a kill leaves no half step.
            atomicity_options=orbax_options.AtomicityOptions(mode=orbax_options.AtomicityMode.COMMIT_FILE),
            # In the background, the writers would wait five minutes for a directory that a full disk does not let be made.
            async_options=orbax_options.AsyncOptions(create_directories_asynchronously=False),
            todelete_subdir=None if read_only else TRASH,
        )
        if not read_only:
            _remove_leftovers(epath.Path(directory))
        self._read_only, self._best_metric = read_only, best_metric
        self._values: dict[int, float] | None = None  # of the best metric, by step
        self._saving: int | None = None
        self._manager = _Manager(directory, item_handlers=handlers, options=options)
        self._directory = self._manager.directory

    def steps(self) -> list[int]:
        """Steps on disk, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, config: ConfigDict, value: float | None = None) -> None:
        """Starts saving a state; it is written to the disk in the background.

        Args:
            state: with its own step number.
            config: resolved.
            value: of the best metric at this step.

        Raises:
            SaveError: this state, or the one before, could not be written.
        """
        self._save(int(state.step), config, value, **_items(state))

    def save_teacher(self, teacher: Params, config: ConfigDict) -> None:
        """Starts saving a teacher alone as step 0: for evaluation, export and initial weights; it cannot be resumed."""
        self._save(0, config, None, teacher=teacher)

    def check(self) -> None:
        """Raises if a save has failed; does not wait for one that is still running.

        Raises:
            SaveError: naming the directory, its free space and the intact steps.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._wait()

    def resume(self, abstract: TrainState) -> TrainState | None:
        """Restores the newest intact state; None where nothing was saved yet.

        Raises:
            CheckpointError: there are steps, and none is intact.
        """
        if self.steps():
            return self.restore_state(abstract)
        damaged = sorted(path.name for path in self._directory.iterdir() if DAMAGED in path.name)
        if damaged:
            raise CheckpointError(
                f"{self._directory} has nothing but damaged steps ({', '.join(damaged[:3])}); refusing to start from scratch; "
                "put back a copy, or give another --workdir"
            )
        return None

    def restore_state(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """Restores the newest (or the given) step; `abstract` holds shapes, dtypes and shardings."""
        items = self._first_intact(step, lambda step, meta: self._restore(step, meta, _items(abstract)))[1]
        return TrainState(teacher=items["teacher"], **items["train"])

    def restore_teacher(self, abstract: Params, step: int | None = None, best: bool = False) -> tuple[int, Params]:
        """Restores (step, teacher) of the result (see `result_step`) or the given step without reading the other items.

        Raises:
            CheckpointError: `best`, and no step has a value of the best metric; or no step can be read.
        """
        if best and self.best_step() is None:
            raise CheckpointError(
                f"{self._directory}: no step has a value of train.best_metric; evaluate the newest or a --step"
            )
        step, items = self._first_intact(step, lambda step, meta: self._restore(step, meta, {"teacher": abstract}), True)
        return step, items["teacher"]

    def read_network(self, network: str, step: int | None = None) -> tuple[int, Params]:
        """Reads one network without knowing its model; optimizer and the other network are not read.

        Args:
            network: "teacher" or "student".
            step: of the checkpoint; None is the result, see `result_step`.

        Returns:
            (step, parameters as NumPy arrays).
        """
        item = {"teacher": "teacher", "student": "train"}[network]
        prefix = "" if network == "teacher" else "student/"
        step, items = self._first_intact(step, lambda step, meta: {item: self._read_part(step, meta, item, prefix)}, True)
        return step, items[item] if network == "teacher" else items[item]["student"]

    def read_centers(self, step: int) -> dict[str, np.ndarray]:
        """Reads a step's centers of the teacher's logits, [K] float32 each; an imported step has none."""
        if "train" not in self._meta(step)["arrays"]:
            return {}
        load = lambda step, meta: {"train": self._read_part(step, meta, "train", "centers/")}
        return flatten_dict(self._first_intact(step, load)[1]["train"], sep="/")

    def _read_part(self, step: int, meta: dict[str, Any], item: str, prefix: str) -> dict[str, Any]:
        """The arrays of an item whose names have a prefix, as NumPy arrays, without knowing the model."""
        stored = self._stored(step, meta, item)
        names = [name for name in stored if name.startswith(prefix)]
        tree = unflatten_dict({name: jax.ShapeDtypeStruct(*stored[name][:2]) for name in names}, sep="/")
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(item=tree, restore_args=as_arrays, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self._directory / str(step) / item, args=args)

    def best_step(self, among: list[int] | None = None) -> int | None:
        """The step with the best value of the best metric; None where no step has one."""
        ranked = self._ranked(self.steps() if among is None else among)
        return ranked[0] if ranked else None

    def result_step(self) -> int:
        """The step that a run is used by: the best one, or where none has a value of the best metric the newest."""
        return self._candidates(None, best=True)[0]

    def close(self) -> None:
        """Waits until the last save is written.

        Raises:
            SaveError: it could not be written.
        """
        try:
            self._wait()
            if not self._read_only:
                _empty_trash(self._directory)
        finally:
            self._manager.close()

    def _save(self, step: int, config: ConfigDict, value: float | None, **items: Any) -> None:
        self._wait()
        _empty_trash(self._directory)  # Orbax only renames: without this, all that it ever deleted would stay on the disk
        arrays = {item: array_records(tree) for item, tree in items.items()}
        meta = {"schema": SCHEMA, "step": step, "config": config.to_dict(), "jax": jax.__version__, "arrays": arrays}
        if value is not None and math.isfinite(value):
            meta["best"] = {"metric": self._best_metric, "value": value}
            self._known_values()[step] = value
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args = ocp.args.Composite(**trees, meta=ocp.args.JsonSave(meta | {"digest": digest(meta)}))
        with self._writing(step):
            done = self._manager.save(step, force=True, args=args)
        if not done:
            raise CheckpointError(f"{self._directory}: step {step} was not saved; newer steps {self.steps()} lie there")
        self._saving = step

    def _wait(self) -> None:
        if self._saving is not None:
            step, self._saving = self._saving, None
            with self._writing(step):
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # OSError, ValueError or JaxRuntimeError, as the layer below likes
            if jax.process_count() == 1:
                self._manager.reload()  # Orbax counts a step from the moment it is begun
            raise SaveError(
                f"{self._directory}/{step} could not be written ({_first_line(error)}); {free_space(str(self._directory))}; "
                f"whole steps: {self.steps() or 'none'}; make room and run again with this --workdir"
            ) from error

    def _first_intact(
        self, asked: int | None, load: Callable[[int, dict[str, Any]], dict[str, Any]], best: bool = False
    ) -> tuple[int, dict[str, Any]]:
        """(step, items) of the first candidate that is not damaged; quarantines those that are.

        Args:
            asked: this step alone.
            load: reads items of (step, meta).
            best: first the steps with a value of the best metric, from the best to the worst, then the others; else from the
                newest to the oldest.
        """
        damaged: dict[int, Exception] = {}
        for step in self._candidates(asked, best):
            try:
                items = self._read(step, load)
            except _Damaged as error:
                damaged[step] = error
                logging.error("%s/%d is damaged: %s", self._directory, step, error)
                continue
            if damaged and not self._read_only:
                self._quarantine(list(damaged))
            return step, items
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in list(damaged.items())[:3])
        if asked is not None:
            rest = [step for step in self.steps() if step != asked]
            raise CheckpointError(f"{self._directory} is damaged ({reasons}); choose another step: {rest or 'there is none'}")
        raise CheckpointError(
            f"{self._directory}: none of the steps {', '.join(map(str, damaged))} can be read ({reasons}); refusing to start "
            "from scratch; put back a copy, or give another --workdir"
        )

    def _candidates(self, asked: int | None, best: bool) -> list[int]:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self._directory} holds no checkpoint; train first, or give the --workdir of a run")
        if asked is not None and asked not in steps:
            raise CheckpointError(f"{self._directory} has no step {asked}; it has {', '.join(map(str, steps))}")
        if asked is not None:
            return [asked]
        ranked = self._ranked(steps) if best else []
        return ranked + [step for step in reversed(steps) if step not in ranked]

    def _read(self, step: int, load: Callable[[int, dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """The items of a step, compared with their fingerprints.

        Raises:
            _Damaged: in all processes, if one of them cannot read its part or the arrays are not those that were saved.
            CheckpointError: the step is of another model or version.
        """
        error = None
        try:
            meta = self._meta(step)
            items = load(step, meta)
        except (_Damaged, CheckpointError) as problem:
            error = problem
        except Exception as problem:  # whatever a layer below raises when it reads changed bytes
            error = _Damaged(f"unreadable ({type(problem).__name__}: {_first_line(problem)})")
        if not processes.minimum_of_processes(error is None):
            raise error or _Damaged("another process cannot read it")
        for item, tree in items.items():
            found = fingerprints(tree)
            wrong = [name for name, value in found.items() if value != meta["arrays"][item][name][2]]
            if wrong:
                raise _Damaged(f"{len(wrong)} of {len(found)} arrays have another fingerprint, first {item}/{wrong[0]}")
        return items

    def _meta(self, step: int) -> dict[str, Any]:
        try:
            meta = json.loads((self._directory / str(step) / "meta" / "metadata").read_bytes())
            stored = meta.pop("digest")
        except Exception as error:
            raise _Damaged(f"meta is unreadable ({type(error).__name__}: {_first_line(error)})") from error
        if stored != digest(meta):
            raise _Damaged("meta has another digest than when it was saved")
        if meta["schema"] != SCHEMA:
            raise CheckpointError(
                f"{self._directory}/{step} has format {meta['schema']}, and this version reads {SCHEMA}; use the version that "
                "wrote it, or another --workdir"
            )
        return meta

    def _stored(self, step: int, meta: dict[str, Any], item: str) -> dict[str, Any]:
        """name -> (shape, dtype, fingerprint) of an item."""
        if item not in meta["arrays"]:
            raise CheckpointError(
                f"{self._directory}/{step} holds an imported teacher alone; to train from it, pass it as "
                "--config.init.weights with another --workdir"
            )
        return meta["arrays"][item]

    def _restore(self, step: int, meta: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
        for name, abstract in items.items():
            wrong = array_differences(abstract, self._stored(step, meta, name))
            if wrong:
                raise CheckpointError(
                    f"{self._directory}/{step} does not fit this model: {len(wrong)} arrays differ, first "
                    f"{'; '.join(wrong[:3])}; use the config.json beside it or another --workdir"
                )
        restore = {name: ocp.args.StandardRestore(abstract) for name, abstract in items.items()}
        return dict(self._manager.restore(step, args=ocp.args.Composite(**restore)))

    def _quarantine(self, steps: list[int]) -> None:
        # A damaged step that stays would take a kept one's place, and Orbax would refuse to save it again.
        if processes.is_first():
            for step in steps:
                (self._directory / str(step)).rename(self._directory / f"{step}{DAMAGED}{int(time.time())}")
        processes.wait_for_all()
        self._manager.reload()

    def _known_values(self) -> dict[int, float]:
        """step -> value of the best metric, read from the steps on disk when first asked for."""
        if self._values is None:
            self._values = {}
            for step in self.steps():
                with contextlib.suppress(_Damaged, CheckpointError):
                    best = self._meta(step).get("best", {})
                    if self._best_metric and best.get("metric") == self._best_metric:
                        self._values[step] = best["value"]
        return self._values

    def _ranked(self, steps: list[int]) -> list[int]:
        """Sorts the steps that have a value of the best metric, best first."""
        values = self._known_values()
        return sorted((s for s in steps if s in values), key=lambda s: (-BEST_METRICS[self._best_metric].sign * values[s], s))


class _KeepBest(policies.PreservationPolicy):
    """Keeps the best step; Orbax's own policy would store the values in a file without a digest."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        best = self._checkpoints.best_step([info.step for info in checkpoints])
        return [info.step == best for info in checkpoints]


def _empty_trash(directory: epath.Path) -> None:
    if processes.is_first():
        (directory / TRASH).rmtree(missing_ok=True)


def _remove_leftovers(directory: epath.Path) -> None:
    """Deletes what a killed process left of saves and deletions; Orbax does so in the background and fails on the trash."""
    _empty_trash(directory)
    if processes.is_first() and directory.exists():
        for path in directory.iterdir():
            begun = path.name.isdigit() and not (path / "commit_success.txt").exists()
            if begun or ".orbax-checkpoint-tmp" in path.name:
                path.rmtree()


def compile_fingerprints(state: TrainState) -> None:
    """Compiles the fingerprints of a state before the first save needs them."""
    for tree in _items(state).values():
        fingerprints(tree)


def _items(state: TrainState) -> dict[str, Any]:
    fields = {name: field for name, field in state._asdict().items() if field is not None}
    return {"teacher": fields.pop("teacher"), "train": fields}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def free_space(directory: str) -> str:
    """Describes the free space of a directory, for messages: bytes, and files where the file system limits their number."""
    if "://" in directory:
        return "its free space is not known"
    found = os.statvfs(directory)
    files_left = f", for {found.f_favail:,} more files" if found.f_files else ""
    return f"{found.f_bavail * found.f_frsize / 2**20:,.1f} MiB are free there{files_left}"
