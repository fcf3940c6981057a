"""Which values may change between two starts of a run, and how the others are named."""

import json

import pytest

from cmd_jax import config as config_lib
from cmd_jax.config import BY_HARDWARE, Hardware, default, flatten
from cmd_jax.errors import ConfigError
from cmd_jax.training.resume import RESUMABLE_KEYS, check_unchanged, config_differences, has_steps, with_stored_values


def _resolved():
    return config_lib.resolve(default(), 1000)


def _stored(config):
    return json.loads(json.dumps(config.to_dict()))


def _with(stored, key, value):
    *section, name = key.split(".")
    changed = json.loads(json.dumps(stored))
    (changed[section[0]] if section else changed)[name] = value
    return changed


def test_every_key_is_compared_unless_it_is_resumable():
    config = _resolved()
    assert config_differences(_stored(config), config) == []
    for key, value in flatten(config).items():
        found = config_differences(_with(_stored(config), key, "another"), config)
        # the parts of a batch change no number here: nothing looks across images
        is_free = key in RESUMABLE_KEYS or key == "train.accumulate"
        assert found == ([] if is_free else [f"{key} is 'another' there and {value!r} here"])


@pytest.mark.parametrize(
    "across_images", [{"method.koleo_weight": 0.1}, {"method.centering": "sinkhorn"}, {"head.batch_norm": True}]
)
def test_accumulation_counts_where_images_interact(across_images):
    config = _resolved()
    config.update_from_flattened_dict(across_images)
    changed = _with(_stored(config), "train.accumulate", 2)
    assert config_differences(changed, config) == ["train.accumulate is 2 there and 1 here"]


def test_keys_of_other_versions_are_not_compared():
    stored = _with(_stored(_resolved()), "views.sharpness", 1.0)
    del stored["views"]["hue"]
    assert config_differences(stored, _resolved()) == []


def test_first_three_differences_are_named(tmp_path):
    config = _resolved()
    check_unchanged(config, str(tmp_path), {})  # nothing to compare with
    config_lib.save(config, str(tmp_path / "config.json"))
    check_unchanged(config, str(tmp_path), {})
    config.update_from_flattened_dict({"seed": 1, "optim.lr": 1.0, "optim.min_lr": 0.5, "views.global_scale": (0.5, 1.0)})
    with pytest.raises(ConfigError) as caught:
        check_unchanged(config, str(tmp_path), {})
    assert str(caught.value) == (
        f"{tmp_path}/config.json is of another run: optim.lr is 0.0005 there and 1.0 here; optim.min_lr is 1e-06 there and 0.5 "
        "here; seed is 0 there and 1 here; and 1 more; give the old values or another --workdir, or edit the file where the "
        "change is meant"
    )


def test_open_keys_keep_their_first_values(tmp_path):
    started = config_lib.resolve(default(), 5994, Hardware("gpu", 16, 60 * 2**30))
    config_lib.save(started, str(tmp_path / "config.json"))
    assert not has_steps(str(tmp_path))  # no step was saved: it begins anew
    (tmp_path / "checkpoints" / "50").mkdir(parents=True)
    assert has_steps(str(tmp_path))
    for hardware in (Hardware("cpu"), Hardware("gpu", 4, 60 * 2**30)):
        continued = config_lib.resolve(with_stored_values(default(), str(tmp_path)), 5994, hardware)
        check_unchanged(continued, str(tmp_path), {})
        assert [flatten(continued)[key] for key in BY_HARDWARE] == ["bfloat16"] * 3 + [1024]
    given = default()
    given.train.batch_size = 64
    continued = config_lib.resolve(with_stored_values(given, str(tmp_path)), 5994)
    with pytest.raises(ConfigError, match=r"train\.batch_size is 1024 there and 64 here"):
        check_unchanged(continued, str(tmp_path), {})


def test_hardware_changes_no_compared_key():
    """All that differs between a CPU and 16 GPUs is either a matter of speed or kept by a run that is continued."""
    cpu, gpus = (config_lib.resolve(default(), 5994, hardware) for hardware in (Hardware("cpu"), Hardware("gpu", 16, 2**36)))
    assert {phrase.split()[0] for phrase in config_differences(_stored(cpu), gpus)} == set(BY_HARDWARE)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "is not a configuration but a list")])
def test_damaged_config_json_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    for read in (lambda: check_unchanged(_resolved(), str(tmp_path), {}), lambda: config_lib.load(str(path))):
        with pytest.raises(ConfigError, match=f"config.json {message}"):
            read()
