"""The page in a real browser, through the whole story. Needs playwright and Debian's chromium."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from personal import QUICK, ROWS
from serving.conftest import Running, running

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = "<img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def server(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server with the page, which publishes whatever it trains."""
    folder = tmp_path_factory.mktemp("page")
    base = tiny("llama", initializer_range=0.05)
    store = folder / "adapters"
    with running(base, store, folder, keys=False, app=True, answer_tokens=12) as started:
        runner = started.state.runner
        assert runner._personalize is not None
        changes = {"recipe": QUICK, "gate": "always"}
        runner._personalize = runner._personalize.model_copy(update=changes)
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser without a head."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    """The page, at the width of a telephone; foreign requests and errors fail the test."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((server.url, "data:"))
            else wrong.append(f"foreign: {request.url}")
        ),
    )
    page.goto(f"{server.url}/app/")
    yield page
    context.close()
    assert wrong == []


def named(page: Any, name: str) -> None:
    """Write as that user."""
    page.fill("#user", name)
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#status")).to_have_text(f"You write as {name}.")


def asked(page: Any, question: str) -> Any:
    """Ask, wait for both answers, and return the turn."""
    page.fill("#question", question)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    sync_api.expect(turn.locator(".feedback")).to_be_visible(timeout=30_000)
    sync_api.expect(page.locator("#stop")).to_be_disabled(timeout=30_000)
    return turn


def personalized(page: Any) -> None:
    page.click("#train")
    sync_api.expect(page.locator("#result")).to_contain_text("Published", timeout=60_000)
    sync_api.expect(page.locator("#train")).to_be_enabled()


def test_the_whole_story_from_a_name_to_erasure(page: Any, server: Running) -> None:
    expect = sync_api.expect
    named(page, "robin")
    page.fill("#texts", "\n".join(json.dumps(row) for row in ROWS))
    page.click("#texts-form button[type=submit]")
    expect(page.locator("#texts-count")).to_have_text("10 texts of yours are kept.")
    turn = asked(page, "Headline for story 3?")
    expect(turn.locator(".own .facts")).to_contain_text("No version of yours yet")

    personalized(page)
    turn = asked(page, "Headline for story 4?")
    expect(turn.locator(".own .facts")).to_contain_text("Version 20")
    assert turn.locator(".own .word").count() > 0
    assert turn.locator(".own .text").inner_text() != turn.locator(".base .text").inner_text()

    # Recoloured without a request while α moves; answered anew once it is let go.
    chats: list[str] = []
    page.on("request", lambda request: chats.append(request.url) if "chat" in request.url else None)
    slider = page.locator("#alpha")
    slider.evaluate("one => { one.value = 0.5; one.dispatchEvent(new Event('input')); }")
    expect(page.locator("#alpha-value")).to_have_text("0.50")
    assert chats == []
    slider.evaluate("one => one.dispatchEvent(new Event('change'))")
    expect(turn.locator(".own .facts")).to_contain_text("α 0.5")
    assert len(chats) == 1

    turn.locator(".correct").click()
    page.fill("#edit", "My own words about story 4")
    page.click("#edit-form button[type=submit]")
    expect(turn.locator(".own .text")).to_have_text("My own words about story 4")
    expect(page.locator("#texts-count")).to_have_text("11 texts of yours are kept.")

    personalized(page)
    expect(page.locator("#versions li")).to_have_count(2)
    page.click("#rollback")
    expect(page.locator("#versions li").nth(1)).to_contain_text("in use")

    page.click("#erase")
    page.fill("#erase-confirm", "robin")
    page.click("#erase-form button[type=submit]")
    expect(page.locator("#status")).to_have_text("Everything of robin is erased.")
    assert server.state.store.versions("robin") == []
    assert server.state.history.count("robin") == 0


def test_nothing_that_is_shown_becomes_markup(page: Any) -> None:
    named(page, HOSTILE)
    turn = asked(page, HOSTILE)
    assert turn.locator(".question").inner_text() == HOSTILE
    turn.locator(".correct").click()
    page.fill("#edit", HOSTILE)
    page.click("#edit-form button[type=submit]")
    sync_api.expect(turn.locator(".own .text")).to_have_text(HOSTILE)
    assert page.locator("main img").count() == 0
    assert page.title() != "broken"


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800), (640, 400)])
def test_nothing_scrolls_sideways(browser: Any, server: Running, width: int, height: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.goto(f"{server.url}/app/")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("label, [aria-label], [aria-labelledby]").count() > 10
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, button')]"
        ".filter(one => !one.textContent.trim() && !one.labels?.length && !one.ariaLabel)"
        ".map(one => one.id)"
    )
    assert unnamed == []
    context.close()
