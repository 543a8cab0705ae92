"""The web page in a real browser: what it sends, keeps and shows, by mouse, by keyboard, wide and on a phone.

npm install axe-core       # in the checkout: for the test of accessibility
"""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from tests.serving import chromium
from tests.serving.serving import running, served, wait_for
from tests.small_models import make_ready, small_model
from tnllm import assets
from tnllm.serving.engine import Engine
from tnllm.serving.middleware import Settings

EXECUTABLE = chromium.find()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None,
    reason=f"no browser on PATH (looked for {', '.join(chromium.NAMES)}); on Debian: apt-get install chromium",
)
AXE = Path(__file__).parents[2] / "node_modules/axe-core/axe.min.js"
SIZES = [(1280, 800, False), (375, 720, True), (320, 600, True)]
# Seconds: no limit that a slow machine could meet; a fault ends the test.
LONG = 300


@pytest.fixture(scope="module")
def browser():
    with chromium.Browser(EXECUTABLE) as browser:
        yield browser


@pytest.fixture(scope="module")
def ready(model, tokenizer):
    """A model that was trained to chat, with defaults of its own, whose texts end by length alone."""
    sampling = {"temperature": 0.7, "max_tokens": 12}
    return replace(make_ready(model, tokenizer), is_chat_tuned=True, sampling=sampling, eos_ids=())


@pytest.fixture(scope="module")
def server(ready):
    with running(ready, Settings(name="small"), num_slots=2) as server:
        yield server


@pytest.fixture(scope="module")
def two_models(ready):
    """The address of a server of `ready` and, as an adapter would be, of another model named sea."""
    other = replace(ready, model=small_model())
    with torch.no_grad():
        other.model.head_weight.mul_(2.0)
    with (
        Engine(ready, num_slots=2) as first,
        Engine(other, num_slots=2, beside=first) as second,
        served(first, Settings(name="small"), others={"sea": second}) as address,
    ):
        yield address


@contextmanager
def opened(browser, address, width=1280, height=800, phone=False, ready="document.querySelector('#more')"):
    page = browser.open(address, width, height, phone)
    try:
        page.evaluate("localStorage.clear(), sessionStorage.clear()")
        reload(page, ready)
        yield page
        # Nothing from outside, whatever was done.
        assert all(url.startswith((address, "data:", "about:", "blob:")) for url in page.requests())
    finally:
        # The browser's own command: a page that is busy for ever is closed too, lest it slows the next test.
        page.close()


@pytest.fixture
def page(browser, server):
    with opened(browser, server[0]) as page:
        page.problems()
        yield page
        assert page.problems() == []


def reload(page, ready="document.querySelector('#more')"):
    """Until another document is there, and what marks it as ready."""
    page.evaluate("window.isOld = true")
    page.call("Page.reload")
    page.wait_for(f"!window.isOld && document.readyState === 'complete' && {ready}")


def said(page, selector):
    return page.evaluate(f"document.querySelector({selector!r})?.textContent")


def texts(page, selector):
    return page.evaluate(f"[...document.querySelectorAll({selector!r})].map((one) => one.textContent)")


def fill(page, selector, text):
    page.evaluate(f"document.querySelector({selector!r}).value = ''")
    page.type(selector, text)


def settle(page, answers):
    """Wait until so many answers have ended, and the last one is read into a state."""
    page.wait_for(f"document.querySelectorAll('.turn.assistant').length === {answers} && "
                  "document.querySelector('#chat-stats').textContent.includes('MiB')")  # fmt: skip


def ask(page, text):
    answers = len(texts(page, ".turn.assistant"))
    page.type("#message", text)
    page.press("Enter")
    settle(page, answers + 1)
    return json.loads(page.sent("/chat/completions")[-1])


def kept(page):
    """The one talk that the browser keeps."""
    [key] = page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('tnllm.chat.'))")
    return json.loads(page.evaluate(f"localStorage.getItem({key!r})"))


