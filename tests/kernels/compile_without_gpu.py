"""Compile every kernel for a compute capability, with no GPU: `python compile_without_gpu.py 90`.

Triton's interpreter runs kernels as Python, so it checks neither the types of variables nor the instructions of a GPU. Here
the launch functions run on CPU tensors up to the start of the compiled kernel. Prints the name of each kernel.
"""

import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tnllm.kernels import gated_attention_triton as gate
from tnllm.kernels import glu_triton as glu
from tnllm.kernels import linear_cross_entropy_triton as softmax
from tnllm.kernels import lrpe_triton as lrpe
from tnllm.kernels import srms_norm_triton as norm
from tnllm.kernels.decode_step import common, narrow, wide
from tnllm.kernels.lightning_attention import launch, step
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.decode_step import persistent_step
from tnllm.modeling.model import build_model

CAPABILITY = int(sys.argv[1])
HOPPER = CAPABILITY >= 90


class NoGpu:
    """The methods of a driver that Triton calls before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: JITFunction, *args: Any, run: Any = JITFunction.run, **options: Any) -> None:
    """In place of `JITFunction.run`."""
    run(kernel, *args, **(options | {"warmup": True}))
    print(kernel.fn.__name__, flush=True)


def attention(q: Tensor, k: Tensor, v: Tensor, state: bool = False, packed: bool = False) -> None:
    """Forward, backward, and the state of a slice."""
    _, T, H, D = q.shape
    lengths = torch.tensor([0, T // 3, T], dtype=torch.int32) if packed else None
    states = torch.zeros(2, 2 if packed else 1, H, D, v.shape[-1]) if state else (None, None)
    decay = torch.full((H,), -0.1)
    launch.triton_forward(q, k, v, decay, states[0], lengths, need_state=state)
    launch.triton_backward(torch.zeros_like(v), states[1], q, k, v, decay, states[0], lengths)
    launch.triton_state(k, v, decay)


def all_attention() -> None:
    q, k, v = torch.zeros(3, 1, 8192, 1, 128, dtype=torch.bfloat16)  # one head: several splits
    attention(q, k, v)
    attention(q[:, :1000], k[:, :1000], v[:, :1000], state=True)
    q, v = torch.zeros(1, 1000, 2, 192), torch.zeros(1, 1000, 2, 64)
    attention(q, q, v, state=True, packed=True)
    q, k, v = torch.zeros(3, 1, 1000, 2, 256, dtype=torch.bfloat16)
    attention(q, k, v, state=True, packed=True)
    attention(q[..., :192], k[..., :192], v[..., :64])
    # Slices of a projection with 2^31 elements to a row, beside results with fewer.
    far = torch.zeros(1, 1024, 3, 128, dtype=torch.bfloat16).as_strided((1, 1024, 3, 128), (1 << 31, 384, 128, 1))
    attention(*far.chunk(3, dim=2))
    step.triton_step(q[:, 0], q[:, 0], v[:, 0], torch.zeros(2), torch.zeros(1, 2, 192, 64))
    row, fresh = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.bool)
    step.triton_step(q[:, 0], q[:, 0], v[:, 0], torch.zeros(2), torch.zeros(3, 2, 192, 64), row, fresh)


def all_fused() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(4, 1024, dtype=dtype)
        norm.launch_forward(x, 1e-6)
        norm.launch_backward(x, x, 1e-6)
        glu.launch_forward(x, silu=True)
        glu.launch_backward(x[:, :512].contiguous(), x, silu=False)
        heads, theta, positions = x.view(1, 4, 8, 128), torch.zeros(8, 1, 128), torch.arange(4)[None]
        lrpe.launch_forward(heads, theta, positions, silu=True)
        lrpe.launch_backward(torch.zeros(1, 4, 8, 256, dtype=dtype), heads, theta, positions, silu=True)
        gate.silu(x)
        gate.silu_backward_(x, x)
        gate.norm_gate_backward(gate.norm_gate(x, x, 1e-6), x, x, x, 1e-6)
        softmax.launch_softmax(torch.zeros(4, 5000), torch.zeros(4, dtype=torch.int64), -100, True, dtype)


def all_decoding() -> None:
    for width in (1024, 2560):  # the narrow kernel, and the wide one
        config = ModelConfig(vocab_size=500, num_layers=1, model_dim=width, num_heads=width // 128, glu_dim=2048)
        model = build_model(config, "cpu", seed=0).bfloat16()
        _, state = model(torch.zeros(1, 3, dtype=torch.int64))
        persistent_step(model, state)()


driver.set_active(NoGpu())
JITFunction.run = compile_only
wide.num_programs = narrow.num_programs = lambda device: 132
common.has_bulk_prefetch = lambda device: HOPPER
launch._device = lambda x: launch.Device(4, 232448 if HOPPER else 166912, has_tma=HOPPER)
all_attention()
all_fused()
all_decoding()
