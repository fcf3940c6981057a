"""Weights into and out of runs: first states, work directories, ways there and back bit for bit."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cmd_jax import config as config_lib
from cmd_jax.errors import CheckpointError, ConfigError, WeightsError
from cmd_jax.evaluation.restore import evaluate_run
from cmd_jax.inference.export import export_run
from cmd_jax.inference.load import read_trained
from cmd_jax.models.build import init_params, make_backbone, make_network
from cmd_jax.train_and_evaluate import describe_run, prepare, read_weights, train_and_evaluate
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.run import with_weights
from cmd_jax.weights.files import read_safetensors, write_safetensors
from cmd_jax.weights.layouts import LAYOUTS
from cmd_jax.weights.names import to_theirs
from cmd_jax.weights.transfer import follow_source, import_run, initial_weights
from tests.conftest import quick


def _swin(config):
    config.model.name, config.model.patch_size, config.model.window = "swin_micro", None, 2
    config.views.global_px, config.views.local_px = 64, 32
    return config


def _random_checkpoint(config, layout, path, heads=False):
    """A file under a layout's names for the model of a configuration; returns the arrays under ours."""
    resolved = config_lib.resolve(config, 0)
    shapes = flatten_dict(jax.eval_shape(lambda: init_params(resolved, make_network(resolved))), sep="/")
    rng = np.random.default_rng(0)
    parts = ("backbone/", "image_", "region_") if heads else ("backbone/",)
    ours = {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in shapes.items() if name.startswith(parts)}
    write_safetensors(str(path), to_theirs(ours, LAYOUTS[layout])[0])
    return ours


def _network(workdir, network):
    checkpoints = Checkpoints(str(workdir), read_only=True)
    step, params = checkpoints.read_network(network)
    checkpoints.close()
    return step, flatten_dict(params, sep="/")


def _read(config, source):
    config.init.weights = str(source)
    config = config_lib.resolve(config, 0)
    return initial_weights(config, make_network(config)).arrays


def _same(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(("kind", "layout"), [("vit", "hf_vit"), ("swin", "timm_swin")])
def test_import_export_import_is_bit_exact(kind, layout, tiny_config, tmp_path):
    config = _swin(tiny_config) if kind == "swin" else tiny_config
    expected = _random_checkpoint(config, layout, tmp_path / "a.safetensors")
    config.init.weights = str(tmp_path / "a.safetensors")
    import_run(config, str(tmp_path / "run"))
    size = sum(array.size for array in expected.values())
    for form, out in (("timm", tmp_path / "out.safetensors"), ("hf", tmp_path / "out")):
        assert export_run(str(tmp_path / "run"), None, "teacher", form, str(out)) == (0, size)
        _same(_read(config, out), expected)
    _same(_read(config, tmp_path / "run"), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_bit_exactly(layout, tiny_config, tmp_path):
    config = _swin(tiny_config) if LAYOUTS[layout].backbone == "swin" else tiny_config
    if "pos_embed" not in LAYOUTS[layout].rules and LAYOUTS[layout].backbone == "vit":
        config.model.positions = "rotary"
    expected = _random_checkpoint(config, layout, tmp_path / "a.safetensors")
    _same(_read(config, tmp_path / "a.safetensors"), expected)


def test_registers_survive_the_timm_layout(tiny_config, tmp_path):
    tiny_config.model.registers = 2
    expected = _random_checkpoint(tiny_config, "timm", tmp_path / "a.safetensors")
    assert "backbone/register_tokens" in expected
    _same(_read(tiny_config, tmp_path / "a.safetensors"), expected)


@pytest.fixture
def config(tiny_config, photo_folder):
    tiny_config.data.source, tiny_config.data.folder = "folder", str(photo_folder)
    tiny_config.train.epochs, tiny_config.optim.warmup_epochs = 1.0, 0.0
    return tiny_config


def test_import_is_evaluated_and_not_continued(config, tmp_path):
    _random_checkpoint(config, "dino", tmp_path / "a.safetensors")
    config.init.weights = str(tmp_path / "a.safetensors")
    workdir = str(tmp_path / "run")
    notes = import_run(config, workdir)
    assert notes[-1] == "from the seed: image_head, image_last_layer, mil_scorer, region_head, region_last_layer"
    assert evaluate_run(workdir, None).metrics.step == 0
    with pytest.raises(CheckpointError, match=r"an imported teacher alone; .* pass it as --config\.init\.weights"):
        train_and_evaluate(config, workdir)
    with pytest.raises(CheckpointError, match="an imported teacher alone"):
        export_run(workdir, None, "student", "timm", str(tmp_path / "b.safetensors"))
    with pytest.raises(CheckpointError, match="is the directory of a run; choose another --workdir"):
        import_run(config, workdir)


def test_student_and_teacher_start_from_weights(config, tmp_path, capsys):
    expected = _random_checkpoint(config, "dino", tmp_path / "a.safetensors", heads=True)
    run = prepare(config)
    seed = flatten_dict(quick(lambda: init_params(run.config, run.network))(), sep="/")
    config.init.weights = str(tmp_path / "a.safetensors")
    run = prepare(config)
    state = with_weights(run.first_state(), read_weights(run))
    assert "not used: 14 arrays of projection heads" in capsys.readouterr().out
    for params in (state.student, state.teacher):
        _same(
            flatten_dict(params, sep="/"),
            seed | {name: array for name, array in expected.items() if name.startswith("backbone/")},
        )
    pairs = zip(jax.tree.leaves(state.student), jax.tree.leaves(state.teacher), strict=True)
    assert all(a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() for a, b in pairs)  # both are donated to the step
    config.init.heads = True
    run = prepare(config)
    state = with_weights(state, initial_weights(run.config, run.network).arrays)
    for params in (state.student, state.teacher):
        _same(flatten_dict(params, sep="/"), seed | expected)


def test_run_starts_from_another_run(finished, tmp_path, config):
    config.init.weights, config.init.heads = str(finished[0]), True
    resolved = config_lib.resolve(config, 0)
    fitted = initial_weights(resolved, make_network(resolved))
    parts = "backbone, image_head, image_last_layer, mil_scorer, region_head, region_last_layer"
    step, teacher = _network(finished[0], "teacher")
    assert step == 6
    assert fitted.notes == (f"{len(fitted.arrays)} arrays of {finished[0]} (cmd_jax): {parts}",)
    _same(fitted.arrays, teacher)
    run = prepare(config)
    checkpoints = Checkpoints(str(finished[0]), read_only=True)
    centers = checkpoints.restore_state(run.abstract_state()).centers
    checkpoints.close()
    _same(fitted.centers, {f"centers/{level}": center for level, center in centers._asdict().items()})
    assert any(np.any(center != 0) for center in centers)
    jax.tree.map(
        np.testing.assert_array_equal, with_weights(run.first_state(), fitted.arrays | fitted.centers).centers, centers
    )
    resolved.init.network, resolved.init.heads, resolved.views.global_px = "student", False, 32
    larger = initial_weights(resolved, make_network(resolved))
    assert larger.arrays["backbone/pos_embed"].shape == (1, 5, 96)  # resampled on the fly
    student = _network(finished[0], "student")[1]
    np.testing.assert_array_equal(larger.arrays["backbone/norm/scale"], student["backbone/norm/scale"])
    assert np.any(teacher["backbone/norm/scale"] != student["backbone/norm/scale"])


def test_export_reads_one_network_alone(finished, tmp_path):
    workdir, config = finished
    run = prepare(config)
    checkpoints = Checkpoints(str(workdir), read_only=True)
    state = checkpoints.restore_state(run.abstract_state())
    checkpoints.close()
    for network, params in (("teacher", state.teacher), ("student", state.student)):
        out = str(tmp_path / f"{network}.safetensors")
        assert export_run(str(workdir), 6, network, "timm", out)[0] == 6
        kernel = params["backbone"]["blocks_0"]["attn"]["qkv"]["kernel"]
        np.testing.assert_array_equal(read_safetensors(out)["blocks.0.attn.qkv.weight"], np.asarray(kernel).T)
    copy = tmp_path / "without"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "6" / "train")
    export_run(str(copy), 6, "teacher", "timm", str(tmp_path / "again.safetensors"))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "teacher.safetensors").read_bytes()


