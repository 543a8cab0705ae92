"""Every mesh computes what one process computes: losses, gradients, weights, checkpoints. Four gloo processes in all."""

import pytest

from tests.parallel.ranks import CASES, STEPS, model_config, run_all
from tnllm.modeling.flops import count_parameters

pytestmark = pytest.mark.slow

# fp32 sums over tokens, heads or ranks in another order: 6e-8 each, amplified by ten updates at a high learning rate.
LOSS = 2e-5
# The gradient of one batch: sums of some hundred terms; LRPE's theta has terms as large as the position that cancel.
GRADIENT = 1e-4


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    return run_all(tmp_path_factory.mktemp("ranks"))


def of_case(results: list[dict], name: str) -> list[dict]:
    return [rank[name] for rank in results if name in rank]


@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_gradients_are_those_of_one_process(results, name):
    ranks = of_case(results, name)
    assert len(ranks) == CASES[name][0]
    for result in ranks:
        assert len(result["rows"]) == STEPS
        for loss, norm, our_loss, our_norm in result["rows"]:
            assert our_loss == pytest.approx(loss, rel=LOSS)
            assert our_norm == pytest.approx(norm, rel=5 * GRADIENT)
        assert result["rows"][-1][0] < result["rows"][0][0]
        assert result["gradient"] < GRADIENT
        assert result["started"] == 0.0


@pytest.mark.parametrize(
    "name", [name for name in CASES if "replicate" not in name and not name.endswith(("softmax", "adapter"))]
)
def test_ranks_share_the_weights(results, name):
    config = model_config(CASES[name][2])
    kept = [result["kept"] for result in of_case(results, name)]
    _, shard, sequence, tensor = CASES[name][1]
    # theta, the norms' weights and the low-rank gate's first matrix are replicated on some axis.
    assert count_parameters(config) / (shard * sequence * tensor) <= max(kept) < 0.8 * count_parameters(config)


def test_a_run_resumes_on_another_mesh(results):
    for result in of_case(results, "hand over"):
        # Three meshes, then four ranks from what one process wrote.
        assert result["losses"][:9] == pytest.approx(result["expected"][:9], rel=LOSS)
        assert result["state"] == 40
    first = results[0]["hand over"]
    assert first["losses"][9] == pytest.approx(first["expected"][9], rel=LOSS)


def test_a_checkpoint_holds_the_weights_of_all_ranks(results):
    for result in of_case(results, "hand over"):
        assert result["same"] == 0.0
        assert [file for file in result["files"] if "step-00000006/model" in file] == [
            f"checkpoints/step-00000006/model/rank-0000{rank}.safetensors" for rank in range(4)
        ]
        # Two copies of the model: the ranks of the first write.
        assert [file for file in result["files"] if "step-00000009/model" in file] == [
            f"checkpoints/step-00000009/model/rank-0000{rank}.safetensors" for rank in range(2)
        ]
