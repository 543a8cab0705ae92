"""The learning rate as a pure function of the update number.

    learning_rate(config.schedule, config.optimizer.learning_rate, step)

The horizon is a separate key, so two runs that differ only in length agree step for step.
"""

import math

from tnllm.training.sections import ScheduleSection


def learning_rate(schedule: ScheduleSection, peak: float, step: int) -> float:
    """Learning rate of update `step` (the first is 0).

    Linear warm-up over `warmup_steps`, reaching `peak` with the last of them; then constant; or a fall to the floor
    `min_ratio * peak`, which the last update before `horizon_steps` is at: cosine, linear, or wsd, which stays at the
    peak and falls linearly over the last `decay_steps` (default: a tenth of the horizon, or what warm-up leaves of it).
    After the horizon the rate stays at the floor.
    """
    floor, horizon, warmup = schedule.min_ratio, schedule.horizon_steps, schedule.warmup_steps
    assert horizon is not None and warmup is not None, "a loaded recipe has both, once the data of its epochs is known"
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    fall = horizon - warmup
    if schedule.kind == "wsd":
        fall = schedule.decay_steps or min(max(1, horizon // 10), fall)
    # Counted from the update before the fall, so that the last update of the horizon has all of it.
    progress = min(1.0, max(0.0, (step + 1 - (horizon - fall)) / fall))
    if schedule.kind == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return peak * (1 - (1 - floor) * progress)
