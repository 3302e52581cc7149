"""The page in a real browser, through the whole story. Needs playwright and Debian's chromium."""

import json
import os
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
_AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))
AXE = _AXE if _AXE.exists() else None
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
    sync_api.expect(page.locator("#train")).to_be_enabled(timeout=60_000)


def serious(page: Any) -> list[str]:
    """What axe finds of the page as it stands, of those that keep people out."""
    assert AXE is not None
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{each['id']}: {[node['html'] for node in each['nodes']]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


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

    page.click("#new-chat")
    unlike = asked(page, "Add 12 and 7.")
    expect(unlike.locator(".own .facts")).to_contain_text("Unlike the prompts of your texts")
    assert unlike.locator(".own .text").inner_text() == unlike.locator(".base .text").inner_text()
    assert unlike.locator(".own .word").count() == 0
    page.click("#new-chat")
    partly = asked(page, "Who wrote that story?")
    expect(partly.locator(".own .facts")).to_contain_text("adapter at 50 %")
    page.click("#new-chat")
    turn = asked(page, "Headline for story 4?")

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

    page.click("#result button")
    report = page.locator("#report")
    expect(report).to_contain_text("Voice: ")
    expect(report).to_contain_text("Recommended: α ")
    expect(report).to_contain_text("ROUGE-L ↑")
    expect(report).to_contain_text("You wrote")
    page.keyboard.press("Escape")

    turn.locator(".correct").click()
    page.fill("#edit", "My own words about story 4")
    page.click("#edit-form button[type=submit]")
    expect(turn.locator(".own .text")).to_have_text("My own words about story 4")
    expect(page.locator("#texts-count")).to_have_text("11 texts of yours are kept.")

    personalized(page)
    expect(page.locator("#versions li")).to_have_count(2, timeout=60_000)
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


@pytest.mark.skipif(AXE is None, reason="axe-core is not there: npm install axe-core, or AXE_CORE")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme: Any, browser: Any, server: Running) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{server.url}/app/")
    assert serious(page) == []
    named(page, f"axe-{scheme}")
    page.fill("#texts", "\n".join(json.dumps(row) for row in ROWS))
    page.click("#texts-form button[type=submit]")
    sync_api.expect(page.locator("#texts-count")).to_contain_text("10 texts")
    personalized(page)
    turn = asked(page, "Headline for story 3?")
    assert serious(page) == []
    for opened in (
        lambda: page.click("#result button"),
        lambda: page.click("#erase"),
        lambda: turn.locator(".correct").click(),
        lambda: page.evaluate("document.getElementById('key-dialog').showModal()"),
    ):
        opened()
        assert serious(page) == []
        page.keyboard.press("Escape")
    context.close()


def test_a_key_is_asked_for_and_all_works_from_the_keyboard(
    browser: Any, server: Running, tmp_path: Path
) -> None:
    expect = sync_api.expect
    with running(server.base, tmp_path / "adapters", tmp_path, app=True, answer_tokens=4) as locked:
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        page = context.new_page()
        page.goto(f"{locked.url}/app/")
        expect(page.locator("#key-dialog")).to_be_visible()
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("cope_wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-dialog")).to_be_visible()
        page.locator("#key").focus()
        page.keyboard.type(locked.keys["alice"])
        page.keyboard.press("Enter")
        expect(page.locator("#key-dialog")).to_be_hidden()
        reached: list[str] = []
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id"))
        wanted = "user question new-chat alpha show-colours texts texts-file train erase"
        assert set(wanted.split()) <= set(reached)
        page.locator("#user").focus()
        page.keyboard.type("alice")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("You write as alice.")
        page.locator("#question").focus()
        page.keyboard.type("Hello")
        page.keyboard.press("Enter")
        expect(page.locator(".turn .feedback")).to_be_visible(timeout=30_000)
        assert locked.keys["alice"] not in page.url
        context.close()
