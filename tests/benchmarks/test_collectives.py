"""Collectives read from programs for eight devices of a CPU, against values computed by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.collectives import Collective, collectives

ROOT = Path(__file__).parents[2]

PROGRAMS = """
import functools, json
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
from benchmarks.collectives import collectives

mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)

def both(x):  # of one device [64, 16]
    return lax.psum((x, x[0]), ("data", "model"))

def rounded(x):
    return lax.psum(x.astype(jnp.bfloat16), "data")

def others(x):
    return (
        lax.all_gather(x, "model", tiled=True),
        lax.psum_scatter(x, "data", tiled=True),
        lax.all_to_all(x, "model", 0, 0, tiled=True),
        lax.ppermute(x, "model", [(0, 1), (1, 2), (2, 3), (3, 0)]),
    )

def nested(x):
    inner = lambda _, x: lax.psum(x, "model") / 4
    return lax.fori_loop(0, 3, lambda _, x: lax.psum(lax.fori_loop(0, 5, inner, x * 2) + 1, "data"), x)

def unbounded(x):
    return lax.while_loop(lambda x: x[0, 0] < 10, lambda x: lax.psum(x, "model"), x)

def read(program):
    sharded = jax.shard_map(program, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    return collectives(jax.jit(sharded).lower(jax.ShapeDtypeStruct((128, 16), jnp.float32)).compile().as_text())

print(json.dumps({program.__name__: read(program) for program in (both, rounded, others, nested, unbounded)}))
"""


@pytest.fixture(scope="module")
def read():
    """Collectives of PROGRAMS, by program."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    as_tuples = lambda op, size, shapes, *rest: Collective(op, size, tuple(map(tuple, shapes)), *rest)
    return {name: [as_tuples(*of_program) for of_program in listed] for name, listed in found.items()}


def test_sum_of_two_arrays_over_all_devices(read):
    (sums,) = read["both"]
    assert sums == Collective("all-reduce", 4 * (64 * 16 + 16), ((64, 16), (16,)), 8, 1)
    assert sums.wire_bytes == 2 * 7 / 8 * sums.bytes


def test_sum_in_bfloat16_has_its_bytes(read):
    (sums,) = read["rounded"]
    assert (sums.bytes, sums.group_size) == (2 * 64 * 16, 2)


def test_sizes_and_wire_bytes_by_kind(read):
    whole = 4 * 64 * 16
    found = {one.op: (one.bytes, one.group_size, one.executions, one.wire_bytes) for one in read["others"]}
    assert len(read["others"]) == 4
    assert found == {
        "all-gather": (4 * whole, 4, 1, 3 * whole),
        "reduce-scatter": (whole, 2, 1, whole / 2),
        "all-to-all": (whole, 4, 1, whole * 3 / 4),
        "collective-permute": (whole, 4, 1, whole),
    }


def test_trip_counts_of_nested_loops_multiply(read):
    array = ((64, 16),)
    assert sorted(read["nested"]) == [Collective("all-reduce", 4096, array, 2, 3), Collective("all-reduce", 4096, array, 4, 15)]


def test_unknown_trip_counts_are_not_guessed(read):
    (inside,) = read["unbounded"]
    assert inside.executions is None
    with pytest.raises(ValueError, match="unknown trip count"):
        _ = inside.wire_bytes


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("module @jit_f { func.func public @main }")
