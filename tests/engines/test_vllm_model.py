"""The model that vLLM runs, without vLLM: batches and pages as its scheduler makes them, on a CPU and on a GPU.

pytest -m gpu tests/engines/test_vllm_model.py
"""

import copy
import sys
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.small_models import small_model
from tnllm.modeling.hf_names import to_hf_config, to_official

# What the model's file imports from vLLM.
NAMES = {
    "vllm.distributed": ("get_tp_group", "tensor_model_parallel_all_gather"),
    "vllm.forward_context": ("get_forward_context",),
    "vllm.model_executor.layers.attention": ("Attention",),
    "vllm.model_executor.layers.mamba.abstract": ("MambaBase",),
    "vllm.model_executor.layers.mamba.mamba_utils": ("MambaStateCopyFuncCalculator",),
    "vllm.model_executor.models.interfaces": (
        "HasInnerState",
        "IsAttentionFree",
        "IsHybrid",
        "SupportsMambaPrefixCaching",
    ),
    "vllm.v1.attention.backends.mamba1_attn": ("Mamba1AttentionBackend", "Mamba1AttentionMetadataBuilder"),
    "vllm.v1.attention.backends.registry": ("MambaAttentionBackendEnum",),
}
SIZES = {"model_dim": 128, "num_heads": 4, "glu_dim": 96, "num_layers": 3}
SLOTS, CHUNK = 3, 64
# Prompt and full length of each text: one-token prompts among them, more texts than slots, prompts of several chunks.
TEXTS = [(70, 75), (1, 9), (200, 206), (3, 4), (1, 3), (65, 70), (1, 6), (129, 131)]
# Of logits' standard deviation: fp32 sums in another order, and on a GPU three tf32 products for one.
LIMIT = 2e-4
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture
def vllm_model(monkeypatch):
    """The module, with stubs for vLLM."""
    for name, parts in NAMES.items():
        path = name.split(".")
        for end in range(1, len(path)):
            monkeypatch.setitem(sys.modules, ".".join(path[:end]), ModuleType(".".join(path[:end])))
        module = ModuleType(name)
        vars(module).update({part: type(part, (), {}) for part in parts})
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["vllm.model_executor.layers.attention"])["Attention"] = Attention
    group = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(sys.modules["vllm.distributed"], "get_tp_group", lambda: group)
    monkeypatch.delitem(sys.modules, "tnllm.engines.vllm_model", raising=False)
    module = import_module("tnllm.engines.vllm_model")
    yield module
    del sys.modules[module.__name__]


class Attention(torch.nn.Module):
    """In place of vLLM's: keys and values of each page, and softmax over a text's."""

    def __init__(self, num_heads, head_size, scale, cache_config=None, prefix=""):
        super().__init__()
        self.num_heads, self.scale, self.pages = num_heads, scale, {}

    def forward(self, query, key, value):
        """[T, heads x channels] of all texts of a batch, `engine.parts`."""
        assert query.shape[1] == key.shape[1] == value.shape[1]
        attended = torch.empty_like(query)
        at = 0
        for page, start, length in self.engine.parts:
            rows = slice(at, at := at + length)
            new = torch.stack([key[rows], value[rows]])
            kept = self.pages[page] if start else new[:, :0]
            assert kept.shape[1] == start
            self.pages[page] = torch.cat([kept, new], 1)
            q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (query[rows], *self.pages[page]))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(start + 1)
            attended[rows] = torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v).flatten(
                1
            )
        return attended


class Engine:
    """Runs the batches of a scheduler with a fixed number of slots."""

    def __init__(self, vllm_model, small, device, dtype=torch.float32):
        self.device, self.context = device, None
        vllm_model.get_forward_context = lambda: SimpleNamespace(attn_metadata=self.context)
        hf = SimpleNamespace(to_dict=lambda: to_hf_config(small.config))
        config = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=hf, dtype=dtype),
            cache_config=None,
            compilation_config=SimpleNamespace(static_forward_context={}),
        )
        with torch.device(device):
            kind = vllm_model.TnllmHybridForCausalLM if small.config.num_softmax else vllm_model.TnllmForCausalLM
            self.model = kind(vllm_config=config)
        loaded = self.model.load_weights((to_official(name), value) for name, value in small.named_parameters())
        assert loaded == {name for name, _ in self.model.named_parameters()}
        self.layers = config.compilation_config.static_forward_context
        for layer in self.layers.values():
            # Page 0 is where padding goes; what a page held before may be anything.
            [shape] = layer.get_state_shape()
            layer.kv_cache = (torch.full((SLOTS + 1, *shape), torch.nan, device=device),)
        for module in self.model.modules():
            if isinstance(module, Attention):
                module.engine = self

    def tensor(self, values, dtype):
        return torch.tensor(values, dtype=dtype, device=self.device)

    def prepare(self, steps, prefills):
        """Inputs of a batch: `steps` and `prefills` are lists of (page, first position, token ids), steps of one token."""
        self.parts = [(page, start, len(tokens)) for page, start, tokens in steps + prefills]
        ids = [id for _, _, tokens in steps + prefills for id in tokens]
        positions = [start + i for _, start, tokens in steps + prefills for i in range(len(tokens))]
        offsets = torch.tensor([0, *(len(tokens) for _, _, tokens in prefills)]).cumsum(0).tolist()
        metadata = SimpleNamespace(
            num_decode_tokens=len(steps),
            num_prefill_tokens=offsets[-1],
            state_indices_tensor_d=self.tensor([[page] for page, _, _ in steps], torch.int32).view(-1, 1),
            state_indices_tensor_p=self.tensor([page for page, _, _ in prefills], torch.int32),
            has_initial_states_p=self.tensor([start > 0 for _, start, _ in prefills], torch.bool),
            query_start_loc_p=self.tensor(offsets, torch.int32),
        )
        self.context = dict.fromkeys(self.layers, metadata)
        return self.tensor(ids, torch.int32), self.tensor(positions, torch.int64)

    def __call__(self, ids, positions):
        return self.model.compute_logits(self.model(ids, positions))


