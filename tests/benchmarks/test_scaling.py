"""The benchmarks that compile for devices that are not here: what they compute beside compiling."""

import pytest

from benchmarks import scaling, tpu_compile


def test_needed_memory_is_read_from_the_refusal():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by"
    assert tpu_compile.needed_bytes(message) == 20.5 * 2**30
    assert tpu_compile.needed_bytes("INTERNAL: something else") is None


def test_every_case_has_fitting_settings():
    for model in tpu_compile.MODELS:
        for topology in tpu_compile.TOPOLOGIES:
            assert tpu_compile.FITTING[model, topology.split(":")[0]]


def test_prediction_equals_the_one_by_hand():
    all_reduce = {"op": "all-reduce", "bytes": 10**8, "group_size": 256, "executions": 1}
    row = {"flops": 197e10, "wire_bytes": 2e8, "collectives": [all_reduce]}
    predicted = scaling.predict(row, utilization=0.5)
    assert predicted["products_s"] == pytest.approx(0.02)  # 197e10 / 197e12 / 0.5
    # 2e8 bytes over two links of 50 GB/s, and 2 x 16 hops of 1 us; over four links
    assert predicted["sending_s"] == pytest.approx({"pessimistic": 0.002 + 32e-6, "optimistic": 0.001})
    assert predicted["efficiency"] == pytest.approx({"pessimistic": 0.02 / 0.022032, "optimistic": 1.0})
