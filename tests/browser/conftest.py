"""A headless Chromium that reports all it complains of, and pages made from tiny runs."""

import shutil
from typing import NamedTuple

import pytest
from playwright.sync_api import Page, sync_playwright

from cmd_jax.report.compare import write_comparison
from cmd_jax.report.page import write_report
from tests.report.conftest import measured, renamed, unlabelled  # noqa: F401 (a fixture)

NASTY = ("</script><script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>", "<b>a_class & co</b>")
NAMES = ("chromium", "chromium-browser", "google-chrome")
# Nothing of the browser's own may go out: what a page asks for is what is left.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def chromium():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.fail("no Chromium on PATH; install it (Debian, Ubuntu: apt-get install chromium)", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


class Opened(NamedTuple):
    """A page in the browser.

    Attributes:
        page: of playwright.
        complaints: what console and scripts said, with violations of the page's policy.
        requests: what it asked for beside itself.
    """

    page: Page
    complaints: list[str]
    requests: list[str]


@pytest.fixture
def show(chromium):
    """(path, what shows that it is ready, options of the context) -> Opened; afterwards nothing may have been complained of,
    asked for beside photographs in the page's folder, or run by data."""
    opened = []

    def show(path, ready=".chart .main-svg", **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        page, complaints, requests = context.new_page(), [], []
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}") or dialog.dismiss())
        page.on("request", lambda request: requests.append(request.url))
        violation = "addEventListener('securitypolicyviolation', event => console.error(event.violatedDirective))"
        page.add_init_script(violation)
        page.goto(path.as_uri())
        page.wait_for_selector(ready)
        opened.append((context, Opened(page, complaints, requests), path))
        return opened[-1][1]

    yield show
    for context, result, path in opened:
        context.close()
        assert result.complaints == []
        asked = {url for url in result.requests if not url.startswith("data:")}
        assert {url for url in asked if not url.startswith(f"{path.parent.as_uri()}/photos/")} == {path.as_uri()}


@pytest.fixture(scope="session")
def run_page(measured, tmp_path_factory):  # noqa: F811
    return _written(renamed(measured, NASTY), tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="session")
def unlabelled_page(measured, tmp_path_factory):  # noqa: F811
    return _written(unlabelled(measured), tmp_path_factory.mktemp("unlabelled"))


@pytest.fixture(scope="session")
def comparison(finished, tmp_path_factory):
    root = tmp_path_factory.mktemp("compared")
    for name in ("a", NASTY[2].replace("/", "")):
        (root / name).mkdir()
        for part in ("config.json", "metrics.jsonl"):
            shutil.copy(finished[0] / part, root / name / part)
        shutil.copytree(finished[0] / "eval", root / name / "eval")
    (path,) = write_comparison([str(path) for path in sorted(root.iterdir())], str(root / "out"))
    return type(root)(path)


def _written(arguments, out):
    *arguments, workdir = arguments
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(f"{workdir}/{name}", out)
    shutil.copytree(f"{workdir}/eval", out / "eval")
    return type(out)(write_report(*arguments, str(out))[0])
