"""The learning rate: warm-up, each shape, and independence of the run's length."""

import pytest

from tnllm.training.config import OptimizerSection, ScheduleSection, load_recipe
from tnllm.training.schedule import learning_rate


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
        ({"kind": "wsd", "decay_steps": 90}, [2.0, 1.1, 0.2, 0.2]),
        ({"kind": "wsd"}, [2.0, 2.0, 0.2, 0.2]),
    ],
)
def test_shapes(keys, values):
    """At the end of warm-up, half way, at the horizon and beyond."""
    assert rates([10, 55, 100, 500], **keys) == pytest.approx(values)


def test_a_longer_run_agrees_up_to_the_shorter(recipe):
    short = load_recipe(str(recipe), ["train.max_steps=7"])
    long = load_recipe(str(recipe), ["train.max_steps=15"])
    peak = OptimizerSection().learning_rate
    for step in range(7):
        assert learning_rate(short.schedule, peak, step) == learning_rate(long.schedule, peak, step)
