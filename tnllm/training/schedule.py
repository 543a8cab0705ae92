"""The learning rate as a pure function of the update number.

    learning_rate(config.schedule, config.optimizer.learning_rate, step)

The horizon is a separate key, so two runs that differ only in length agree step for step.
"""

import math

from tnllm.training.config import ScheduleSection


def learning_rate(schedule: ScheduleSection, peak: float, step: int) -> float:
    """Learning rate of update `step` (the first is 0).

    Linear warm-up over `warmup_steps`, reaching `peak` with the last of them; then, up to `horizon_steps`:
    constant; cosine to `min_ratio * peak`; or wsd, which stays at the peak and falls linearly to that floor over
    the last `decay_steps` (default: a tenth of the horizon). After the horizon the rate stays at the floor.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor, horizon = schedule.min_ratio, schedule.horizon_steps
    assert horizon is not None, "a loaded recipe has a horizon"
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        progress = min(1.0, (step - schedule.warmup_steps) / max(1, horizon - schedule.warmup_steps))
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    fall = schedule.decay_steps or max(1, horizon // 10)
    progress = min(1.0, max(0.0, (step - (horizon - fall)) / fall))
    return peak * (1 - (1 - floor) * progress)