def open_talk(page, messages):
    """As if it had been kept at an earlier visit."""
    talk = json.dumps({"id": "one", "changed": 1, "messages": messages, "states": []})
    page.evaluate(
        f"localStorage.setItem('tnllm.chat.one', {json.dumps(talk)}), localStorage.setItem('tnllm.open', '\"one\"')"
    )
    reload(page)


def act(page, turn, title):
    page.evaluate(f"document.querySelectorAll('.turn')[{turn}].querySelector('[title={json.dumps(title)}]').click()")


def test_only_what_was_touched_is_sent(page):
    body = ask(page, "The fox? 今天？")
    assert set(body) == {"messages", "stream", "stream_options"}
    assert texts(page, ".turn.user .text") == ["The fox? 今天？"]
    assert "tokens/s" in said(page, "#chat-stats") and "ended by" in said(page, "#chat-stats")
    # The model's own default is shown.
    assert said(page, "#temperature-field output") == "0.7 (default)"
    page.evaluate("{ const one = document.querySelector('#temperature'); one.value = 0.5; "
                  "one.dispatchEvent(new Event('input')); }")  # fmt: skip
    fill(page, "#max_tokens", "7")
    body = ask(page, "And?")
    assert (body.pop("temperature"), body.pop("max_tokens")) == (0.5, 7)
    assert set(body) == {"messages", "state", "stream", "stream_options"}
    page.click("#temperature-field .back")
    page.click("#reset")
    assert set(ask(page, "So?")) == {"messages", "state", "stream", "stream_options"}


def test_a_server_of_few_tokens(browser, ready):
    few = running(ready, Settings(name="short"), num_slots=1, max_new_tokens=8)
    with few as (address, _), opened(browser, address) as page:
        ask(page, "Hello")
        assert said(page, "#chat-stats").startswith("8 tokens")
        fill(page, "#max_tokens", "9")
        assert said(page, "#max_tokens-help") == "Length is 9; allowed: a whole number, 1 to 8."
        assert page.problems() == []


def test_seeds_are_exact_and_bad_ones_are_named(page, server):
    # As JavaScript's numbers 2^53 + 1 would be 2^53.
    for seed in ("9007199254740993", "9223372036854775807", "007"):
        fill(page, "#seed", seed)
        page.type("#message", "The fox")
        page.press("Enter")
        page.wait_for("document.querySelector('#chat-stats').textContent.includes('ended by')")
        body = page.sent("/chat/completions")[-1]
        assert f'"seed":{int(seed)}}}' in body
        same = {**json.loads(body), "stream": False}
        del same["stream_options"]
        answer = httpx.post(f"{server[0]}/v1/chat/completions", json=same, timeout=LONG).json()
        assert kept(page)["messages"][-1]["content"] == answer["choices"][0]["message"]["content"]
        page.click("#talk-list [aria-label^=Delete]")
    sent = len(page.sent("/completions"))
    for seed in ("9223372036854775808", "-1", "1.5", "1e3", "abc", "9" * 5000):
        fill(page, "#seed", seed)
        page.type("#message", "The fox")
        page.press("Enter")
        page.wait_for("!document.querySelector('#chat-error').hidden")
        words = said(page, "#chat-error")
        assert words.startswith(f"Seed is {seed[:40]}") and words.endswith("whole number, 0 to 9223372036854775807.")
        assert page.evaluate("document.querySelector('#message').value") == "The fox"
        assert page.evaluate("document.querySelector('#seed').getAttribute('aria-invalid')") == "true"
        page.evaluate("document.querySelector('#message').value = ''")
    assert len(page.sent("/completions")) == sent


@pytest.mark.parametrize("tuned", [True, False])
def test_the_mode_suits_the_model(browser, ready, tuned):
    one = running(replace(ready, is_chat_tuned=tuned), Settings(name="m"), num_slots=1)
    with one as (address, _), opened(browser, address) as page:
        assert page.evaluate("document.body.dataset.mode") == ("chat" if tuned else "write")
        assert page.evaluate("document.querySelector('#note').hidden")
        page.click("#tab-chat")
        assert page.evaluate("document.querySelector('#note').hidden") == tuned
        # Until somebody has chosen.
        reload(page)
        assert page.evaluate("document.body.dataset.mode") == "chat"


