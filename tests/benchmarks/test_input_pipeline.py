"""The benchmark of input pipelines runs and ends with its JSON; what it measures is not looked at."""

import io
import json
import sys

import numpy as np
from PIL import Image

from benchmarks import classical, input_pipeline
from cmd_jax.data.loader import CanvasCache


def test_the_last_line_is_json_with_its_ratios(monkeypatch, capsys):
    options = (
        "--images=4",
        "--batch_size=2",
        "--rounds=1",
        "--workers=1",
        "--step_batch_size=0",
        "--gather_batch_size=6",
        "--gather_threads=3",
    )
    monkeypatch.setattr(sys, "argv", ["input_pipeline", *options])
    input_pipeline.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["pictures"] == 4
    for name in ("classical", "first_epoch", "cached"):
        assert result[f"{name}_images_per_s"] > 0
    for threads in (1, 2, 3):
        assert result[f"gather_{threads}_threads_images_per_s"] > 0
        assert result[f"copy_{threads}_threads_images_per_s"] > 0
    for name in ("host_cost_ratio", "images_per_s_ratio", "gather_ratio", "gather_copy_ratio"):
        assert result[name] > 0


def test_the_share_of_the_views_in_a_step(tiny_config):
    tiny_config.views.local_count, tiny_config.data.cache = 0, "ram"
    cache = CanvasCache(input_pipeline.Images(input_pipeline.photographs(8)), tiny_config.data)
    views, step = input_pipeline.augmentation(tiny_config, cache, rounds=1)
    assert views > 0
    assert step > 0


def test_images_and_classical_views_follow_the_seed():
    first, again = (input_pipeline.photographs(2, seed=1) for _ in range(2))
    assert first == again
    assert first[0] != first[1]
    assert Image.open(io.BytesIO(first[0])).size == (500, 375)
    views = [classical.multi_crop(first[0], np.random.default_rng(3)) for _ in range(2)]
    assert [view.shape for view in views[0]] == [(2, 3, 224, 224), (8, 3, 96, 96)]
    for a, b in zip(*views, strict=True):
        np.testing.assert_array_equal(a, b)
