"""The pages of docs/: all of them in the index, no dead link, the table of keys as in the code."""

import re

import pytest

from tests.docs.commands import PAGES, ROOT
from tests.docs.config_table import page

LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    named = {target for target in LINK.findall(index) if target.endswith(".md") and "/" not in target}
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_link_is_dead(path):
    text = path.read_text()
    for target in LINK.findall(text):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            there = path.parent / file if file else path
            assert there.exists(), target
            assert not anchor or anchor in _anchors(there.read_text()), target


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_configs_page_matches_the_table_of_keys():
    remedy = "python -m tests.docs.config_table > docs/configs.md"
    assert (ROOT / "docs" / "configs.md").read_text() == page(), remedy
