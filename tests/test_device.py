"""The ground floor's device names and descriptions."""

import torch

from tnllm.device import describe_device


def test_a_report_names_device_and_versions():
    description = describe_device(torch.device("cpu"))
    assert set(description) == {"torch", "python", "date", "device"}
    assert description["torch"] == torch.__version__ and "threads" in description["device"]
