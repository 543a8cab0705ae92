"""A model as one ONNX graph that reads any number of tokens: the result of `convert --to onnx`.

write_onnx(hf_folder, out, quantize=None, log=print)         # model.onnx and what runs it without torch
difference, share = compare_with(hf_folder, out / MODEL)     # onnxruntime's logits against this package's

Inputs: tokens [B, T] int64, position [B] int64 (tokens of the row read before), state_0 ... state_{L-1} [B, H, D, E] fp32
(zeros at first). Outputs: logits [B, T, V] fp32, new_state_0 ... . T = 1 is a decoding step. Attention within the T tokens
is quadratic, so a long text is read in chunks of some hundred. Standard operators of opset 20 only.
In a hybrid, the state of a softmax layer is its cache [B, 2, read, H, d] (read = 0 at first), which grows by T.
"""

import json
import logging
import lzma
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnllm import __version__, assets
from tnllm.convert import check, hf_folder
from tnllm.convert.quantize import quiet_import
from tnllm.errors import MissingExtra, UserError
from tnllm.modeling.cache import is_cache
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.weights import CONFIG, GENERATION, TOKENIZER, load_model
from tnllm.tokenizer import Tokenizer, bits_per_byte

MODEL = "model.onnx"
# Of the npm package onnxruntime-web, in its folder dist.
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
CHUNK = 128
_OPSET = 20
_ONE_FILE = 400_000_000  # parameters; a protobuf holds 2 GB
_FAR = 1_000_000  # a position at which fp32 angles would be wrong


def check_onnx(config: ModelConfig, dtype: torch.dtype | None) -> None:
    """Raise UserError for what the graph does not hold, MissingExtra without the packages that write and run it."""
    if config.kind != "transnormer":
        raise UserError("a graph (--to onnx, web) is for TransNormerLLM and its hybrids; convert the baseline --to hf")
    if dtype not in (None, torch.float32):
        raise UserError("a graph (--to onnx, web) holds float32, or int8 with --quantize int8; leave out --dtype")
    for name in ("onnx", "onnxruntime", "onnxscript", "transformers"):
        if find_spec(name) is None:
            raise MissingExtra("onnx", name)


def check_web(num_parameters: int, names: Iterable[str], runtime: Path) -> None:
    """Raise UserError for what a page cannot run, and without the browser's runtime in the folder `runtime`.

    `names` are those of the model's files; a tokenizer.json among them shows that the tokenizer is a BPE model.
    """
    if num_parameters > _ONE_FILE:
        raise UserError("--to web is for models of up to 400M parameters, which one file holds")
    if not {TOKENIZER, "tokenizer.json"} <= set(names):
        raise UserError(
            f"--to web needs a {TOKENIZER} that is SentencePiece's BPE without normalization; see --tokenizer"
        )
    missing = [name for name in RUNTIME if not (runtime / "dist" / name).is_file()]
    if missing:
        raise UserError(
            f"{runtime} has no dist/{missing[0]}, of the runtime for browsers; run: npm install onnxruntime-web, "
            "or give its folder with --runtime"
        )


def write_page(out: Path, runtime: Path) -> None:
    """Copy the page and the browser's runtime to `out`, beside the graph."""
    for file in (*assets.browser_page().iterdir(), *(runtime / "dist" / name for name in RUNTIME)):
        shutil.copyfile(file, out / file.name)


