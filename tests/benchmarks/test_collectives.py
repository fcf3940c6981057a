"""Collectives read from programs for eight devices of a CPU, and from text as the TPU compiler writes it; expected by hand."""

# ruff: noqa: E501 (a line of HLO is one instruction)

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

print(json.dumps({program.__name__: read(program) for program in (both, others, nested, unbounded)}))
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


def test_a_sum_of_two_arrays_over_all_devices(read):
    (sums,) = read["both"]
    assert sums == Collective("all-reduce", 4 * (64 * 16 + 16), ((64, 16), (16,)), 8, 1)
    assert sums.wire_bytes == 2 * 7 / 8 * sums.bytes


def test_every_other_kind_has_its_size_and_wire_bytes(read):
    whole = 4 * 64 * 16
    found = {one.op: (one.bytes, one.group_size, one.executions, one.wire_bytes) for one in read["others"]}
    assert len(read["others"]) == 4
    assert found == {
        "all-gather": (4 * whole, 4, 1, 3 * whole),
        "reduce-scatter": (whole, 2, 1, whole / 2),
        "all-to-all": (whole, 4, 1, whole * 3 / 4),
        "collective-permute": (whole, 4, 1, whole),
    }


def test_loops_multiply_through_all_levels(read):
    array = ((64, 16),)
    assert sorted(read["nested"]) == [Collective("all-reduce", 4096, array, 2, 3), Collective("all-reduce", 4096, array, 4, 15)]


def test_a_loop_without_a_known_count_is_not_guessed(read):
    (inside,) = read["unbounded"]
    assert inside.executions is None
    with pytest.raises(ValueError, match="unknown trip count"):
        _ = inside.wire_bytes


# As compiled for a v5e:2x4: no notes of trip counts, layouts with tiles, constants carried through an outer loop.
LOOPS = """
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %y = f32[]{:T(128)} parameter(1)
  %x = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%inner_body (p: (s32[], bf16[512,256], s32[])) -> (s32[], bf16[512,256], s32[]) {
  %p = (s32[]{:T(128)}, bf16[512,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[512,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %bound = s32[]{:T(128)} get-tuple-element(%p), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %all-reduce.1 = bf16[512,256]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, bf16[512,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) tuple(%next, %all-reduce.1, /*index=2*/%bound)
}

%inner_condition (p.1: (s32[], bf16[512,256], s32[])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[512,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %bound.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %bound.1), direction=LT
}

%outer_body (q: (s32[], bf16[512,256], s32[])) -> (s32[], bf16[512,256], s32[]) {
  %q = (s32[]{:T(128)}, bf16[512,256]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x.2 = bf16[512,256]{1,0:T(8,128)(2,1)} get-tuple-element(%q), index=1
  %carried = s32[]{:T(128)} get-tuple-element(%q), index=2
  %two = s32[]{:T(128)} constant(2)
  %start = (s32[]{:T(128)}, bf16[512,256]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%two, %x.2, %carried)
  %while.1 = (s32[]{:T(128)}, bf16[512,256]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) while(%start), condition=%inner_condition, body=%inner_body
  %y.2 = bf16[512,256]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
  %minus = s32[]{:T(128)} constant(-4)
  %next.1 = s32[]{:T(128)} add(%j, %minus)
  ROOT %out.1 = (s32[]{:T(128)}, bf16[512,256]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%next.1, %y.2, %carried)
}

%outer_condition (q.1: (s32[], bf16[512,256], s32[])) -> pred[] {
  %q.1 = (s32[]{:T(128)}, bf16[512,256]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %j.1 = s32[]{:T(128)} get-tuple-element(%q.1), index=0
  %zero = s32[]{:T(128)} constant(0)
  ROOT %gt = pred[]{:T(512)} compare(%j.1, %zero), direction=GT
}

ENTRY %main (w: bf16[512,256], n: s32[]) -> bf16[512,256] {
  %w = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %n = s32[]{:T(128)} parameter(1)
  %ten = s32[]{:T(128)} constant(10)
  %copy.1 = s32[]{:T(128)} copy(%ten)
  %first = s32[]{:T(128)} constant(12)
  %start.1 = (s32[]{:T(128)}, bf16[512,256]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%first, %w, BOUND)
  %while.2 = (s32[]{:T(128)}, bf16[512,256]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}) while(%start.1), condition=%outer_condition, body=%outer_body
  ROOT %result = bf16[512,256]{1,0:T(8,128)(2,1)} get-tuple-element(%while.2), index=1
}
"""


