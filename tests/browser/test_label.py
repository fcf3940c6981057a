"""The page of labels in a browser: groups are named, moved, merged, divided and struck by mouse and by keyboard, and saved."""

import csv
import io
import shutil

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe

from cmd_jax.labelling.groups import Group, Tree
from cmd_jax.labelling.look import Finding
from cmd_jax.labelling.page import write_page
from cmd_jax.labelling.photos import KEY_PATCHES, Photos
from cmd_jax.labelling.suggest import suggest
from cmd_jax.labelling.thumbs import read_thumb
from tests.browser.test_report import ISSUES, PHONE

NASTY = ("</script><script>alert(1)</script>.png", 'a, "quoted" <img src=x onerror=alert(2)>.png')
READY = "#groups .group [data-image]"


def _write(path, photo_folder, count, names=None, struck=(), findings=(), each=4, ruled_out=None):
    """A page of `count` images in groups of `each`; the thumbnails repeat."""
    files = sorted((photo_folder / "train").rglob("*.png"))[:: max(1, 24 // min(count, 24))]
    thumbs = [read_thumb(str(file), 48) for file in files]
    paths = [f"photos/{row}.png" for row in range(count)]
    paths[: len(NASTY)] = NASTY
    for row in range(len(NASTY), min(count, 24)):  # the page shows them large
        (path.parent / "photos").mkdir(exist_ok=True)
        shutil.copy(files[row % len(files)], path.parent / paths[row])
    features = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32) if count < 100 else None
    marks = np.zeros((count, KEY_PATCHES, 4), np.float32)
    marks[:, 0] = (0.25, 0.5, 0.25, 0.25)
    empty = np.full(count, "", object)
    shown = [thumbs[row % len(thumbs)] for row in range(count)]
    photos = Photos(str(path.parent), paths, features, marks, shown, empty, empty, [], "")
    names = empty if names is None else names
    out = np.zeros(count, bool)
    out[list(struck)] = True
    found = suggest(features, names) if (names != "").any() else None
    left = np.nonzero((names == "") & ~out)[0]
    groups = [Group(left[start : start + each], "" if found is None else "Wren") for start in range(0, len(left), each)]
    tree = Tree(np.arange(count), np.arange(count - 1.0))
    write_page(str(path), photos, tree, groups, names, out, ruled_out or {}, found, list(findings), [])
    return path


@pytest.fixture(scope="session")
def label_page(photo_folder, tmp_path_factory):
    found = [
        Finding("near double", "photos/5.png", NASTY[1], "fine detail agrees to 0.99"),
        Finding("suspected mislabel", NASTY[0], "", "is in <b>a</b>, looks like c"),
        Finding("unreadable", "photos/bad.png", "", "the file is empty"),
    ]
    return _write(tmp_path_factory.mktemp("label") / "index.html", photo_folder, 12, findings=found)


@pytest.fixture(scope="session")
def second_page(photo_folder, tmp_path_factory):
    names = np.array(["Wren", "Wren", "Owl", "Owl", *[""] * 8], object)
    path = tmp_path_factory.mktemp("second") / "index.html"
    return _write(path, photo_folder, 12, names, struck=(4,), ruled_out={11: {"Owl"}})


def _saved(page):
    """Rows of the labels.csv that the page saves, without their header: file -> (class, state, group)."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Save labels.csv").click()
    rows = list(csv.reader(io.StringIO(download.value.path().read_text())))
    assert rows[0] == ["file", "class", "state", "group"]
    return {row[0]: tuple(row[1:]) for row in rows[1:] if row[2] != "not"}, download.value.path()


LISTED = """[...document.querySelectorAll(".group")].map((group) =>
    [Number(group.dataset.group), [...group.querySelectorAll("[data-image]")].map((one) => Number(one.dataset.image))])"""


def _groups(page):
    """Images of each group on the page, by its number."""
    page.wait_for_function("() => [...document.querySelectorAll('.group')].every((group) => group.firstChild)")
    return {group: sorted(images) for group, images in page.evaluate(LISTED)}


def _image(page, image):
    return page.locator(f"#groups [data-image='{image}']")


def _move(page):
    page.locator("#target").get_by_role("button", name="Move").click()
    page.locator("#status", has_text="moved to").wait_for()  # a dialog closes after its click


def test_clicks_do_everything_and_undo_takes_it_back(show, label_page):
    page = show(label_page, READY).page
    counts = page.locator("#counts")
    button = lambda group, name: page.locator(f"#group-{group}").get_by_role("button", name=name)
    assert _groups(page) == {1: [0, 1, 2, 3], 2: [4, 5, 6, 7], 3: [8, 9, 10, 11]}
    page.get_by_label("Name of group 1").fill("Wren")
    button(1, "Name").click()
    assert counts.inner_text() == "4 named, 0 struck, 8 left in 2 groups"
    assert list(_groups(page)) == [2, 3]
    _image(page, 4).click()
    _image(page, 5).click()
    button(2, "Move ...").click()
    page.get_by_label("Class, or part of its name").fill("wr")
    page.locator("#target-list").select_option("Wren")
    _move(page)
    assert counts.inner_text() == "6 named, 0 struck, 6 left in 2 groups"
    _image(page, 6).click()
    button(2, "Strike").click()
    assert _image(page, 6).get_attribute("aria-label") == "6.png, struck"
    _image(page, 8).click()
    button(3, "Take out").click()
    assert _groups(page) == {2: [6, 7], 3: [9, 10, 11], 4: [8]}
    button(3, "Divide").click()
    parts = [images for group, images in _groups(page).items() if group in (3, 5)]
    assert sorted(image for images in parts for image in images) == [9, 10, 11]
    assert all(parts)
    button(4, "Merge ...").click()
    page.locator("#target-list").select_option("group:2")
    _move(page)
    assert _groups(page)[2] == [6, 7, 8]
    page.locator("summary", has_text="1 near double").click()
    page.get_by_role("button", name="Strike 5.png").click()
    saved, _ = _saved(page)
    assert {file: row[:2] for file, row in saved.items() if row[1]} == {
        NASTY[0]: ("Wren", "named"),
        NASTY[1]: ("Wren", "named"),
        "photos/2.png": ("Wren", "named"),
        "photos/3.png": ("Wren", "named"),
        "photos/4.png": ("Wren", "named"),
        "photos/5.png": ("", "struck"),
        "photos/6.png": ("", "struck"),
    }
    for _ in range(7):
        page.get_by_role("button", name="Undo").click()
    assert page.get_by_role("button", name="Undo").is_disabled()
    assert _groups(page) == {1: [0, 1, 2, 3], 2: [4, 5, 6, 7], 3: [8, 9, 10, 11]}
    for _ in range(7):
        page.get_by_role("button", name="Redo").click()
    assert _saved(page)[0] == saved


def test_the_keyboard_alone_names_everything(show, label_page):
    page = show(label_page, READY).page
    press = page.keyboard.press
    press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the groups"
    press("Enter")
    press("n")
    press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("a, ")
    press("End")
    press("x")
    press("m")
    page.keyboard.type("Owl")
    press("Enter")
    page.get_by_text("1 named, 0 struck, 11 left in 3 groups", exact=True).wait_for()  # a dialog closes after its key
    press("s")
    for name in ("Wren", "Jay", "Kite"):
        press("Enter")
        page.keyboard.type(name)
        press("Enter")
    assert page.locator("#counts").inner_text() == "11 named, 1 struck, 0 left in 0 groups"
    assert page.locator("#none").is_visible()
    press("z")
    assert page.locator("#counts").inner_text() == "7 named, 1 struck, 4 left in 1 group"
    press("y")
    saved, _ = _saved(page)
    assert sorted(row[0] for row in saved.values()) == ["", *["Jay"] * 4, *["Kite"] * 4, "Owl", "Wren", "Wren"]


def test_saved_labels_are_opened_and_survive_a_closed_tab(show, label_page, tmp_path):
    first = show(label_page, READY).page
    first.get_by_label("Name of group 1").fill('Owl, "barn"')
    first.keyboard.press("Enter")
    _image(first, 9).click()
    first.keyboard.press("s")
    saved, path = _saved(first)
    labels = tmp_path / "labels.csv"
    labels.write_text(path.read_text() + "elsewhere.png,Jay,named,\n")
    first.wait_for_function("() => localStorage.length === 1")
    first.reload()
    first.wait_for_selector(READY)
    assert first.locator("#counts").inner_text() == "4 named, 1 struck, 7 left in 2 groups"
    first.get_by_role("button", name="Undo").click()
    assert first.locator("#counts").inner_text() == "0 named, 0 struck, 12 left in 3 groups"
    other = show(label_page, READY).page
    other.locator("#file").set_input_files(labels)
    other.wait_for_function("() => document.querySelector('#status').textContent.includes('read')")
    again, path = _saved(other)
    assert again.pop("elsewhere.png")[:2] == ("Jay", "named")
    assert {file: row[:2] for file, row in again.items()} == {file: row[:2] for file, row in saved.items()}
    assert _together(again) == _together(saved)


def _together(rows):
    """Sets of files of one group."""
    return {frozenset(file for file, row in rows.items() if row[2] == group) for group in {row[2] for row in rows.values()}}


def test_second_round_keeps_names_and_suggests(show, second_page):
    page = show(second_page, READY).page
    assert page.locator("#counts").inner_text() == "4 named, 1 struck, 7 left in 2 groups"
    assert page.get_by_label("Name of group 1").input_value() == "Wren"
    assert "maybe Wren" in page.locator("#group-1 h2").inner_text()
    page.locator("#group-1 [data-image]").first.click()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.locator("#counts").inner_text() == "8 named, 1 struck, 3 left in 1 group"
    page.locator("#show").select_option("done")
    page.get_by_label("Name of group 3").fill("")
    page.keyboard.press("Enter")
    saved, _ = _saved(page)
    states = [row[1] for row in saved.values()]
    assert [states.count(state) for state in ("named", "struck", "open", "")] == [6, 1, 2, 3]


def _not(path):
    """(file, class) of the rows of a labels.csv that rule a class out."""
    return sorted(tuple(row[:2]) for row in csv.reader(io.StringIO(path.read_text())) if row[2] == "not")


def test_what_is_taken_out_is_remembered(show, second_page, tmp_path):
    page = show(second_page, READY).page
    _image(page, 6).click()
    page.keyboard.press("t")
    assert _not(_saved(page)[1]) == [("photos/11.png", "Owl")]  # the group that it left has no name yet
    page.get_by_label("Name of group 1").press("Enter")
    assert _image(page, 6).get_attribute("aria-label") == "6.png, not Wren"
    path = _saved(page)[1]
    assert _not(path) == [("photos/11.png", "Owl"), ("photos/6.png", "Wren")]
    labels = tmp_path / "labels.csv"
    labels.write_text(path.read_text())
    page.keyboard.press("z")
    assert _image(page, 6).get_attribute("aria-label") == "6.png"
    other = show(second_page, READY).page
    other.locator("#file").set_input_files(labels)
    other.wait_for_function("() => document.querySelector('#status').textContent.includes('read')")
    assert _not(_saved(other)[1]) == _not(path)
    _image(other, 6).click()
    other.keyboard.press("m")
    other.locator("#target-list").select_option("Wren")
    _move(other)
    _, path = _saved(other)
    assert _not(path) == [("photos/11.png", "Owl")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility_and_width(show, label_page, second_page, scheme):
    for path in (label_page, second_page):
        page = show(path, READY, color_scheme=scheme, reduced_motion="reduce").page
        page.locator("#show").select_option("all")
        page.evaluate("document.querySelectorAll('details').forEach(part => (part.open = true))")
        _image(page, 7).click()
        for opening in ("", "m", "Escape", "v", "Escape", "?"):
            if opening:
                page.keyboard.press(opening)
            if opening != "Escape":
                results = Axe().run(page, options=ISSUES)
                assert results.violations_count == 0, results.generate_report()
            if opening == "v":
                page.wait_for_function("() => document.querySelector('#large img').src.endsWith('/photos/7.png')")
        page.keyboard.press("Escape")
        page.set_viewport_size(PHONE["viewport"])
        assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert page.locator("script").count() == 3
    assert page.locator("img[src=x], b").count() == 0


def test_ten_thousand_images_are_drawn_where_they_are_seen(show, photo_folder, tmp_path):
    page = show(_write(tmp_path / "index.html", photo_folder, 10_000, each=5), READY).page
    assert page.locator(".group").count() == 2000
    assert page.locator("#groups [data-image]").count() < 500
    page.get_by_label("Name of group 1", exact=True).fill("Wren")
    page.keyboard.press("Enter")
    assert page.locator("#counts").inner_text() == "5 named, 0 struck, 9,995 left in 1,999 groups"
    page.locator("#group-1500").scroll_into_view_if_needed()
    page.wait_for_selector("#group-1500 [data-image]")
    saved, _ = _saved(page)
    assert len(saved) == 10_000
