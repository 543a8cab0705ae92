"""Names of devices: what each means, the one line for a name that means none, and what a report says."""

import pytest
import torch

from tnllm.device import describe_device, pick_device
from tnllm.errors import UserError


@pytest.fixture
def cards(monkeypatch):
    """Pretend that torch sees two CUDA devices; returns the list of those made current."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_names(cards):
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu") and cards == []
    # Triton launches on the current device, so that one must be the device that is named.
    assert pick_device("cuda:1") == torch.device("cuda:1") and cards == [1]


def test_auto_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(
        UserError, match=r"^--device is 'cuda', but torch sees 0 CUDA devices here; allowed: auto, cpu$"
    ):
        pick_device("cuda", "--device")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:²", "cpu:0", "CUDA"])
def test_other_names_are_refused(cards, name):
    with pytest.raises(UserError, match="allowed: auto, cpu, cuda, cuda:N"):
        pick_device(name)


def test_a_device_that_is_not_there(cards):
    with pytest.raises(UserError, match="allowed: auto, cpu, cuda:0, cuda:1"):
        pick_device("cuda:2")


def test_a_report_names_device_and_versions():
    description = describe_device(torch.device("cpu"))
    assert set(description) == {"torch", "python", "date", "device"}
    assert description["torch"] == torch.__version__ and "threads" in description["device"]