def test_a_loop_without_the_compilers_note_is_counted_by_its_counter():
    # 12, 8, 4 of the outer loop; 2 .. 9 of the inner one, whose bound passes through the outer loop's state.
    assert collectives(LOOPS.replace("BOUND", "%copy.1")) == [Collective("all-reduce", 2 * 512 * 256, ((512, 256),), 2, 3 * 8)]


def test_a_bound_that_is_an_argument_is_not_known():
    (inside,) = collectives(LOOPS.replace("BOUND", "%n"))
    assert inside.executions is None


# An all-gather that runs beside a product: the same collective stands in three fusions.
PARTS = """
HloModule jit_g, is_scheduled=true, num_partitions=8

%first (a: f32[64,128]) -> (f32[64,128], f32[128,128]) {
  %a = f32[64,128]{1,0:T(8,128)S(1)} parameter(0)
  %all-gather.6 = f32[128,128]{1,0:T(8,128)} all-gather(%a), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %begun = (f32[64,128]{1,0:T(8,128)S(1)}, f32[128,128]{1,0:T(8,128)}) custom-call(%all-gather.6), custom_call_target="AsyncCollectiveStart"
}

%last (b: f32[64,128], c: f32[128,128]) -> f32[128,128] {
  %b = f32[64,128]{1,0:T(8,128)S(1)} parameter(0)
  %c = f32[128,128]{1,0:T(8,128)} parameter(1)
  %all-gather.8 = f32[128,128]{1,0:T(8,128)} all-gather(%b), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %done = f32[128,128]{1,0:T(8,128)} custom-call(%b, %c, %all-gather.8), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[64,128]) -> f32[128,128] {
  %x = f32[64,128]{1,0:T(8,128)} parameter(0)
  %started = (f32[64,128]{1,0:T(8,128)S(1)}, f32[128,128]{1,0:T(8,128)}) fusion(%x), kind=kCustom, calls=%first
  %begun.1 = f32[64,128]{1,0:T(8,128)S(1)} get-tuple-element(%started), index=0
  %begun.2 = f32[128,128]{1,0:T(8,128)} get-tuple-element(%started), index=1
  ROOT %out = f32[128,128]{1,0:T(8,128)} fusion(%begun.1, %begun.2), kind=kCustom, calls=%last
}
"""


def test_the_fusions_of_one_collective_count_once():
    assert collectives(PARTS) == [Collective("all-gather", 4 * 128 * 128, ((128, 128),), 2, 1)]


STARTS = """
HloModule jit_h, is_scheduled=true, num_partitions=8

ENTRY %main (x: f32[64,16], y: s8[32]) -> f32[64,16] {
  %x = f32[64,16]{1,0} parameter(0)
  %y = s8[32]{0} parameter(1)
  %gather = ((f32[64,16]{1,0}, s8[32]{0}), (f32[256,16]{1,0}, s8[128]{0})) all-gather-start(%x, %y), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %gathered = (f32[256,16]{1,0}, s8[128]{0}) all-gather-done(%gather)
  %reduce = (f32[64,16]{1,0}, s8[32]{0}) all-reduce-start(%x, %y), replica_groups={}, to_apply=%add
  %reduced = (f32[64,16]{1,0}, s8[32]{0}) all-reduce-done(%reduce)
  %scatter = ((f32[64,16]{1,0}), f32[16,16]{1,0}, u32[]{:S(2)}) reduce-scatter-start(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %scattered = f32[16,16]{1,0} reduce-scatter-done(%scatter)
  %permute = (f32[64,16]{1,0}, f32[64,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %permuted = f32[64,16]{1,0} collective-permute-done(%permute)
}
"""


def test_forms_in_two_parts_count_once_with_their_results():
    assert collectives(STARTS) == [
        Collective("all-gather", 4 * 256 * 16 + 128, ((256, 16), (128,)), 4, 1),
        Collective("all-reduce", 4 * 64 * 16 + 32, ((64, 16), (32,)), 8, 1),
        Collective("reduce-scatter", 4 * 64 * 16, ((16, 16),), 4, 1),
        Collective("collective-permute", 4 * 64 * 16, ((64, 16),), 2, 1),
    ]


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("module @jit_f { func.func public @main }")