def test_mistakes(config, tmp_path):
    config.init.weights = str(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="does not exist"):
        import_run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(WeightsError, match="does not exist"):
        describe_run(config)
    with pytest.raises(ConfigError, match=r"--format=timm writes a file that ends in \.safetensors"):
        export_run(str(tmp_path), None, "teacher", "timm", "directory")
    with pytest.raises(ConfigError, match="--format=hf writes a directory"):
        export_run(str(tmp_path), None, "teacher", "hf", "a.safetensors")
    config.init.network = "both"
    with pytest.raises(ConfigError, match=r"init\.network is 'both'; it must be one of teacher, student"):
        import_run(config, str(tmp_path / "run"))


def test_import_follows_the_files_beside(tmp_path, config):
    config.data.normalization = None
    source = tmp_path / "hub"
    source.mkdir()
    _random_checkpoint(config, "hf_vit", source / "model.safetensors")
    (source / "config.json").write_text('{"num_attention_heads": 2, "layer_norm_eps": 1e-12}')
    (source / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    config.init.weights = str(source)
    import_run(config, str(tmp_path / "run"))
    trained = read_trained(str(tmp_path / "run"))
    followed = trained.config
    assert (followed.model.num_heads, followed.model.layer_norm_eps) == (2, 1e-12)
    assert followed.data.normalization == "0.5,0.5,0.5/0.5,0.5,0.5"
    assert make_backbone(followed).num_heads == 2
    export_run(str(tmp_path / "run"), None, "teacher", "hf", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_norm_eps"] == 1e-12
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["image_std"] == [0.5] * 3
    config.init.weights = str(tmp_path / "run")  # and so does what starts from the import
    continued, line = follow_source(config)
    assert line == f"{tmp_path / 'run'} is a run of vit_micro/8, features at 16 px"
    assert (continued.model.num_heads, continued.model.layer_norm_eps) == (2, 1e-12)
    assert continued.data.normalization == followed.data.normalization
    config.init.weights, config.data.normalization = str(source), "imagenet"
    with pytest.raises(ConfigError, match=r"data\.normalization is 'imagenet', but .* says '0\.5"):
        import_run(config, str(tmp_path / "other"))
