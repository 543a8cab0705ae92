"""The estimate against what is really there."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _CachingTorchDispatchMode

from tests.training.sections import memory_of
from tnllm.modeling.config import ModelConfig, get_preset
from tnllm.modeling.model import build_model
from tnllm.training.config import load_recipe
from tnllm.training.estimate import activation_bytes, estimate

ROWS, LENGTH = 2, 256


def kept_bytes(config: ModelConfig, checkpointing: str = "none", autocast: bool = False) -> int:
    """Bytes autograd keeps for the backward pass of one loss, the head's two gradients left out."""
    model = build_model(config, seed=0)
    model.set_activation_checkpointing(checkpointing)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Views of one storage are kept once; holding them keeps a freed address from being counted as known.
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(1, config.vocab_size, (ROWS, LENGTH))
    # What selective checkpointing keeps does not go through autograd's hooks.
    cached: list[dict] = []
    make = _CachingTorchDispatchMode.__init__

    def watch(self, policy, storage, *rest) -> None:
        cached.append(storage)
        make(self, policy, storage, *rest)

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with (
        hooks,
        mock.patch.object(_CachingTorchDispatchMode, "__init__", watch),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        loss = model.loss(tokens, tokens)
    assert loss.requires_grad
    for entry in tree_leaves(cached):
        if isinstance(getattr(entry, "val", None), Tensor):
            pack(entry.val)
    item = 2 if autocast else 4
    head = ROWS * LENGTH * config.model_dim * item + config.vocab_size * config.model_dim * 4
    # Recomputed with the rest of a block, where it is.
    casts = sum(p.numel() * 2 for p in model.layers.parameters() if p.dim() == 2) if autocast else 0
    casts = casts if checkpointing == "none" else 0
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - head - casts


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"gate": "none"},
        {"gate": "low-rank"},
        {"activation": "none"},
        {"value_activation": "silu"},
        {"glu_activation": "silu"},
        {"position": "lrpe-d"},
        {"position": "decay"},
        {"norm": "layernorm"},
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(choices: dict[str, str]) -> None:
    config = get_preset("tiny", **choices)
    # 1 % covers the few tensors of a size that does not grow with the model: tokens, positions, decays.
    assert activation_bytes(config, ROWS * LENGTH, 4) == pytest.approx(kept_bytes(config), rel=0.01)


def test_activations_in_low_precision() -> None:
    config = get_preset("tiny")
    assert activation_bytes(config, ROWS * LENGTH, 2) == pytest.approx(kept_bytes(config, autocast=True), rel=0.01)


def test_activations_of_the_baseline() -> None:
    # On CPU, torch's attention also keeps its own logsumexp and the rotary tables: 5 % of a narrow model.
    # Its RMSNorm is one kernel on a GPU and several on CPU, so the norm without weights stands in for it.
    config = get_preset("tiny", kind="transformer", norm="srmsnorm")
    assert activation_bytes(config, ROWS * LENGTH, 4) == pytest.approx(kept_bytes(config), rel=0.08)


def test_activations_of_a_hybrid() -> None:
    """Two layers of four: the mean of none and all."""
    configs = [get_preset("tiny", position="decay", softmax_every=every) for every in (0, 2, 1)]
    none, half, full = (activation_bytes(config, ROWS * LENGTH, 4) for config in configs)
    assert 2 * half == none + full and full < none


def test_recomputation_keeps_one_residual_for_each_block() -> None:
    config = get_preset("tiny")
    # Not kept during the forward pass but counted: the one block that is recomputed in full in the backward pass.
    alone = activation_bytes(get_preset("tiny", num_layers=1), ROWS * LENGTH, 4)
    final = ROWS * LENGTH * (config.model_dim * 4 + 4)
    expected = activation_bytes(config, ROWS * LENGTH, 4, "full") - (alone - final)
    assert expected == pytest.approx(kept_bytes(config, "full"), rel=0.01)


@pytest.mark.parametrize(
    "choices",
    [{}, {"gate": "none"}, {"gate": "low-rank", "value_activation": "silu"}, {"position": "lrpe-d"}],
    ids=str,
)
@pytest.mark.parametrize("autocast", [False, True])
def test_selective_recomputation_keeps_products(choices: dict[str, str], autocast: bool) -> None:
    config = get_preset("tiny", **choices)
    tokens, item = ROWS * LENGTH, 2 if autocast else 4
    # As above: the block that is recomputed in full in the backward pass is counted and not yet saved.
    one = get_preset("tiny", num_layers=1, **choices)
    full = activation_bytes(get_preset("tiny", num_layers=1, **(choices | {"position": "lrpe-d"})), tokens, item)
    kept = activation_bytes(config, tokens, item, "selective")
    alone = activation_bytes(one, tokens, item, "selective")
    per_block = (kept - alone) / (config.num_layers - 1)
    final = tokens * (config.model_dim * item + 4)
    saved = kept_bytes(config, "selective", autocast)
    # 2 %: bf16 halves what grows with the model, not the few tensors that do not.
    assert saved == pytest.approx(config.num_layers * per_block + final, rel=0.02)
    assert saved < 0.6 * kept_bytes(config, "none", autocast)
    assert alone == pytest.approx(full, rel=0.01)  # one block gains nothing: it is recomputed in full


def test_weights_gradients_and_optimizer_are_what_adamw_allocates() -> None:
    config = load_recipe("tiny")
    model = build_model(config.model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    model.loss(torch.ones(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64)).backward()
    optimizer.step()
    memory = memory_of(config)
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert memory.optimizer == sum(moment.nbytes for moment in moments)


def test_sharding_divides_and_tensor_ranks_share_the_work() -> None:
    sets = ["train.global_batch_tokens=2M", "data.seq_len=2000", "train.micro_batch_size=1"]
    one = memory_of(load_recipe("7b", [*sets, "parallel.replicate=1", "parallel.shard=1"]))
    many = memory_of(load_recipe("7b", [*sets, "parallel.replicate=1", "parallel.shard=8", "parallel.tensor=2"]))
    assert many.weights == pytest.approx(one.weights / 16, rel=1e-6)
    assert many.optimizer == pytest.approx(one.optimizer / 16, rel=1e-6)
    assert many.activations < one.activations
    assert one.casts == one.weights // 2


def test_time_is_work_over_rate() -> None:
    config = load_recipe("7b")
    result = estimate(config, "h100", mfu=0.4, num_gpus=64)
    assert result["days"] * 86400 == pytest.approx(result["flops"] / (0.4 * 989e12 * 64))
    assert estimate(config, "h100", mfu=0.4, num_gpus=128)["days"] == pytest.approx(result["days"] / 2)
    assert estimate(config)["days"] is None
