"""The manifests, the image and the scripts before the clouds' own schemas, parsers and linters."""

import pytest

from tests.launch import manifests
from tests.launch.stage import LAUNCH

CHECKS = [
    (manifests.shell, "tpu_vm.sh"),
    (manifests.shell, "tpu_worker.sh"),
    (manifests.shell, "slurm.sbatch"),
    (manifests.dockerfile, "Dockerfile"),
    (manifests.image, "Dockerfile"),
    (manifests.yaml_style, "gke_jobset.yaml"),
    (manifests.yaml_style, "sky_tpu.yaml"),
    (manifests.yaml_style, "sky_gpu.yaml"),
    (manifests.jobset, "gke_jobset.yaml"),
    (manifests.sky, "sky_tpu.yaml"),
    (manifests.sky, "sky_gpu.yaml"),
]


@pytest.mark.parametrize(("check", "name"), CHECKS, ids=[f"{check.__name__}-{name}" for check, name in CHECKS])
def test_accepted(check, name):
    check(LAUNCH / name)


def test_every_file_is_checked():
    assert {path.name for path in LAUNCH.iterdir()} == {name for _, name in CHECKS} | {"README.md"}
