"""Shared by all tests. Without a GPU, Triton kernels run on CPU tensors under Triton's interpreter."""

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# A machine with other work takes any time for an example.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
# Triton reads this when a kernel is declared, so it is set before any test module imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# A shell that starts the suite in the background has it ignore Ctrl-C, and every child inherits that: tests that send
# Ctrl-C would then wait for ever. With Python's own handler here, children start with the system's default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Random inputs are the same in every run: a tolerance met once is met always."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised tensors with NaN, so that an element no kernel wrote cannot pass a comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
