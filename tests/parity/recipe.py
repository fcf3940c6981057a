"""Schedules, optimizer, k-NN and retrieval against the references' training recipe and evaluation scripts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cmd_jax.evaluation.knn import knn_classify, knn_votes, nearest
from cmd_jax.evaluation.retrieval import ratio_split, retrieval
from cmd_jax.training.optimizer import Group, adamw, clip, is_decayed, parameter_norm
from cmd_jax.training.schedules import Schedule, cosine, epoch_linear
from cmd_jax.training.step import ema
from tests.parity.fixture import EXACT, GRADIENT, LOSS, MEAN_PRECISION, PARAMETER, SCHEDULE, VOTES, Fixture, compiled


def _values(schedule: Schedule, steps: int, every: int = 1) -> np.ndarray:
    """A schedule at steps 0, every, 2 * every, ... below `steps`, float64."""
    with jax.enable_x64(True):
        return np.asarray(schedule(jnp.arange(0, steps, every)))


def check_schedules(fixture: Fixture) -> None:
    """Learning rate, weight decay, momentum at every step and temperature at every epoch, of every case."""
    for case, meta in fixture.meta["cases"].items():
        epoch, steps = meta["niter_per_ep"], meta["epochs"] * meta["niter_per_ep"]
        peak = meta["base_lr"] * meta["global_batch_size"] / 256
        schedules = {
            "lr": cosine(peak, meta["min_lr"], steps, meta["warmup_epochs"] * epoch, meta["start_warmup_value"]),
            "wd": cosine(meta["weight_decay"], meta["weight_decay_end"], steps),
            "momentum": cosine(meta["momentum_teacher"], 1.0, steps),
        }
        for name, schedule in schedules.items():
            fixture.check(f"out_{case}_{name}", _values(schedule, steps), SCHEDULE)
        temp = epoch_linear(meta["warmup_teacher_temp"], meta["teacher_temp"], meta["warmup_teacher_temp_epochs"], epoch)
        fixture.check(f"out_{case}_teacher_temp", _values(temp, steps, every=epoch), SCHEDULE)


def check_optimizer(fixture: Fixture) -> None:
    """Steps of the recipe on given gradients: groups, clipping, frozen last layer, AdamW, EMA."""
    meta = fixture.meta
    steps, epoch = meta["steps"], meta["steps_per_epoch"]
    total = meta["epochs"] * epoch
    learning_rate = _values(cosine(meta["peak_lr"], meta["min_lr"], total, meta["warmup_epochs"] * epoch), steps)
    weight_decay = _values(cosine(meta["weight_decay"], meta["weight_decay_end"], total), steps)
    momentum = _values(cosine(meta["momentum_teacher"], 1.0, total), steps)
    for name, values in {"lr": learning_rate, "wd": weight_decay, "momentum": momentum}.items():
        fixture.check(f"out_{name}", values, SCHEDULE)
    names = fixture.find(r"in_param0__(.+)")
    group = lambda name: Group(start=meta["freeze_last_layer"] * epoch if "last_layer" in name else 0)
    for variant in ("frozen_g", "train_g"):
        given = {name: jnp.asarray(fixture[f"in_param0__{name}"]) for name in names}
        # With unit rows the gain is no parameter; it stays as it is.
        trained = [name for name in names if variant == "train_g" or not name.endswith("weight_g")]
        groups = [-1 if name not in trained else 0 if is_decayed(given[name]) else 1 for name in names]
        fixture.check(f"out_{variant}_group", np.array(groups), EXACT)
        student = {name: given[name] for name in trained}
        teacher = given
        optimizer = adamw(meta["clip_grad"], group)
        state = optimizer.init(student)
        norms = np.full((steps, len(names)), -1.0)

        @compiled
        def update(student, teacher, state, gradients, learning_rate, weight_decay, momentum, given=given, optimizer=optimizer):
            clipped = jax.tree.map(lambda gradient: clip(gradient, meta["clip_grad"]), gradients)
            rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
            updates, state = optimizer.update(gradients, state, student, **rates)
            student = optax.apply_updates(student, updates)
            teacher = ema(teacher, given | student, momentum)
            return student, teacher, state, clipped, jax.tree.map(parameter_norm, gradients)

        for step in range(steps):
            gradients = {name: jnp.asarray(fixture[f"in_grad{step}__{name}"]) for name in trained}
            student, teacher, state, clipped, norm = update(
                student, teacher, state, gradients, learning_rate[step], weight_decay[step], momentum[step]
            )
            prefix = f"out_{variant}_step{step}"
            for column, name in enumerate(names):
                if name in trained:
                    norms[step, column] = norm[name]
                    fixture.check(f"{prefix}_clipped__{name}", clipped[name], GRADIENT)
                fixture.check(f"{prefix}_student__{name}", (given | student)[name], PARAMETER)
                fixture.check(f"{prefix}_teacher__{name}", teacher[name], PARAMETER)
        fixture.check(f"out_{variant}_grad_norms", norms, LOSS)


def check_protocols(fixture: Fixture) -> None:
    """k-NN votes and accuracies, retrieval over both splits, on normalised and on raw features."""
    meta = fixture.meta
    train, test = ([fixture[f"in_{split}_{what}"] for what in ("feats", "labels")] for split in ("train", "test"))
    options = {"temp": meta["T"], "classes": meta["num_classes"]}
    neighbours = nearest(train[0], test[0], max(meta["k"]))
    for k in meta["k"]:
        votes = knn_votes(neighbours, train[1], k=k, **options)
        fixture.check(f"out_knn{k}_votes", votes, VOTES)
        result = knn_classify(neighbours, train[1], test[1], k=k, **options)
        fixture.check(f"out_knn{k}_top1", np.array(result.top1), EXACT)
        fixture.check(f"out_knn{k}_top5_positive_votes_only", np.array(result.top5), EXACT)
        fixture.check(f"out_knn{k}_top5_zero_vote_ambiguous", np.array(result.open_top5), EXACT)
        # Where fewer than five classes have votes the reference completes its top five with arbitrary ones.
        most = result.top5 + 100 * result.open_top5 / len(test[1])
        top5 = np.clip(fixture[f"out_knn{k}_top5"], np.float32(result.top5), np.float32(most))
        fixture.check(f"out_knn{k}_top5", top5, EXACT)
    for kind in ("", "raw_"):
        train[0], test[0] = (fixture[f"in_{split}_{kind.strip('_')}feats"] for split in ("train", "test"))
        for name, (gallery, queries) in {"origin": (train, test), "ratio": ratio_split(*train, *test)}.items():
            found = np.array(retrieval(*gallery, *queries)[:3])
            array = f"out_retrieval_{kind}{name}"
            fixture.check(array, found[:2], EXACT, part=slice(2))
            fixture.check(array, found[2], MEAN_PRECISION, part=2)
            if not kind:
                fixture.check(f"{array}_sizes", np.array([len(queries[1]), len(gallery[1])]), EXACT)
