"""What each rank of test_scale.py runs: a wrong mesh, a rank that dies, a memory that is full."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from tnllm.bench import scale_rank, train


class Step(train.Step):
    """FSDP averages gradients instead of adding them, which the losses of Adam hardly show; rank 1 is killed while
    sequence parallelism is timed; rows beyond 128 tokens do not fit."""

    def __init__(self, config, device, mesh=None) -> None:
        super().__init__(config, device, mesh)
        for module in self.trainer.model.modules():
            if isinstance(module, FSDPModule) and config.parallel.shard == 2:
                module.set_gradient_divide_factor(2.0)

    def __call__(self) -> None:
        config = self.trainer.config
        timed = config.model.num_layers > 2
        if timed and config.parallel.sequence == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if timed and config.data.seq_len > 128:
            raise torch.OutOfMemoryError("no room\nat all")
        super().__call__()


if __name__ == "__main__":
    scale_rank.Step = train.Step = Step
    scale_rank.main(Path(sys.argv[1]))
