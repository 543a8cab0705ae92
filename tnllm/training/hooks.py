"""What a run does between its steps: a list of hooks, called in order after each update.

    hooks = make_hooks(run, score)
    for hook in hooks:
        if hook.due(step, last):
            hook.act()

To add something that is done every N steps: write `_act(run)` here, add a Hook to `make_hooks`, and give its N a key in
tnllm/training/sections.py.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tnllm.chat_template import render
from tnllm.data.loader import Loader
from tnllm.modeling.model import LanguageModel
from tnllm.tokenizer import Tokenizer
from tnllm.training.memory import peak_memory_gib
from tnllm.training.run import Run
from tnllm.training.trainer import compute_dtype
from tnllm.training.validation import accuracy, validate

Scorer = Callable[[LanguageModel, Tokenizer], dict[str, float]]


@dataclass(frozen=True)
class Hook:
    """`act`, due every so many steps (0: only at the end). `quick`: done before leaving after a signal too.

    Others are then `owed`, and made up for under their `name` when the run resumes.
    """

    name: str
    every: int
    act: Callable[[], None]
    quick: bool = False
    first: bool = False  # after the first step too

    def due(self, step: int, last: bool) -> bool:
        """Whether it is due after `step`, the `last` one or not."""
        return (self.first and step == 1) or due(self.every, step, last)


def due(every: int, step: int, last: bool) -> bool:
    """Whether something done every so many steps (0: only at the end) is due after `step`."""
    return last or (every > 0 and step % every == 0)


def make_hooks(run: Run, score: Scorer | None) -> list[Hook]:
    """The hooks of a run in their order; `score` scores eval.tasks. The checkpoint comes last, with all rows before it."""
    config = run.trainer.config
    hooks = [Hook("log", config.log.every_steps, lambda: _log(run), quick=True, first=True)]
    if run.validation is not None:
        hooks.append(Hook("validate", config.eval.every_steps, lambda: _validate(run)))
        if config.eval.sample_prompts and run.trainer.ranks.size == 1:
            hooks.append(Hook("sample", config.eval.every_steps, lambda: _sample(run)))
    if score is not None:
        every = config.eval.tasks_every_steps
        hooks.append(Hook("score", every, lambda: _report(run, **score(run.trainer.model, run.tokenizer))))
    return [*hooks, Hook("save", config.checkpoint.every_steps, run.save, quick=True)]


def _report(run: Run, **values: Any) -> None:
    run.report({"step": run.state.step, "tokens": run.state.tokens, **values, "time": time.time()})


def _log(run: Run) -> None:
    loss, norm = run.check_updates()
    config, timer = run.trainer.config, run.timer
    batch_tokens = config.global_batch_rows * config.data.seq_len
    rate = timer.steps_per_s() * batch_tokens
    _report(
        run,
        loss=loss,
        grad_norm=norm,
        lr=run.learning_rate,
        tokens_per_s=rate,
        tokens_per_step=batch_tokens,
        mfu=rate / run.peak_tokens_per_s if run.peak_tokens_per_s else None,
        mfu_sheet=rate / run.sheet_tokens_per_s if run.sheet_tokens_per_s else None,
        mem_gib=peak_memory_gib(run.trainer.device),
        **timer.waits(run.trainer.ranks),
        skipped=run.state.skipped,
    )


def _validate(run: Run) -> None:
    trainer = run.trainer
    assert run.validation is not None
    rows, tokens = trainer.config.train.micro_batch_size, trainer.config.eval.tokens
    loss, bpb = validate(trainer.loss_sum, run.validation, rows, tokens, trainer.ranks)
    more: dict[str, Any] = {}
    if isinstance(run.validation, Loader) and run.validation.masked and trainer.ranks.size == 1:
        low = compute_dtype(trainer.config.train, trainer.device) == torch.bfloat16
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=low):
            more = accuracy(trainer.model, run.validation, rows, tokens)
    _report(run, val_loss=loss, val_bpb=bpb, **more)


def _sample(run: Run) -> None:
    """A sample for each of eval.sample_prompts from the current weights; the run's random state is untouched."""
    from tnllm.generation.decoder import generate_text

    config = run.trainer.config
    for prompt in config.eval.sample_prompts:
        asked, shown = prompt, prompt
        if config.data.format == "chat":
            asked, shown = render(config.prompt_template, [("user", prompt)])[0].text, f"{prompt} -> "
        count, seed = config.eval.sample_tokens, config.train.seed
        text = generate_text(run.trainer.model, run.tokenizer, asked, max_tokens=count, seed=seed)
        run.display.log(f"sample at step {run.state.step}: {shown}{text}")
