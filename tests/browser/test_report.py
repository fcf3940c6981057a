"""The report in a browser: it works by mouse and by keyboard, in both themes and on a phone, and complains of nothing."""

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.browser.conftest import NASTY

PHONE = {"viewport": {"width": 400, "height": 800}}
ISSUES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}


def _style(page, selector, name):
    return page.evaluate("([s, n]) => getComputedStyle(document.querySelector(s))[n]", [selector, name])


def _light(colour):
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) > 3 * 128


def _drawn(page, chart="chart-0"):
    return page.locator(f"#{chart} .scatterlayer path.js-line")


def test_both_themes_and_the_switch(show, run_page):
    light, dark = (show(run_page, color_scheme=scheme).page for scheme in ("light", "dark"))
    for page, expected in ((light, True), (dark, False)):
        assert _light(_style(page, "body", "backgroundColor")) == expected
        assert _light(_style(page, "body", "color")) != expected
        assert _light(_style(page, ".xtick text", "fill")) != expected
    switch = light.get_by_role("button", name="Theme: system")
    switch.click()
    switch = light.get_by_role("button", name="Theme: light")
    switch.click()
    assert not _light(_style(light, "body", "backgroundColor"))
    assert _light(_style(light, ".xtick text", "fill"))
    assert light.get_by_role("button", name="Theme: dark").count() == 1


@pytest.mark.parametrize(
    ("name", "scheme"), [("run_page", "light"), ("run_page", "dark"), ("unlabelled_page", "light"), ("comparison", "dark")]
)
def test_accessibility_and_width(show, name, scheme, request):
    path = request.getfixturevalue(name)
    page = show(path, color_scheme=scheme, reduced_motion="reduce").page
    page.evaluate("document.querySelectorAll('details').forEach(part => (part.open = true))")
    results = Axe().run(page, options=ISSUES)
    assert results.violations_count == 0, results.generate_report()
    page.set_viewport_size(PHONE["viewport"])
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    page.wait_for_function("() => [...document.querySelectorAll('.main-svg')].every(chart => chart.clientWidth < 400)")


def test_every_chart_is_drawn_and_has_its_table(show, run_page):
    page = show(run_page).page
    charts = page.locator(".chart")
    assert charts.count() == page.locator(".chart .main-svg[class*=main-svg]:first-child").count() >= 9
    for index in range(charts.count()):
        assert charts.nth(index).locator(".scatterlayer .trace").count() > 0
    details = page.locator(".chart-card details").first
    assert not details.locator("table").is_visible()
    details.locator("summary").click()
    assert details.locator("tbody tr").count() == 6


def test_clicks_show_neighbours_and_matches(show, run_page):
    page = show(run_page).page
    data = page.evaluate("report.explorer")
    page.locator(".query").nth(5).click()
    query = data["queries"][5]
    assert page.locator(".query[aria-pressed=true]").count() == 1
    assert query["title"] in page.locator("#explorer-status").inner_text()
    neighbours = page.locator(".neighbour")
    assert neighbours.count() == 6
    for index, near in enumerate(query["neighbours"]):
        text = neighbours.nth(index).inner_text()
        assert near["class"] in text
        assert f"{near['similarity']:.3f}" in text
    neighbours.nth(3).click()
    near = query["neighbours"][3]
    assert neighbours.nth(3).get_attribute("aria-pressed") == "true"
    images = page.locator("#explorer-match image")
    assert images.nth(0).get_attribute("href") == page.locator(".query img").nth(5).get_attribute("src")
    assert images.nth(1).get_attribute("href") == data["images"][str(near["row"])]
    assert page.locator("#explorer-match rect.tag").count() == 2 * len(near["matches"]) > 0
    listed = page.locator("#explorer-pairs li")
    assert [f"cosine {match['cosine']:.2f}" in listed.nth(i).inner_text() for i, match in enumerate(near["matches"])] == [
        True
    ] * listed.count()


