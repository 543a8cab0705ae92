"""The learning rate: warm-up, each shape, and independence of the run's length."""

import pytest

from tnllm.errors import UserError
from tnllm.training.config import load_recipe
from tnllm.training.optim import learning_rate
from tnllm.training.sections import OptimizerSection, ScheduleSection


def rates(steps, **keys):
    schedule = ScheduleSection(horizon_steps=100, warmup_steps=10, **keys)
    return [learning_rate(schedule, 2.0, step) for step in steps]


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert rates(range(10), kind="cosine") == pytest.approx([0.2 * i for i in range(1, 11)])


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ({"kind": "constant"}, [2.0, 2.0, 2.0, 2.0]),
        ({"kind": "cosine"}, [2.0, 1.1, 0.2, 0.2]),
        ({"kind": "cosine", "min_ratio": 0.0}, [2.0, 1.0, 0.0, 0.0]),
        ({"kind": "linear"}, [2.0, 1.1, 0.2, 0.2]),
        ({"kind": "wsd", "decay_steps": 90}, [2.0, 1.1, 0.2, 0.2]),
        ({"kind": "wsd"}, [2.0, 2.0, 0.2, 0.2]),
    ],
)
def test_shapes(keys, values):
    """The last update of warm-up, the one half way, the last before the horizon, and one beyond."""
    assert rates([9, 54, 99, 500], **keys) == pytest.approx(values)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(("horizon", "warmup"), [(1, 0), (2, 1), (5, 0), (5, 4), (100, 95), (1000, 100)])
def test_every_fall_ends_at_the_floor_with_the_last_update(kind, horizon, warmup):
    schedule = ScheduleSection(kind=kind, horizon_steps=horizon, warmup_steps=warmup, min_ratio=0.25)
    values = [learning_rate(schedule, 4.0, step) for step in range(horizon + 3)]
    assert values[horizon - 1 :] == pytest.approx([1.0] * 4)
    assert max(values) <= 4.0 and values[warmup:horizon] == sorted(values[warmup:horizon], reverse=True)
    if warmup:
        assert values[warmup - 1] == 4.0


@pytest.mark.parametrize("keys", [["warmup_steps=20"], ["kind=wsd", "warmup_steps=15", "decay_steps=6"]])
def test_warm_up_and_fall_do_not_overlap(recipe, keys):
    with pytest.raises(UserError, match=r"schedule.warmup_steps .*lower (the one or raise the other|one of them)"):
        load_recipe(str(recipe), [f"schedule.{key}" for key in keys])


def test_a_longer_run_agrees_up_to_the_shorter(recipe):
    short = load_recipe(str(recipe), ["train.max_steps=7"])
    long = load_recipe(str(recipe), ["train.max_steps=15"])
    peak = OptimizerSection().learning_rate
    for step in range(7):
        assert learning_rate(short.schedule, peak, step) == learning_rate(long.schedule, peak, step)