def test_a_model_is_chosen(browser, two_models):
    """Of several; an answer of each has a state of its own model, and the choice survives a reload."""
    choose = ("{ const one = document.querySelector('#model-name'); one.value = %r; "
              "one.dispatchEvent(new Event('change')); }")  # fmt: skip
    with opened(browser, two_models) as page:
        assert texts(page, "#model-name option") == ["small", "sea"] and said(page, "#model") == "small"
        assert "model" not in ask(page, "The fox?")
        page.evaluate(choose % "sea")
        assert said(page, "#model") == "sea"
        body = ask(page, "And the dog?")
        # The state is of the other model, so the text is read again.
        assert body["model"] == "sea" and "state" not in body and len(body["messages"]) == 3
        reload(page)
        assert said(page, "#model") == "sea"
        body = ask(page, "The cat?")
        assert body["model"] == "sea" and body["state"] == kept(page)["states"][0]["id"]
        page.click("#tab-write")
        page.click("#go")
        page.wait_for("document.querySelector('#write-stats').textContent.includes('ended by')")
        assert json.loads(page.sent("/completions")[-1])["model"] == "sea"
        page.click("#model-name-field .back")
        assert said(page, "#model") == "small" and page.evaluate("document.activeElement.id") == "model-name"
        page.click("#tab-chat")
        assert "model" not in ask(page, "So?")
        # One that is not served any more.
        page.evaluate("localStorage.setItem('tnllm.settings', JSON.stringify({model: 'gone'}))")
        reload(page)
        assert said(page, "#model") == "small" and page.problems() == []


def test_the_demo_is_said_to_be_a_toy(browser, ready):
    demo = replace(ready, folder=assets.demo_weights(), is_chat_tuned=False)
    with running(demo, Settings(name="demo"), num_slots=1) as (address, _), opened(browser, address) as page:
        assert said(page, "#note").startswith("A toy: ")


def test_a_talk_survives_a_reload_and_is_not_read_again(page, server):
    address, _ = server
    ask(page, "The quick brown fox?")
    first = kept(page)
    reload(page)
    assert texts(page, ".turn.user .text") == ["The quick brown fox?"]
    fill(page, "#seed", "5")
    body = ask(page, "And the dog?")
    assert body["state"] == first["states"][-1]["id"]
    assert body["messages"] == [{"role": "user", "content": "And the dog?"}]
    # The state is the text: without it, the answer is the same.
    messages = kept(page)["messages"]
    whole = {"messages": [{key: one[key] for key in ("role", "content")} for one in messages[:3]], "seed": 5}
    answer = httpx.post(f"{address}/v1/chat/completions", json=whole, timeout=LONG).json()
    assert answer["choices"][0]["message"]["content"] == messages[3]["content"]
    # A server that has lost the states reads the text again.
    for state in httpx.get(f"{address}/v1/states", timeout=LONG).json()["data"]:
        httpx.delete(f"{address}/v1/states/{state['id']}", timeout=LONG)
    body = ask(page, "And the cat?")
    assert "state" not in body and len(body["messages"]) == 5
    page.problems()
    # Another system text is another beginning.
    fill(page, "#system", "Be brief.")
    body = ask(page, "And now?")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and "state" not in body
    ids = [state["id"] for state in kept(page)["states"]]
    assert ids
    page.click("#talk-list [aria-label^=Delete]")
    wait_for(lambda: all(httpx.get(f"{address}/v1/states/{id}", timeout=LONG).status_code == 404 for id in ids))