def test_the_keyboard_alone_reaches_everything(show, run_page):
    page = show(run_page).page
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.textContent") == "Skip to the content"
    assert page.evaluate(f"{focused}.getBoundingClientRect().top") >= 0
    page.keyboard.press("Enter")
    seen = []
    for _ in range(200):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(f"{focused}.id || {focused}.dataset.query || {focused}.className"))
        if seen[-1] == "map-plot":
            page.keyboard.press("ArrowRight")
            assert page.evaluate("document.querySelector('#map-info').innerText").startswith(
                page.evaluate("report.map.points.class[1]")
            )
        if seen[-1] == "3":
            page.keyboard.press("Enter")
            assert page.evaluate("report.explorer.queries[3].title") in page.locator("#explorer-status").inner_text()
        if "neighbour" in seen[-1]:
            break
        assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.locator(".neighbour").nth(1).get_attribute("aria-pressed") == "true"
    assert {"map-class", "map-search", "map-plot", "map-previous", "map-next", "0", "11"} <= set(seen)


def test_the_map_shows_and_filters_images(show, run_page):
    page = show(run_page).page
    plot = page.locator("#map-plot")
    plot.scroll_into_view_if_needed()
    points = page.evaluate("report.map.points")
    assert plot.locator(".scatterlayer .trace").first.locator("path.point").count() == len(points["name"]) == 12
    page.locator("#map-next").click()
    for index in (7, 2):
        box = plot.locator(".scatterlayer .trace").first.locator("path.point").nth(index).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
        page.wait_for_function(
            "name => document.querySelector('#map-info').innerText.includes(name)", arg=points["name"][index]
        )
        assert page.locator("#map-thumb").get_attribute("aria-label") == points["class"][index]
        assert "data:image/jpeg" in _style(page, "#map-thumb", "backgroundImage")
    page.locator("#map-class").select_option(NASTY[0])
    assert page.locator("#map-count").inner_text() == "4 of 12 images"
    opacity = "trace => trace.querySelectorAll('path.point')[%d].style.opacity"
    found = [float(plot.locator(".scatterlayer .trace").first.evaluate(opacity % index)) for index in range(12)]
    assert [value > 0.5 for value in found] == [name == NASTY[0] for name in points["class"]]
    page.locator("#map-search").fill("nothing of this name")
    assert page.locator("#map-count").inner_text() == "0 of 12 images"
    page.locator("#map-search").fill("")
    page.locator("#map-class").select_option("")
    assert page.locator("#map-count").inner_text() == ""


def test_names_of_data_are_text_everywhere(show, run_page):
    page = show(run_page).page
    for index in range(12):
        page.locator(".query").nth(index).click()
    assert page.locator("script").count() == 3
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("b", has_text="a_class").count() == page.locator("#explorer-status b", has_text="a_class").count()
    options = page.locator("#map-class option").all_inner_texts()
    assert options == ["All classes", *NASTY]


def test_the_policy_blocks_foreign_scripts_and_images(chromium, run_page):
    page = chromium.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(run_page.as_uri())
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = true'}))")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://localhost:1/x.png\">')")
    page.wait_for_function("() => performance.now() > 0")
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in text for text in said)
    page.close()


def test_without_labels(show, unlabelled_page):
    page = show(unlabelled_page).page
    assert page.locator("#map-class").count() == 0
    page.locator(".query").nth(1).click()
    assert page.locator(".neighbour").count() == 6
    assert "class" not in page.locator(".results").inner_text()
    assert page.locator(".query.right, .query.wrong, .neighbour.wrong").count() == 0


def test_several_runs(show, comparison):
    page = show(comparison).page
    names = page.locator("article h2").all_inner_texts()
    assert len(names) == 2
    assert "<b>a_class & co<b>" in names
    assert _drawn(page).count() == 2
    colours = {_drawn(page).nth(i).evaluate("line => getComputedStyle(line).stroke") for i in range(2)}
    assert len(colours) == 2
