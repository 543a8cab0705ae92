"""One decoding step as a CUDA graph: a single launch instead of hundreds, which is what a small batch waits for.

step = CapturedStep(model, state)
logits = step(tokens)          # as model.step(tokens, state); logits are overwritten by the next call
step.top_token                 # argmax of the logits, where it is part of the graph

For one row the graph holds one persistent kernel (`tnllm.kernels.decode_step`), for a larger batch the model's own kernels.
"""

import torch
from torch import Tensor

from tnllm.modeling.decode_step import persistent_step
from tnllm.modeling.model import LanguageModel
from tnllm.modeling.state import State

# Capturing costs about as much as four plain steps (385M on an H100: 88 ms; 24 ms a plain step, 1.3 ms a replay).
MIN_STEPS = 8


def can_capture(model: LanguageModel, num_steps: int) -> bool:
    """Whether capturing is possible and pays off for `num_steps` steps.

    A graph replays fixed addresses: a state of constant size has them, a growing key-value cache does not.
    Learned positions need a check on the host.
    """
    config = model.config
    fixed = not config.num_softmax and config.position != "ape"
    return model.device.type == "cuda" and fixed and num_steps >= MIN_STEPS


class CapturedStep:
    """`model.step` for the tensors of one `state`, which it updates in place."""

    @torch.no_grad()
    def __init__(self, model: LanguageModel, state: State, num_choices: int | None = None) -> None:
        """`num_choices`: `top_token` is below this id; None: the full vocabulary."""
        self.batch = state.batch
        self._tokens = torch.zeros(state.batch, dtype=torch.int64, device=model.device)
        # Warm up on a copy of the state and a separate stream: no kernel may be compiled and no workspace allocated
        # during capture.
        copy, stream = state.clone(), torch.cuda.Stream()
        self._persistent = persistent_step(model, state, num_choices)
        warmup = persistent_step(model, copy, num_choices)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                warmup() if warmup else model.step(self._tokens, copy)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            if self._persistent:
                self._persistent()
                self._tokens, self.logits = self._persistent.tokens, self._persistent.logits
            else:
                self.logits = model.step(self._tokens, state)

    @property
    def top_token(self) -> Tensor | None:
        """[B] argmax of each row of the last logits, valid until the next call; None if the graph does not compute it."""
        return self._tokens if self._persistent else None

    @property
    def top_logit(self) -> Tensor:
        """[B] fp32, the logit of `top_token`."""
        assert self._persistent
        return self._persistent.top_logit

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B] int64 → logits [B, V] fp32, valid until the next call."""
        if tokens is not self._tokens:
            self._tokens.copy_(tokens)
        self._graph.replay()
        return self.logits