@contextmanager
def no_sync(device):
    """A host that waits for the GPU is an error."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def serve(engine, texts, run):
    """Logits [T, V] of each text: prompts in chunks beside decoding steps; `run(ids, positions, decoding)` is the model."""
    waiting, running, free = list(range(len(texts))), {}, list(range(SLOTS, 0, -1))
    done, logits = [0] * len(texts), [[] for _ in texts]
    while waiting or running:
        while waiting and free:
            running[waiting.pop(0)] = free.pop()
        # A prompt of one token counts as a step, as vLLM counts it.
        each = {
            text: 1 if done[text] >= TEXTS[text][0] else min(CHUNK, TEXTS[text][0] - done[text]) for text in running
        }
        order = sorted(running, key=lambda text: each[text] > 1)
        parts = [(running[text], done[text], texts[text][done[text] : done[text] + each[text]]) for text in order]
        first = sum(each[text] == 1 for text in order)
        found = run(*engine.prepare(parts[:first], parts[first:]), decoding=first == len(parts))
        for text, rows in zip(order, found.split([each[text] for text in order]), strict=True):
            logits[text].append(rows.float().cpu())
            done[text] += each[text]
            if done[text] == TEXTS[text][1]:
                free.append(running.pop(text))
    return [torch.cat(parts) for parts in logits]


def largest_gap(found, small, texts):
    """Of logits, to those of each text alone in float32 on a CPU, in standard deviations of these."""
    expected = torch.cat([small(torch.tensor([text]))[0][0] for text in texts])
    return float((torch.cat(found) - expected).abs().max() / expected.std())


def make_texts():
    return [torch.randint(0, 352, (length,)).tolist() for _, length in TEXTS]


@each_device
@torch.inference_mode()
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"position": "lrpe-d", "gate": "low-rank"},
        {"position": "ape", "norm": "layernorm"},
        {"softmax_every": 2, "qk_norm": True, "rope_base": 500.0},
        {"softmax_every": 1},
    ],
)
def test_texts_in_reused_slots(vllm_model, device, choices):
    small, texts = small_model(**SIZES, **choices), make_texts()
    engine, decoded = Engine(vllm_model, small, device), 0

    def run(ids, positions, decoding):
        nonlocal decoded
        if not decoding:
            return engine(ids, positions)
        decoded += 1
        with no_sync(device):
            return engine(ids, positions)

    gap = largest_gap(serve(engine, texts, run), small, texts)
    assert decoded > 3
    assert gap < LIMIT


def graphed(engine):
    """`run` of `serve` with decoding steps in a CUDA graph: captured once for more rows than there are, as vLLM does."""
    fixed = engine.prepare([(0, 0, [0])] * (SLOTS + 1), [])
    context = next(iter(engine.context.values()))
    buffers = (*fixed, context.state_indices_tensor_d)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        engine(*fixed)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        logits = engine(*fixed)

    def run(ids, positions, decoding):
        if not decoding:
            return engine(ids, positions)
        pages = next(iter(engine.context.values())).state_indices_tensor_d
        buffers[2].zero_()  # the page of padding
        for buffer, values in zip(buffers, (ids, positions, pages), strict=True):
            buffer[: len(values)].copy_(values)
        graph.replay()
        return logits[: len(ids)].clone()

    return run


@pytest.mark.gpu
@torch.inference_mode()
def test_decoding_in_a_graph(vllm_model):
    small, texts = small_model(**SIZES), make_texts()
    engine = Engine(vllm_model, small, "cuda")
    assert largest_gap(serve(engine, texts, graphed(engine)), small, texts) < LIMIT


@pytest.mark.gpu
@torch.inference_mode()
def test_bfloat16_is_as_near_as_the_package_itself(vllm_model):
    small, texts = small_model(**SIZES), make_texts()
    engine = Engine(vllm_model, small, "cuda", torch.bfloat16)
    found = torch.cat(serve(engine, texts, graphed(engine)))
    exact = torch.cat([small(torch.tensor([text]))[0][0] for text in texts])
    rounded = copy.deepcopy(small).to("cuda", torch.bfloat16)
    own = torch.cat([rounded(torch.tensor([text], device="cuda"))[0][0].cpu() for text in texts])
    # Rounding to 8 bits moves each logit by an amount that is as good as random; means over 400 tokens agree.
    assert (found - exact).abs().mean() < 1.2 * (own - exact).abs().mean()