def write_onnx(folder: Path, out: Path, quantize: bool, log: Callable[[str], None]) -> None:
    """Write the graph of a Hugging Face folder and its tokenizer and configs to `out`."""
    file = out / MODEL
    _export(folder, file)
    if quantize:
        exact = _bits_per_byte(file, folder)
        _quantize(file)
        log(f"int8      {exact:.4f} bits per byte become {_bits_per_byte(file, folder):.4f}, on text that ships")
    for name in (CONFIG, GENERATION, TOKENIZER, "tokenizer.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    about = str(__doc__).partition("\n\n")[2].rpartition("\n\n")[2].strip()
    (out / "README.md").write_text(
        f"# A TransNormerLLM as an ONNX graph\n\n{'int8' if quantize else 'float32'}, written by tnllm {__version__}.\n\n"
        f"{about}\n",
        encoding="utf-8",
    )


def compare_with(folder: Path, file: Path) -> tuple[float, float]:
    """Logits of the graph against this package's, of a chunk and of a step after it, near and far from the text's start.

    Returns the largest difference and its share of the largest logit.
    """
    model = load_model(folder, dtype=torch.float32)
    tokens = check.prompts(model.config.vocab_size)
    expected, found = [], []
    far = _FAR if model.config.position != "ape" else model.config.max_position - tokens.shape[1] - 1
    # A cache has a slot for each token before.
    for start in (0, *([] if model.config.num_softmax else [far])):
        state = model.init_state(tokens.shape[0])
        state.position += start
        run = Session(file, tokens.shape[0], start)
        logits, state = model(tokens, state)
        expected += [logits, model.step(tokens[:, 0], state)[:, None]]
        found += [torch.from_numpy(run(part.numpy())) for part in (tokens, tokens[:, :1])]
    return check.compare(torch.cat(expected, 1), torch.cat(found, 1))


class Session:
    """The graph in onnxruntime on a CPU, with the state it keeps."""

    def __init__(self, file: Path, batch: int = 1, start: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._state: dict[str, Any] = {
            # A size without a number is that of a cache, empty at first.
            item.name: np.zeros([batch, *(size if isinstance(size, int) else 0 for size in item.shape[1:])], np.float32)
            for item in self._session.get_inputs()[2:]
        }
        self._position = np.full(batch, start, np.int64)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """tokens [B, T] int64 → logits [B, T, V] fp32; the next call continues."""
        inputs = {"tokens": tokens, "position": self._position, **self._state}
        logits, *states = self._session.run(None, inputs)
        self._state = dict(zip(self._state, states, strict=True))
        self._position = self._position + tokens.shape[1]
        return np.asarray(logits)


class _Graph(nn.Module):
    """The exported folder's model as a function of tensors."""

    def __init__(self, model: Any, state: type) -> None:
        super().__init__()
        self.model, self.state = model, state

    def forward(self, tokens: Tensor, position: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        # Rows of one batch have read as many tokens, all of which a hybrid's softmax layers see.
        caches = [state for state in states if is_cache(state)]
        visible = torch.ones_like(caches[0][:, 0, :, 0, 0], dtype=torch.bool) if caches else None
        state = self.state([*states], position, 0, visible)
        output = self.model(tokens, past_key_values=state, use_cache=True, return_dict=True)
        return output.logits, output.past_key_values.layers


def _one_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, rows: None = None
) -> tuple[Tensor, Tensor]:
    """Attention of all T tokens at once, and the state after them; in place of the folder's own traced form.

    That one pads to whole chunks of 64, which makes a decoding step 64 times as much work.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    time = torch.arange(q.shape[2], device=q.device)
    g = log_decay.to(q.dtype)[:, None]
    gap = time[:, None] - time
    within = torch.where(gap >= 0, (g[..., None] * gap.clamp(min=0)).exp(), 0.0)
    o = ((q @ k.mT) * within) @ v + (q * (g * (time + 1)).exp()[..., None]) @ state
    new = (g * (time[-1:] + 1)).exp()[..., None] * state + (k * (g * (time[-1:] - time)).exp()[..., None]).mT @ v
    return o.transpose(1, 2), new


def _export(folder: Path, file: Path) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with hf_folder.imported_code(folder) as code, _quiet(), torch.no_grad():
        model = code.TnllmForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        operators = sys.modules[f"{code.__name__.rpartition('.')[0]}.operators"]
        operators.traced_attention = _one_chunk  # type: ignore[attr-defined]
        # No size is 1, which would become a constant of the graph.
        state = model.model.init_state(2, torch.device("cpu"))
        # Nor is a cache empty.
        states = [torch.zeros(2, 2, 3, *layer.shape[3:]) if is_cache(layer) else layer for layer in state.layers]
        tokens, position = torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        batch, length, read = (torch.export.Dim(name) for name in ("batch", "length", "read"))
        program = torch.onnx.export(
            _Graph(model, type(state)).eval(),
            (tokens, position, states),
            dynamo=True,
            opset_version=_OPSET,
            input_names=["tokens", "position", *(f"state_{i}" for i in range(len(states)))],
            output_names=["logits", *(f"new_state_{i}" for i in range(len(states)))],
            dynamic_shapes={
                "tokens": {0: batch, 1: length},
                "position": {0: batch},
                "states": [{0: batch, 2: read} if is_cache(layer) else {0: batch} for layer in states],
            },
            verbose=False,
        )
        assert program is not None
        # The exporter notes for every node where it comes from: a megabyte, with the paths of this machine.
        ClearMetadataAndDocStringPass()(program.model)
        # What is larger has its weights beside it.
        program.save(file, external_data=sum(p.numel() for p in model.parameters()) > _ONE_FILE)


def _quantize(file: Path) -> None:
    """Weights of matrix products to int8, per channel, and the embedding if it is tied; activations as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exact = file.with_name("float32.onnx")
    for path in file.parent.glob(f"{MODEL}*"):
        path.rename(path.with_name(path.name.replace(MODEL, exact.name)))
    with _quiet():
        quantize_dynamic(exact, file, weight_type=QuantType.QInt8, per_channel=True)
    for path in file.parent.glob(f"{exact.name}*"):
        path.unlink()


def _bits_per_byte(file: Path, folder: Path) -> float:
    """On the first documents of the packaged sample, up to 1,500 tokens each read from the start."""
    tokenizer = Tokenizer.load(folder)
    nats, size = 0.0, 0
    with lzma.open(assets.sample_corpus(), "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, 4)]
    for text in texts:
        ids = np.array([tokenizer.encode(text)[:1500]], np.int64)
        run = Session(file)
        logits = np.concatenate([run(ids[:, at : at + CHUNK]) for at in range(0, ids.shape[1], CHUNK)], 1)[0, :-1]
        nats += float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(ids[0, 1:]), reduction="sum"))
        size += len(tokenizer.decode(ids[0, 1:].tolist()).encode())
    return bits_per_byte(nats, size)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's and the quantizer's notes about packages that are not needed here."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    quiet_import()
    disable_progress_bar()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
        try:
            yield
        finally:
            logging.disable(before)
            enable_progress_bar()
