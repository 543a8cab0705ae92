"""The page that `convert --to web` writes, in a browser: its tokenizer, its text, and no address but its own.

npm install onnxruntime-web       # in the checkout: for the text
"""

import json
import random
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from tests.serving import chromium
from tests.small_models import small_model
from tnllm import assets
from tnllm.convert.onnx import RUNTIME
from tnllm.errors import UserError
from tnllm.generation.decoder import generate
from tnllm.generation.sampler import SamplingParams
from tnllm.generation.samples import Result
from tnllm.modeling.weights import load_model, save_model
from tnllm.tokenizer import Tokenizer

EXECUTABLE = chromium.find()
in_a_browser = pytest.mark.skipif(
    EXECUTABLE is None,
    reason=f"no browser on PATH (looked for {', '.join(chromium.NAMES)}); on Debian: apt-get install chromium",
)
INSTALLED = Path(__file__).parents[2] / "node_modules/onnxruntime-web"
DEMO = assets.demo_weights()
PARTS = [
    "The river and the hills beyond it. ", "从前有一个国王，他有三个儿子。", "def f(x: int) -> str:\n    return f'{x!r}'\n",
    "👩\u200d👩\u200d👧🇨🇭", "𠀀é\u0301ﬁ", "Ünïcödé Ελληνικά кириллица עברית हिन्दी ไทย 日本語 한국어",
    "https://a.org/b?c=d&e=%20", "3.14159e-26", "<s></s><unk><0x41>", "<|im_end|>", "\u2581", " ", "  ",
    "\t", "\n", "\r\n", "\u00a0",
    "\u3000", "\u200b", "\ufeff", "\x00", "\x07", "\x1b[0m", "\x7f", "\u2028", "\ufffd", "\U0010ffff",
]  # fmt: skip


def strings(count):
    """Cuts and shuffles of texts of every kind, and characters from anywhere."""
    rng, made = random.Random(0), [""]
    while len(made) < count:
        parts = rng.choices(PARTS, k=rng.randint(1, 6))
        parts += [
            chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(rng.randrange(3))
        ]
        rng.shuffle(parts)
        text = "".join(parts)
        start = rng.randrange(len(text))
        made.append(text[start : start + rng.randint(1, 80)])
    return made


@contextmanager
def opened(folder, path=""):
    """A page of the files of a folder, as `python -m http.server` serves them."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/"
        try:
            with chromium.Browser(EXECUTABLE) as browser:
                page = browser.open(address + path, 800, 600)
                yield page
                assert page.problems() == []
                assert all(url.startswith((address, "data:", "blob:", "about:")) for url in page.requests())
        finally:
            server.shutdown()
            thread.join()


def changed(model, kind):
    """The model, with a space before every text, as Llama's has it, or with a symbol that is matched before all merges."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto = messages.ModelProto.FromString(model)
    if kind == "space":
        proto.normalizer_spec.add_dummy_prefix = True
    if kind == "symbol":
        proto.pieces.add(piece="<|im_end|>", score=0.0, type=messages.ModelProto.SentencePiece.USER_DEFINED)
    return proto.SerializeToString()


def write_tokenizer(folder, model):
    """A page with the tokenizer and without the runtime."""
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "ort.wasm.min.mjs").write_text("export const env = { wasm: {} };")
    (folder / "tnllm.mjs").write_bytes((assets.browser_page() / "tnllm.mjs").read_bytes())
    (folder / "index.html").write_text('<!doctype html><link rel="icon" href="data:,">')


@in_a_browser
@pytest.mark.parametrize("kind", ["demo", "64k", "space", "symbol"])
def test_the_tokenizer_is_ours(kind, tmp_path):
    model = assets.tokenizer_model("tnllm-64k" if kind == "64k" else None).read_bytes()
    write_tokenizer(tmp_path, changed(model, kind))
    tokenizer, texts = Tokenizer.load(tmp_path), strings(5000 if kind == "demo" else 1000)
    with opened(tmp_path) as page:
        found = page.evaluate(
            "(async () => { const { Tokenizer } = await import('/tnllm.mjs');"
            "const file = await (await fetch('/tokenizer.model')).arrayBuffer();"
            "const tokenizer = new Tokenizer(new Uint8Array(file));"
            f"return {{ ids: {json.dumps(texts)}.map((text) => tokenizer.encode(text)),"
            "bytes: tokenizer.bytes.map((bytes) => [...bytes]) }; })()"
        )
    assert [list(part) for part in tokenizer.token_bytes] == found["bytes"]
    assert [text for text, ids in zip(texts, found["ids"], strict=True) if tokenizer.encode(text) != ids] == []