def test_a_server_that_keeps_no_states(browser, ready, monkeypatch):
    from tnllm.serving.states import StateStore

    made = StateStore.__init__
    monkeypatch.setattr(StateStore, "__init__", lambda *args, **more: made(*args, **more, max_bytes=0))
    with running(ready, Settings(name="m"), num_slots=1) as (address, _), opened(browser, address) as page:
        for count in (1, 2):
            page.type("#message", "A fox?")
            page.press("Enter")
            page.wait_for(f"document.querySelectorAll('.turn.assistant').length === {count} && "
                          "document.querySelector('#chat-stats').textContent.includes('ended by')")  # fmt: skip
        assert page.evaluate("document.querySelector('#chat-error').hidden")
        assert len(json.loads(page.sent("/chat/completions")[-1])["messages"]) == 3
        # Asked once.
        assert len(page.sent("/v1/states")) == 1


def test_a_list_of_talks(page, tmp_path):
    ask(page, "The first fox")
    page.click("#fresh")
    assert said(page, ".empty h2")
    ask(page, "The second dog")
    assert texts(page, "#talk-list .open") == ["The second dog", "The first fox"]
    page.click("#talk-list li:nth-child(2) .open")
    assert texts(page, ".turn.user .text") == ["The first fox"]
    reload(page)
    assert texts(page, ".turn.user .text") == ["The first fox"]
    page.click("#talk-list li:nth-child(1) [aria-label^=Delete]")
    assert texts(page, "#talk-list .open") == ["The first fox"]
    page.click("#toast button")
    assert sorted(texts(page, "#talk-list .open")) == ["The first fox", "The second dog"]
    page.download_to(tmp_path)
    for button, name in (("#export", "talk.md"), ("#export-all", "talks.json")):
        page.click(button)
        wait_for((tmp_path / name).is_file)
    talk, everything = ((tmp_path / name).read_text() for name in ("talk.md", "talks.json"))
    assert talk.startswith("# The second dog\n\n**You**\n\nThe second dog\n\n**Answer**\n\n")
    assert [one["messages"][0]["content"] for one in json.loads(everything)["talks"]][-1] == "The first fox"


def test_copy_edit_regenerate_delete(page):
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    fill(page, "#seed", "1")
    ask(page, "The fox")
    ask(page, "The dog")
    before = kept(page)["messages"]
    act(page, 3, "Copy")
    assert page.evaluate("window.copied") == before[3]["content"]
    # Regenerated from the state before the question.
    fill(page, "#seed", "2")
    act(page, 3, "Answer again")
    page.wait_for("document.querySelector('#toast').textContent.includes('Another answer')")
    settle(page, 2)
    body = json.loads(page.sent("/chat/completions")[-1])
    assert body["messages"] == [{"role": "user", "content": "The dog"}] and "state" in body
    assert kept(page)["messages"][:3] == before[:3] and kept(page)["messages"][3] != before[3]
    page.click("#toast button")
    assert kept(page)["messages"] == before
    # An edited question drops what follows.
    act(page, 0, "Edit")
    assert texts(page, ".editor .go") == ["Send, and drop what follows"]
    fill(page, ".editor textarea", "The cat")
    page.click(".editor .go")
    settle(page, 1)
    assert kept(page)["messages"][0]["content"] == "The cat" and len(kept(page)["messages"]) == 2
    # An edited answer is what the model is said to have answered.
    act(page, 1, "Edit")
    fill(page, ".editor textarea", "Miau.")
    page.click(".editor .go")
    assert ask(page, "And?")["messages"][1] == {"role": "assistant", "content": "Miau."}
    act(page, 2, "Delete, with its answer")
    assert [one["content"] for one in kept(page)["messages"]] == ["The cat", "Miau."]
    page.click("#toast button")
    assert len(kept(page)["messages"]) == 4


def test_an_answer_cut_by_length_is_continued(page):
    fill(page, "#seed", "3")
    ask(page, "The quick")
    begun = kept(page)["messages"][1]
    act(page, 1, "Continue")
    page.wait_for(f"JSON.parse(Object.entries(localStorage).find(([key]) => key.startsWith('tnllm.chat.'))[1])"
                  f".messages[1].content.length > {len(begun['content'])}")  # fmt: skip
    settle(page, 1)
    assert kept(page)["messages"][1]["content"].startswith(begun["content"])
    assert json.loads(page.sent("/chat/completions")[-1])["messages"][-1] == {
        "role": "assistant", "content": begun["content"]}  # fmt: skip


