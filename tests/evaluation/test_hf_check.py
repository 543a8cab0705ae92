"""The same questions through the harness's `hf` model: equal where the weights are, told where they are not."""

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file

from tnllm import assets
from tnllm.convert.run import Options, convert
from tnllm.evaluation.harness import TransNormerLM
from tnllm.evaluation.hf_check import _choice, check_against_hf
from tnllm.evaluation.tasks import choose, load_tasks


def export(source, target):
    convert(source, target, Options("hf", verify=False), lambda line: None, lambda stage, done, total: None)


def sets(*names, shots=None):
    return {name: load_tasks(choose([name], shots, print), None, False, print) for name in names}


@pytest.mark.slow
def test_both_ways_give_the_same_answers(folder):
    seen = []
    asked = sets("mmlu", "winogrande", "openbookqa", shots=2)
    results = check_against_hf(asked, export, folder, "cpu", limit=2, progress=lambda *args: seen.append(args))
    mmlu, winogrande, openbookqa = results["tasks"]
    assert [row["questions"] for row in results["tasks"]] == [10, 2, 2]
    assert set(mmlu["metrics"]) == {"acc"} and set(openbookqa["metrics"]) == {"acc", "acc_norm"}
    for row in results["tasks"]:
        assert row["changed"] == [] and 0 < row["largest_difference"] < results["tolerance"] == 1e-3
        assert all(ways["tnllm"] == ways["hf"] for ways in row["metrics"].values())
    # A header and its questions are read once here; the other way computes each question's one input, padded.
    assert 2 * mmlu["tokens"]["tnllm"] < mmlu["tokens"]["hf"]
    assert ("hf, winogrande", 4, 4) in seen and winogrande["requests"] == 4


@pytest.mark.slow
def test_other_weights_are_told_with_margins(folder):
    def other(source, target):
        export(source, target)
        tensors = load_file(target / "model.safetensors")
        name = next(name for name in tensors if "lm_head" in name or "embed" in name)
        tensors[name] = tensors[name] + 0.5 * torch.randn_like(tensors[name])
        save_file(tensors, target / "model.safetensors", {"format": "pt"})

    row = check_against_hf(sets("openbookqa"), other, folder, "cpu")["tasks"][0]
    assert row["largest_difference"] > 1e-3 and row["changed"]
    for each in row["changed"]:
        assert each["tnllm"] != each["hf"] and each["margin"] > 0
        if each["metric"] == "acc":
            # Two choices change places only if both moved by at least half of what was between them.
            assert each["margin"] <= 2 * each["difference"]


def test_what_the_harness_would_take():
    logprobs = np.array([-4.0, -5.0, -9.0])
    assert _choice(logprobs, [2, 10, 10], normed=False) == (0, 1.0)
    assert _choice(logprobs, [2, 10, 10], normed=True) == (1, pytest.approx(0.4))


@pytest.mark.slow
def test_generated_texts_are_those_of_the_hf_model(tmp_path):
    """`generate_until` through the exported folder: greedy, with its repetition penalty, stop strings and padding."""
    from lm_eval.models.huggingface import HFLM

    export(assets.demo_weights(), tmp_path / "hf")
    lm = TransNormerLM(device="cpu")
    hf = HFLM(str(tmp_path / "hf"), dtype="float32", device="cpu", batch_size=3, trust_remote_code=True)
    settings = {"until": [".", "\n\n"], "max_gen_toks": 24}
    texts = [
        "Once upon a time",
        "The",
        "He said: ",
        "The king of France was a man who had",
        "\n\nA",
        "It is known that",
    ]
    asked = [
        Instance("generate_until", {}, (text, {**settings, **more}), index)
        for index, (text, more) in enumerate(
            (text, more) for text in texts for more in ({}, {"repetition_penalty": 1.0})
        )
    ]
    assert lm.generate_until(asked) == hf.generate_until(asked, disable_tqdm=True)