@in_a_browser
def test_twice_the_text_is_twice_the_work(tmp_path):
    """Also within one run of characters that all merge; the work is counted in lookups, which no load changes."""
    write_tokenizer(tmp_path, assets.tokenizer_model(None).read_bytes())
    rng = random.Random(0)
    # A U+2581 in a text is a part of its own.
    texts = ["".join(rng.choices(alphabet, k=length)) for alphabet in ("etaoin", "a\u2581") for length in (4000, 8000)]
    with opened(tmp_path) as page:
        found = page.evaluate(
            "(async () => { const { Tokenizer } = await import('/tnllm.mjs');"
            "const file = await (await fetch('/tokenizer.model')).arrayBuffer();"
            "const tokenizer = new Tokenizer(new Uint8Array(file)), get = tokenizer.known.get.bind(tokenizer.known);"
            "let lookups = 0; tokenizer.known.get = (piece) => (lookups++, get(piece));"
            f"return {json.dumps(texts)}.map((text) => {{ lookups = 0; const ids = tokenizer.encode(text);"
            "return [ids, lookups]; }); })()"
        )
    tokenizer = Tokenizer.load(tmp_path)
    assert [ids for ids, _ in found] == [tokenizer.encode(text) for text in texts]
    lookups = [count for _, count in found]
    assert all(1.9 < twice / once < 2.1 for once, twice in (lookups[:2], lookups[2:])), lookups


@in_a_browser
@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED.is_dir(), reason="onnxruntime-web is not installed: npm install onnxruntime-web")
@pytest.mark.parametrize("hybrid", [False, True])
def test_the_text_is_that_of_generate(hybrid, run, tmp_path):
    source = tmp_path / "weights" if hybrid else DEMO
    if hybrid:
        save_model(small_model(vocab_size=8192, softmax_every=2, num_layers=2), source, DEMO / "tokenizer.model")
    run(source, tmp_path / "page", "web", runtime=INSTALLED, verify=False)  # the graph has tests of its own
    model, tokenizer = load_model(source, dtype=torch.float32), Tokenizer.load(DEMO)
    params = SamplingParams(temperature=0, repetition_penalty=1.03, max_tokens=40)
    prompts = ["Once upon a time", "从前有一个国王，" * 30]  # the second in two chunks
    results = [event for event in generate(model, tokenizer, prompts, params) if isinstance(event, Result)]
    expected = [result.tokens for result in sorted(results, key=lambda result: result.index)]
    assert min(map(len, expected)) == 40
    with opened(tmp_path / "page") as page:
        page.wait_for("!document.querySelector('#go').disabled", seconds=120)
        found = page.evaluate(
            "(async () => { const model = await (await import('/tnllm.mjs')).load('.'); const made = [];"
            f"for (const prompt of {json.dumps(prompts)}) {{ const ids = [];"
            "for await (const { id } of model.generate(prompt, { limit: 40 })) ids.push(id); made.push(ids); }"
            "return made; })()"
        )
        assert found == expected
        drawn = page.evaluate(
            "(async () => { const model = await (await import('/tnllm.mjs')).load('.'); const texts = [];"
            f"for (const topP of [1e-6, 1, 1]) {{ const ids = []; const options = {{ limit: 40, temperature: 1, topP }};"
            f"for await (const {{ id }} of model.generate({json.dumps(prompts[0])}, options)) ids.push(id);"
            "texts.push(ids); } return texts; })()"
        )
        # Only the most likely token is left; and two draws of many differ.
        assert drawn[0] == expected[0] and drawn[1] != drawn[2]
        # And by hand.
        page.evaluate("document.querySelector('#limit').value = 40, document.querySelector('#temperature').value = 0")
        page.click("#go")
        page.wait_for("document.querySelector('#stats').textContent.startsWith('40 tokens')", seconds=120)
        page.wait_for("document.querySelector('#go').textContent === 'Continue'")
        text = page.evaluate("document.querySelector('#text').textContent")
        assert text == prompts[0] + tokenizer.decode(expected[0])


def test_what_a_page_needs(run, tmp_path):
    """Found before any work, in one line each."""
    with pytest.raises(UserError, match=r"nowhere has no dist/ort.wasm.min.mjs, .*npm install onnxruntime-web"):
        run(DEMO, tmp_path / "page", "web", runtime=tmp_path / "nowhere")
    for name in RUNTIME:
        file = tmp_path / "runtime/dist" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "unigram").mkdir()
    with pytest.raises(UserError, match=r"--to web needs a tokenizer.model that is SentencePiece's BPE"):
        run(DEMO, tmp_path / "page", "web", runtime=tmp_path / "runtime", tokenizer=unigram(tmp_path))
    assert not any((tmp_path / "page").glob("*.*"))


def unigram(folder):
    import sentencepiece

    lines = (DEMO / "config.json").read_text().split() * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "unigram/tokenizer"), vocab_size=320, model_type="unigram",
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return folder / "unigram/tokenizer.model"
