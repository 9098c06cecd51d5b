"""Pages in headless Chromium: one browser for all, and a page that fails on whatever it should not do."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MISSING = next(
    (
        f"there is no {what}"
        for what, there in (("chromium", shutil.which("chromium")), ("playwright", find_spec("playwright")))
        if not there
    ),
    "",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker("browser")
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a file, or an address; at the end nothing may have been asked of a network, refused, or gone wrong.

    A file asks for nothing at all; an address of 127.0.0.1 asks its own server alone.
    """
    contexts, wrong = [], []

    def opened(what, *, width=1280, height=900, fragment="", **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        address = what if isinstance(what, str) else what.as_uri()
        # Errors, warnings and refusals of the page's policy all come as messages of the console.
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda asked: None if allowed(asked.url, address) else wrong.append(f"request: {asked.url}"))
        page.goto(address + fragment)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def allowed(url: str, address: str) -> bool:
    own = address.partition("?")[0] if address.startswith("http://127.0.0.1:") else None
    return (
        url.startswith("data:image/")
        or url.partition("#")[0] == address.partition("#")[0]
        or (own is not None and url.startswith(own))
    )