HOSTILE = """<script>window.harm = 1</script><img src=x onerror="window.harm = 1"> <b onclick="window.harm = 1">b</b>
[a](javascript:window.harm=1) [b](data:text/html,<script>window.harm=1</script>) [c](JaVaScRiPt:x) [d](vbscript:x)
![i](http://evil.example/x.png) <javascript:window.harm=1> <iframe src="https://evil.example"></iframe>
[e](https://ok.example/a?b=1&c "title") <svg onload="window.harm = 1"> <style>* { display: none }</style>

| <img src=x onerror=window.harm=1> | b |
| --- | :-: |
| `<script>` | 2 |

# Head *line*

- one
  1. two <details open ontoggle="window.harm=1">
- [x] three

```html
<script>window.harm = 1</script>
```
a &lt;b&gt; \\*c\\* **d** ~~e~~
f
"""


def test_markdown_and_nothing_of_a_models_html(page):
    render = f"import('/page/markdown.js').then(({{ markdown }}) => {{ const box = document.createElement('div'); \
        box.append(...markdown({json.dumps(HOSTILE)})); document.querySelector('#talk').append(box); window.box = box; }})"
    page.evaluate(render)
    names = page.evaluate("[...new Set([...box.querySelectorAll('*')].map((one) => one.localName))]")
    allowed = "p span code pre div button svg use a ul ol li h2 em strong del br table thead tbody tr th td"
    assert set(names) <= set(allowed.split())
    assert page.evaluate("[...box.querySelectorAll('a')].map((one) => one.href)") == [
        "http://evil.example/x.png", "https://ok.example/a?b=1&c"]  # fmt: skip
    assert page.evaluate("[...box.querySelectorAll('a')].every((one) => one.rel === 'noopener noreferrer')")
    attributes = page.evaluate("[...new Set([...box.querySelectorAll('*')].flatMap((one) => one.getAttributeNames()))]")
    assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcdoc")]
    assert said(page, "#talk pre code") == "<script>window.harm = 1</script>"
    words = page.evaluate("box.textContent")
    assert "<script>window.harm = 1</script><img src=x" in words and "a <b> *c* d ef" in words
    assert page.evaluate("box.querySelectorAll('table td').length") == 2
    # What would take the parser minutes, or be too deep for it: shown as it is.
    for text in ("*a_" * 20000, "a*b*" * 20000, "> - " * 20000, "> > 1. - " * 9000):
        shown = f"import('/page/markdown.js').then(({{ markdown }}) => markdown({json.dumps(text)}))"
        assert page.evaluate(f"{shown}.then((made) => made.length === 1 && made[0].textContent === {json.dumps(text)})")
    assert page.evaluate("window.harm") is None
    # If a fault let HTML through, the policy would not.
    for code in ("document.body.innerHTML = '<b>x</b>'", "document.body.setAttribute('onclick', 'window.harm = 1')"):
        assert page.evaluate(f"(() => {{ try {{ {code}; return false; }} catch {{ return true; }} }})()"), code
    assert len(page.problems()) == 2


def test_text_streams_and_stops(page, server):
    _, engine = server
    page.click("#tab-write")
    fill(page, "#max_tokens", "20000")
    fill(page, "#text", "The quick")
    page.click("#go")
    page.wait_for("document.querySelector('#text').value.length > 20")
    length = page.evaluate("document.querySelector('#text').value.length")
    page.wait_for(f"document.querySelector('#text').value.length > {length}")
    assert engine.slots.free == 1
    assert page.evaluate("document.activeElement.id") == "write-stop"
    page.click("#write-stop")
    page.wait_for("document.querySelector('#write-stats').textContent.includes('stopped by you')")
    assert page.evaluate("document.activeElement.id") == "go"
    text = page.evaluate("document.querySelector('#text').value")
    assert text.startswith("The quick") and said(page, "#layer mark") == text.removeprefix("The quick")
    # The server does not continue an abandoned text.
    wait_for(lambda: engine.slots.free == 2)
    reload(page)
    assert page.evaluate("document.querySelector('#text').value") == text
    page.click("#undo")
    assert page.evaluate("document.querySelector('#text').value") == "The quick"


