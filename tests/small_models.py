"""Models small enough for tests, whose logits differ clearly from token to token."""

import torch

from tnllm.chat_template import DEFAULT
from tnllm.generation.loading import LoadedModel
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model

# Each kind of state: constant, growing, and both.
KINDS = [{}, {"kind": "transformer"}, {"softmax_every": 2, "qk_norm": True}]


def small_model(dtype=torch.float32, vocab_size=352, **more):
    """Linear weights are larger than at the start of training, so that every part of the model moves the logits.

    A tied head would make every token predict itself.
    """
    settings = {"vocab_size": vocab_size, "model_dim": 64, "num_heads": 4, "num_layers": 3, "glu_dim": 96}
    settings |= {"tie_embeddings": False, **more}
    model = build_model(get_preset("tiny", **settings), dtype=dtype, seed=1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(5)
        # Logits of about N(0, 3^2): a few tokens carry most of the probability, as in a trained model.
        model.lm_head.weight.mul_(4)
    return model.eval().requires_grad_(False)


def make_ready(model, tokenizer):
    """What `load` gives for a folder with this model and tokenizer and no settings of its own."""
    folder, ends = tokenizer.path.parent, (tokenizer.eos_id,)
    return LoadedModel(folder, model, tokenizer, {}, ends, tokenizer.bos_id, False, DEFAULT)
