"""How much memory a process may take: the machine's, and that of every cgroup around it, in and out of containers."""

import math

import psutil
import pytest

from cmd_jax.data.cache import available_memory, cgroup_memory

MIB = 2**20


@pytest.fixture
def root(tmp_path):
    """Writes files of a machine, given by path below its root, and returns the root."""

    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return str(tmp_path)

    return write


def v2(folder, limit, used, inactive=0, high="max"):
    of = f"sys/fs/cgroup/{folder}"
    stat = f"anon 1\ninactive_file {inactive}\nactive_file 5\n"
    return {
        f"{of}memory.max": f"{limit}\n",
        f"{of}memory.high": high,
        f"{of}memory.current": f"{used}\n",
        f"{of}memory.stat": stat,
    }


def v1(folder, limit, used, inactive=0):
    of = f"sys/fs/cgroup/memory/{folder}memory."
    stat = f"inactive_file 7\ntotal_inactive_file {inactive}\n"
    return {f"{of}limit_in_bytes": f"{limit}\n", f"{of}usage_in_bytes": f"{used}\n", f"{of}stat": stat}


def test_cgroup_v2_tightest_limit(root):
    files = {"proc/self/cgroup": "0::/job/step\n"}
    files |= v2("job/step/", "max", 10 * MIB) | v2("job/", 100 * MIB, 70 * MIB, inactive=20 * MIB)
    assert cgroup_memory(root(files)) == 50 * MIB
    assert cgroup_memory(root(v2("job/step/", 30 * MIB, 10 * MIB))) == 20 * MIB
    assert cgroup_memory(root(v2("job/step/", 30 * MIB, 10 * MIB, high=f"{15 * MIB}\n"))) == 5 * MIB
    assert cgroup_memory(root(v2("job/step/", 30 * MIB, 31 * MIB))) == 0


@pytest.mark.parametrize("path", ["/", "/kubepods/pod1/abc", "/../../abc"])
def test_cgroup_v2_in_a_container(root, path):
    assert cgroup_memory(root({"proc/self/cgroup": f"0::{path}\n"} | v2("", 64 * MIB, MIB))) == 63 * MIB


@pytest.mark.parametrize("folder", ["", "docker/abc/"])
def test_cgroup_v1(root, folder):
    lines = "9:name=systemd:/x\n4:cpu,memory:/docker/abc\n3:cpuset:/\n0::/\n"
    files = {"proc/self/cgroup": lines} | v1("", 2**63 - 4096, 900 * MIB) | v1(folder, 100 * MIB, 90 * MIB, inactive=40 * MIB)
    assert cgroup_memory(root(files)) == 50 * MIB


def test_no_cgroups(root, monkeypatch):
    assert cgroup_memory(root({})) == math.inf
    where = root({"proc/self/cgroup": "0::/\n"} | v2("", "max", MIB))
    assert cgroup_memory(where) == math.inf
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("memory", (), {"available": 40 * MIB}))
    assert available_memory(where) == 40 * MIB
    assert available_memory(root(v2("", 30 * MIB, MIB))) == 29 * MIB