# In the place of a server: a stream whose next part has always come already, a thousand of them a second.
FLOOD = """(() => {
  const line = 'data: ' + JSON.stringify({ choices: [{ text: 'All at once. ', delta: { content: 'All at once. ' } }] });
  const part = new TextEncoder().encode(line + '\\n\\n');
  const old = window.fetch;
  window.fetch = (path, options) => {
    if (!path.endsWith('completions')) return old(path, options);
    return Promise.resolve(new Response(new ReadableStream({
      start(stream) { options.signal.addEventListener('abort', () => stream.error(options.signal.reason)); },
      pull(stream) {
        const end = performance.now() + 1;
        while (performance.now() < end);
        stream.enqueue(part);
      },
    })));
  };
})()"""


@pytest.mark.parametrize("place", ["chat", "write"])
def test_a_flood_of_text_leaves_room_to_stop_it(page, place):
    page.evaluate(FLOOD)
    if place == "chat":
        page.type("#message", "The fox")
        page.press("Enter")
    else:
        page.click("#tab-write")
        page.click("#go")
    text = {"chat": "('.turn.live .text')?.textContent", "write": "('#text').value"}[place]
    page.wait_for(f"document.querySelector{text}?.includes('All at once. All at once.')")
    page.click({"chat": "#chat-stop", "write": "#write-stop"}[place])
    page.wait_for(f"document.querySelector('#{place}-stats').textContent.includes('stopped by you')")


def test_a_reload_amid_an_answer_keeps_what_came(page):
    fill(page, "#max_tokens", "20000")
    page.type("#message", "The fox")
    page.press("Enter")
    page.wait_for("document.querySelector('.turn.live .text')?.textContent.length > 40")
    reload(page)
    assert len(kept(page)["messages"][1]["content"]) > 20
    assert len(texts(page, ".turn")) == 2


def test_errors_in_plain_words(page, server, monkeypatch):
    _, engine = server
    monkeypatch.setattr(engine, "max_prompt_tokens", 3)
    page.type("#message", "A question that is too long")
    page.press("Enter")
    page.wait_for("!document.querySelector('#chat-error').hidden")
    words = said(page, "#chat-error")
    assert words.startswith("This text is too long for the server: ") and "this server takes at most 3" in words
    # What was typed is not lost, and no talk begins with it.
    assert page.evaluate("document.querySelector('#message').value") == "A question that is too long"
    assert texts(page, "#talk-list .open") == [] and said(page, ".empty h2")
    page.problems()
    monkeypatch.undo()
    cases = [
        ("async () => { throw new TypeError('x'); }", "The server cannot be reached."),
        ("async () => new Response('data: {\"choices\":[{\"text\":\"x\"}]}\\n\\n')", "The connection was cut"),
        ("async () => new Response('<h1>', { status: 502 })", "The server answered 502."),
        ("async () => Response.json({ error: { message: 'm', code: 'queue_full' } }, "
         "{ status: 429, headers: { 'Retry-After': '7' } })", "The server is busy. Try again in about 7 s."),
        ("async () => new Response('data: {\"error\":{\"message\":\"m\",\"code\":\"shutting_down\"}}\\n\\n')",
         "The server is shutting down."),
    ]  # fmt: skip
    page.click("#tab-write")
    for fetch, words in cases:
        page.evaluate(f"document.querySelector('#write-error').hidden = true; window.fetch = {fetch}")
        page.click("#go")
        page.wait_for("!document.querySelector('#write-error').hidden")
        assert said(page, "#write-error").startswith(words)


def test_a_full_storage_is_told(page):
    page.evaluate("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }")
    page.type("#message", "The fox")
    page.press("Enter")
    page.wait_for("document.querySelector('#chat-error').textContent.startsWith('The browser keeps no more.')")


