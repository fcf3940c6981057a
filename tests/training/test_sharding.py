"""One program on any mesh: the same numbers; only gradients, statistics and parameters of a state that is split are sent."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.collectives import collectives
from cmd_jax import config as config_lib
from cmd_jax.models.build import make_network
from cmd_jax.models.heads import ProjectionHead
from cmd_jax.training.optimizer import adamw, make_groups
from cmd_jax.training.schedules import make_schedules
from cmd_jax.training.sharding import all_hardware, local_copy, make_shardings
from cmd_jax.training.state import init_state
from cmd_jax.training.step import make_train_step, on_devices
from tests.conftest import normal, quick, tiny
from tests.training.test_step import IMAGES, _batch

pytestmark = pytest.mark.long("meshes")
ROOT = Path(__file__).parents[2]
STEPS = 3
ALL_REDUCES = 2  # gradients with the bottlenecks' means that centers are made of; statistics of the metrics
NUMBERS = ("loss", "grad_norm", "loss_inter_student", "teacher_entropy")
# Of the step. Level 0 is left out: it gives other views, with wrong pixels where the colours of a view are clipped.
OPTIONS = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
MESHES = {
    "1": {},
    "4": {"model.packed_views": False},
    "4, split state, accumulate 2": {"mesh.shard_state": True, "train.accumulate": 2},
}


def main():
    """Prints for each mesh: numbers of the steps, collectives, bytes of state on a device."""
    out, compiled_events = {}, []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled_events.append(event) if event.endswith("backend_compile_duration") else None
    )
    for name, options in MESHES.items():
        devices = jax.devices()[: int(name[0])]
        config = tiny()
        config.views.local_count = 2
        config.model.drop_path = 0.0  # drawn anew for each part of a batch
        config.update_from_flattened_dict(options)
        config = config_lib.resolve(config, IMAGES, all_hardware()._replace(devices=len(devices)))
        shardings, network = make_shardings(config, devices), make_network(config)
        optimizer = adamw(config.optim.clip_grad, make_groups(config, 1))
        init = lambda: init_state(config, network, optimizer, IMAGES)  # noqa: B023, called in this turn
        placed = shardings.of_state(jax.eval_shape(init))
        state = quick(init, out_shardings=placed)()
        step = jax.jit(
            make_train_step(config, network, optimizer, make_schedules(config, IMAGES), shardings),
            in_shardings=(placed, shardings.batch),
            out_shardings=(placed, shardings.replicated),
        )
        batch = _batch()
        compiled = step.lower(state, batch).compile(OPTIONS)
        numbers = []
        for number in range(STEPS):
            moved = batch._replace(canvas=np.roll(batch.canvas, number, axis=1))
            state, metrics = compiled(state, jax.device_put(moved, shardings.batch))
            numbers.append([float(metrics[key]) for key in NUMBERS])
        local = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state))
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        sent = [(c.op, c.shapes, c.bytes, c.executions) for c in collectives(compiled.as_text())]
        out[name] = {"numbers": numbers, "collectives": sent, "state": [local, whole]}
        local_copy(state.teacher, shardings)
        compiled_events.clear()
        copy = local_copy(state.teacher, shardings)
        whole = lambda a, copy: np.array_equal(a, copy) and copy.is_fully_replicated
        same = jax.tree.leaves(jax.tree.map(whole, state.teacher, copy))
        out[name]["copy"] = [all(same), len(compiled_events)]
    out["batch statistics"] = batch_statistics(shardings)
    print(json.dumps(out))


def batch_statistics(shardings):
    """Bottlenecks and gradients of a head with batch norm: of the whole batch, and with the batch split over the devices."""
    head, x, weights = ProjectionHead(6, 4, batch_norm=True), normal(0, 16, 3), normal(1, 16, 4)
    params = head.init(jax.random.key(0), x)
    split = on_devices(head.clone(batch_axis="data").apply, shardings, "float32")
    loss = lambda apply: jax.value_and_grad(lambda params: jnp.sum(weights * apply(params, x)))
    values = [quick(loss(apply))(params) for apply in (head.apply, split)]
    return [[np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(value)] for value in values]


@pytest.fixture(scope="module")
def meshes():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.training.test_sharding"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def parameters():
    config = config_lib.resolve(tiny(), IMAGES)
    network = make_network(config)
    return jax.eval_shape(lambda: init_state(config, network, adamw(3.0, make_groups(config, 1)), IMAGES)).student


@pytest.mark.parametrize("name", [name for name in MESHES if name != "1"])
def test_every_mesh_gives_the_same_numbers(meshes, name):
    np.testing.assert_allclose(meshes[name]["numbers"], meshes["1"]["numbers"], rtol=1e-5)


def test_batch_statistics_are_those_of_all_devices(meshes):
    for whole, split in zip(*meshes["batch statistics"], strict=True):
        np.testing.assert_allclose(split, whole, rtol=1e-4, atol=1e-5)


def test_evaluation_gets_a_whole_copy_without_compiling_again(meshes):
    assert [meshes[name]["copy"] for name in MESHES] == 3 * [[True, 0]]


def test_one_device_sends_nothing(meshes):
    assert meshes["1"]["collectives"] == []


def test_data_parallelism_adds_up_gradients_and_statistics_alone(meshes, parameters):
    sent = meshes["4"]["collectives"]
    assert Counter(op for op, *_ in sent) == {"all-reduce": ALL_REDUCES}
    assert all(executions == 1 for *_, executions in sent)  # none in the loops over prototypes and blocks
    of_parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(parameters))
    total = sum(size for _, _, size, _ in sent)
    statistics = 2048  # bytes of means and norms, of the bottlenecks for the centers, of the use of prototypes
    assert of_parameters <= total <= of_parameters + statistics


def test_the_state_is_split(meshes):
    local, whole = meshes["4"]["state"]
    assert local == whole
    split = meshes["4, split state, accumulate 2"]
    local, whole = split["state"]
    assert local < 0.5 * whole
    assert Counter(op for op, *_ in split["collectives"])["all-gather"] > 0


if __name__ == "__main__":
    main()
