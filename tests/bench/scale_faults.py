"""Imported by the ranks of test_scale.py before they start: a wrong mesh, a rank that dies, a memory that is full."""

import os
import signal

import torch
from torch.distributed.fsdp import FSDPModule

from tnllm.bench import scale_rank, train

_Step, _divide = scale_rank.Step, FSDPModule.set_gradient_divide_factor


def _average(module: FSDPModule, factor: float) -> None:
    _divide(module, 2 * factor)


class Step(_Step):
    """FSDP averages gradients instead of adding them, which the losses of Adam hardly show; rank 1 is killed while
    sequence parallelism is timed; rows beyond 128 tokens do not fit."""

    def __init__(self, config, *args) -> None:
        FSDPModule.set_gradient_divide_factor = _average if config.parallel.shard == 2 else _divide
        super().__init__(config, *args)

    def __call__(self) -> None:
        config = self.trainer.config
        timed = config.model.num_layers > 2
        if timed and config.parallel.sequence == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if timed and config.data.seq_len > 128:
            raise torch.OutOfMemoryError("no room\nat all")
        super().__call__()


# The check and the search make theirs there, the timed step is made here.
scale_rank.Step = train.Step = Step