def test_tabs_by_arrow_keys(page):
    page.evaluate("document.querySelector('#tab-chat').focus()")
    moves = {"ArrowRight": "write", "Home": "chat", "End": "write", "ArrowLeft": "chat"}
    for key, tab in [*moves.items(), ("ArrowLeft", "write"), ("ArrowRight", "chat")]:
        page.press(key)
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}"
        assert page.evaluate(f"!document.querySelector('#{tab}').hidden")
        assert page.evaluate("document.querySelectorAll('[role=tab][tabindex=\"0\"]').length") == 1


def test_the_focus_is_not_lost(page):
    focused = "document.activeElement !== document.body && document.activeElement.checkVisibility()"
    page.click(".ideas button")
    assert page.evaluate(focused)
    settle(page, 1)
    assert page.evaluate(focused)
    page.evaluate("document.querySelectorAll('.turn')[1].querySelector('[title=\"Answer again\"]').focus()")
    page.press("Enter")
    page.wait_for("document.querySelector('#toast').textContent.includes('Another answer')")
    assert page.evaluate(focused)
    settle(page, 1)
    # An edit is not lost to another question.
    act(page, 0, "Edit")
    page.type("#message", "And?")
    page.press("Enter")
    assert said(page, "#toast") == "Save or cancel the edit first." and texts(page, ".editor .go")
    page.evaluate("document.querySelector('.editor textarea').focus()")
    page.press("Escape")
    assert page.evaluate("document.activeElement.title") == "Edit"
    act(page, 0, "Delete, with its answer")
    assert page.evaluate(focused) and said(page, ".empty h2")


def test_a_talk_is_deleted_on_a_phone(browser, server):
    with opened(browser, server[0], 375, 700, phone=True) as page:
        page.type("#message", "The fox")
        page.press("Enter")
        settle(page, 1)
        page.click("#fresh")
        page.click("#show-talks")
        page.click("#talk-list [aria-label^=Delete]")
        assert texts(page, "#talk-list .open") == []
        # The sheet is still open, and what is outside of it cannot be pressed.
        page.click("#toast button")
        page.wait_for("document.querySelector('#talk-list .open')")


