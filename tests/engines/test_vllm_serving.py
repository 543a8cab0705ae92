"""A model in vLLM itself, where it is installed: the quick part of `python -m tests.engines.vllm_equality`."""

import sys
from pathlib import Path

import pytest

from tests.engines.vllm_equality import equal, export_demo, reference, run

pytest.importorskip("vllm", reason="vLLM is not installed; python -m tests.engines.vllm_equality installs and tries it")


@pytest.mark.slow
def test_texts_in_used_slots(tmp_path):
    """One slot: a one-token prompt must not see the state of the text before it."""
    prompts, model = ["The river and the hills beyond it", "The", "Once upon a time", "The"], tmp_path / "demo"
    export_demo(model)
    expected = reference(model, prompts, tmp_path)
    job = {"name": "one slot", "model": str(model), "prompts": prompts, "options": {"max_num_seqs": 1}}
    [result] = run(Path(sys.executable), tmp_path, [job])
    assert equal(result, expected) == len(prompts)
