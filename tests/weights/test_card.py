"""Model cards: names chosen by strangers stay text, never markup, YAML or code."""

import re

import pytest
import yaml

from cmd_jax import config as config_lib
from cmd_jax.metrics import Number
from cmd_jax.normalization import statistics_of
from cmd_jax.weights.card import CardFacts, markdown, model_card

STATISTICS = statistics_of("0.5,0.5,0.5/0.25,0.5,0.5")
HOSTILE = [
    "<script>alert(1)</script>",
    "a | b | c",
    "[here](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "https://evil.example",
    "```\nimport os",
    "---\nlicense: mit",
    '"]\n- evil: "1',
    "{{ 7 * 7 }}{% raw %}",
    "# heading\n",
    "\u202eevil\x1b[2J",
    "$x$ &amp; *a* _b_ ~c~ @team",
    "\\`\\",
]


def _card(name, form="safetensors"):
    config = config_lib.resolve(config_lib.default(), 0)
    config.data.source, config.data.folder, config.init.weights = "folder", name, name
    facts = CardFacts(form, name, name, config.to_dict(), 3, "teacher", 1000, 96, 2, "f" * 32, STATISTICS)
    return model_card(facts, [Number(name, name, 1.0, name)])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(name):
    card, plain = _card(name), _card("plain")
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    parsed = yaml.safe_load(front)
    assert parsed["license"] == "other"
    assert set(parsed) == {"library_name", "pipeline_tag", "license", "tags", "model-index"}
    shown = parsed["model-index"][0]["name"]
    assert all(letter.isprintable() for letter in card.replace("\n", ""))
    assert card.count("\n") == plain.count("\n")  # no line was added
    assert card.count("```") == 2
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    names = {}
    loaded = code[code.index("load(") + len("load(") : code.index(")\nfeatures")]
    exec(f"found = {loaded}", names)  # a string of Python, whatever the name
    assert names["found"] == shown
    prose = re.sub(r"\\.", "", body.replace(code, ""))  # what is left has a meaning in Markdown
    for mark in ("<script", "](https://evil", "https://evil", "@team", "`\nimport", "49"):
        assert mark not in prose, mark
    assert body.splitlines()[1] == f"# {markdown(name)}"


def test_plain_text_is_not_escaped():
    assert markdown("k-NN top-1 (k=10), 5.5 %") == "k-NN top-1 (k=10), 5.5 %"
    assert markdown(markdown("a_b")) == "a\\_b"


@pytest.mark.parametrize("form", ["safetensors", "stablehlo", "onnx", "timm", "hf"])
@pytest.mark.parametrize("preset", ["vit_small", "swin_tiny"])
def test_every_format_and_model_has_a_card(form, preset):
    config = config_lib.default()
    config.model.name, config.data.normalization, config.data.grayscale = preset, "local_contrast", True
    config = config_lib.resolve(config, 0)
    facts = CardFacts(form, "m", "m", config.to_dict(), 0, "teacher", 1000, 96, 2, "f" * 32, STATISTICS)
    card = model_card(facts, [])
    assert "{{" not in card
    assert ("its MIL weights say nothing" in card) == (form not in ("timm", "hf"))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