@pytest.mark.parametrize("name", ["settings", "talks"])
def test_a_sheet_keeps_the_focus(browser, server, name):
    with opened(browser, server[0], 375, 700, phone=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        for close in ("page.press('Escape')", f"page.click('#{name} .close')"):
            page.click(f"#show-{name}")
            assert page.evaluate(f"document.querySelector('#{name}').matches(':modal')")
            for shift in [False] * 20 + [True] * 20:
                page.press("Tab", shift)
                assert page.evaluate(f"document.querySelector('#{name}').contains(document.activeElement)")
            eval(close, {"page": page})
            page.wait_for(f"!document.querySelector('#{name}').open")
            assert page.evaluate("document.activeElement.id") == f"show-{name}"
        assert page.problems() == []


def test_settings_show_that_they_scroll(browser, server):
    with opened(browser, server[0], 1280, 500) as page:
        page.click("#more summary")
        page.evaluate("window.fields = document.querySelector('#fields')")
        assert page.evaluate("fields.scrollHeight > fields.clientHeight")
        assert "linear-gradient" in page.evaluate("getComputedStyle(fields).backgroundImage")


def test_directions_and_sentences(page):
    fill(page, "#message", "مرحبا")
    direction = "getComputedStyle(document.querySelector('{}')).direction"
    assert page.evaluate(direction.format("#message")) == "rtl"
    page.evaluate("document.querySelector('#message').value = ''")
    ask(page, "שלום לך")
    assert page.evaluate(direction.format(".turn.user .text")) == "rtl"
    text = "One. Two goes\non! 三。四"
    page.evaluate("document.querySelector('#spoken').replaceChildren()")
    heard = page.evaluate(f"""import('/page/page.js').then(({{ Speaker }}) => {{
        const speaker = new Speaker(), counts = [];
        for (let end = 1; end <= {len(text)}; end++) {{
            speaker.hear({text!r}.slice(0, end));
            counts.push(document.querySelector('#spoken').childElementCount);
        }}
        speaker.hear({text!r}, true);
        return counts;
    }})""")
    assert texts(page, "#spoken p") == ["One.", "Two goes", "on!", "三。", "四"]
    # A sentence when it has ended, not before.
    assert heard[:5] == [0, 0, 0, 0, 1] and heard[-1] == 4


def test_a_long_talk(page):
    """Hundreds of turns are opened and continued; turns far from view are not laid out, nor drawn again."""
    roles = ["user", "assistant"]
    open_talk(page, [{"role": role, "content": f"{n} **fox**"} for n in range(400) for role in roles])
    assert len(texts(page, ".turn")) == 800
    page.evaluate("window.box = document.querySelector('#scroll'), window.first = document.querySelector('.turn')")
    at_end = "box.scrollHeight - box.scrollTop - box.clientHeight < 5"
    page.wait_for(at_end)
    assert page.evaluate("getComputedStyle(first).contentVisibility") == "auto"
    ask(page, "And?")
    page.wait_for(at_end)
    assert page.evaluate("document.querySelector('.turn') === first")
    # Also when the window becomes narrower, as a phone's does that is turned.
    page.size(500, 500)
    page.wait_for(f"innerWidth === 500 && {at_end}")
    page.evaluate("box.scrollTop = 0")
    page.wait_for("!document.querySelector('#down').hidden")
    page.click("#down")
    page.wait_for(at_end)


@pytest.mark.parametrize("width, height, phone", SIZES[:2])
def test_a_key_is_asked_for(browser, ready, width, height, phone):
    locked = running(ready, Settings(name="locked", api_key="sesame"), num_slots=1)
    asked = "!document.querySelector('#key-field').hidden"
    with locked as (address, _), opened(browser, address, width, height, phone, asked) as page:
        assert "asks for an API key" in said(page, "#chat-error")
        assert page.evaluate("document.activeElement.id") == "key"
        page.type("#key", "wrong")
        page.press("Enter")
        page.wait_for("document.querySelector('#chat-error').textContent.includes('does not take')")
        fill(page, "#key", "sesame")
        page.press("Enter")
        page.wait_for("document.querySelector('#model').textContent === 'locked'")
        assert page.evaluate("document.querySelector('#chat-error').hidden")
        ask(page, "Hello")
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
        reload(page)
        assert said(page, "#model") == "locked"


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed; in the checkout: npm install axe-core")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width, height, phone", SIZES)
def test_accessibility(browser, two_models, width, height, phone, theme):
    with opened(browser, two_models, width, height, phone) as page:
        page.evaluate(f"localStorage.setItem('tnllm.theme', '\"{theme}\"')")
        # Trusted Types, which the page asks for, stop axe-core's own templates.
        page.call("Page.setBypassCSP", enabled=True)
        answer = {"role": "assistant", "content": HOSTILE, "isCut": True}
        open_talk(page, [{"role": "user", "content": "A question"}, answer])
        page.evaluate(AXE.read_text())
        violations = {}

        def check(what):
            assert page.evaluate("document.documentElement.scrollWidth") <= width, what
            found = page.evaluate("axe.run().then(({ violations }) => violations.map(({ id, nodes }) => "
                                  "[id, nodes[0].html.slice(0, 200), nodes[0].failureSummary]))")  # fmt: skip
            if found:
                violations[what] = found

        check("chat")
        act(page, 0, "Edit")
        check("an editor")
        page.click("#fresh")
        check("an empty chat")
        page.evaluate("document.querySelector('#more').open = true")
        page.evaluate("document.querySelector('#seed').value = 'x'")
        page.evaluate("document.querySelector('#seed').dispatchEvent(new Event('input'))")
        page.type("#message", "x")
        page.press("Enter")
        page.wait_for("!document.querySelector('#chat-error').hidden")
        check("an error")
        for name in ["settings", "talks"] if phone else []:
            page.click(f"#show-{name}")
            check(name)
            page.press("Escape")
        page.click("#tab-write")
        check("write")
        assert violations == {}
