"""The web page in a real browser: type, stream, stop; in both modes, dark and light, wide and on a phone."""

import pytest

from tests.serving import chromium
from tests.serving.serving import running
from tests.small_models import make_ready
from tnllm.serving.middleware import Settings

EXECUTABLE = chromium.find()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None,
    reason=f"no browser on PATH (looked for {', '.join(chromium.NAMES)}); on Debian: apt-get install chromium",
)


@pytest.fixture(scope="module")
def browser():
    with chromium.Browser(EXECUTABLE) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with running(make_ready(model, tokenizer), Settings(name="small"), num_slots=2) as server:
        yield server


@pytest.fixture
def page(browser, server):
    page = browser.open(server[0], 1200, 800)
    page.evaluate("localStorage.clear()")
    page.call("Page.reload")
    page.wait_for("document.querySelector('#model')?.textContent === 'small'")
    yield page
    assert page.problems() == []
    # Nothing from outside, whatever was done.
    assert all(url.startswith((server[0], "data:", "about:")) for url in page.requests())
    page.call("Page.close")


def slide(page, name, value):
    page.evaluate(f"document.querySelector('#{name}').value = {value}, "
                  f"document.querySelector('#{name}').dispatchEvent(new Event('input'))")  # fmt: skip


def test_a_chat(page):
    page.type("#seed", "4")
    slide(page, "max_tokens", 12)
    page.type("#message", "The fox? 今天？")
    page.press_enter()
    page.wait_for("document.querySelector('#chat-stats').textContent.includes('ended by')")
    assert page.evaluate("document.querySelector('.turn.user').textContent") == "The fox? 今天？"
    first = page.evaluate("document.querySelector('.turn.assistant').textContent")
    assert "tokens/s" in page.evaluate("document.querySelector('#chat-stats').textContent")
    page.type("#message", "And?")
    page.click("#send")
    page.wait_for("document.querySelectorAll('.turn').length === 4 && document.querySelector('#chat-stop').hidden")
    page.click("#fresh")
    page.wait_for("document.querySelector('.empty')")
    # The same seed, the same answer.
    page.type("#message", "The fox? 今天？")
    page.press_enter()
    page.wait_for("document.querySelector('#chat-stats').textContent.includes('ended by')")
    assert page.evaluate("document.querySelector('.turn.assistant').textContent") == first


def test_text_streams_and_stops(page, server):
    _, engine = server
    slide(page, "max_tokens", 2048)
    slide(page, "temperature", 1.4)
    page.click("#tab-write")
    page.evaluate("document.querySelector('#text').value = ''")
    page.type("#text", "The quick")
    page.click("#go")
    page.wait_for("document.querySelector('#text').value.length > 20")
    length = page.evaluate("document.querySelector('#text').value.length")
    # It grows while it is watched, and the generated part alone is marked.
    page.wait_for(f"document.querySelector('#text').value.length > {length}")
    assert engine.slots.free == 1
    page.click("#write-stop")
    page.wait_for("document.querySelector('#write-stats').textContent.includes('stopped by you')")
    text = page.evaluate("document.querySelector('#text').value")
    assert text.startswith("The quick") and page.evaluate(
        "document.querySelector('#layer mark').textContent") == text.removeprefix("The quick")  # fmt: skip
    for _ in range(500):
        if engine.slots.free == 2:
            break
        page.evaluate("new Promise((done) => setTimeout(done, 10))")
    assert engine.slots.free == 2, "the server continues an abandoned text"
    assert page.evaluate("document.querySelector('#text').value") == text
    page.click("#undo")
    assert page.evaluate("document.querySelector('#text').value") == "The quick"


def test_errors_are_shown(page, server, monkeypatch):
    _, engine = server
    monkeypatch.setattr(engine, "max_prompt_tokens", 3)
    page.type("#message", "A question that is too long")
    page.press_enter()
    page.wait_for("!document.querySelector('#chat-error').hidden")
    assert "this server takes at most 3" in page.evaluate("document.querySelector('#chat-error').textContent")
    # What was typed is not lost.
    assert page.evaluate("document.querySelector('#message').value") == "A question that is too long"
    # Chromium itself logs failed requests.
    page._browser.events[:] = [e for e in page._browser.events if "400" not in str(e.get("params", {}).get("entry"))]


def test_themes_and_a_phone(page):
    shade = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(shade)
    page.click("#theme")
    assert page.evaluate(shade) != before
    page.size(360, 640, phone=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.wait_for("getComputedStyle(document.querySelector('#settings')).visibility === 'hidden'")
    page.click("#tune")
    page.wait_for("document.querySelector('#settings').getBoundingClientRect().bottom <= window.innerHeight + 1")
    for selector in ("#temperature", "#max_tokens"):
        assert page.evaluate(f"document.querySelector('{selector}').getBoundingClientRect().width") > 200


def test_a_key_is_asked_for(browser, model, tokenizer):
    with running(make_ready(model, tokenizer), Settings(name="locked", api_key="sesame"), num_slots=1) as (address, _):
        page = browser.open(address, 1000, 700)
        page.wait_for("!document.querySelector('#key-field').hidden")
        page.type("#key", "sesame")
        page.evaluate("document.querySelector('#key').blur()")
        page.wait_for("document.querySelector('#model').textContent === 'locked'")
        page.call("Page.close")
