"""Compares the loss of TRL's SFTTrainer, padding-free, with that of `tnllm train` on the same conversations.

    python -m tests.convert.sft_loss          # needs trl: pip install trl

Both see the demo model. Prints both losses; exit code 1 if they differ by more than rounding, 3 without TRL.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from tnllm import assets
from tnllm.chat_template import DEFAULT
from tnllm.convert.run import Options, convert
from tnllm.data import instruct
from tnllm.modeling.packing import pack
from tnllm.modeling.weights import load_model
from tnllm.tokenizer import Tokenizer

TALKS = (
    ("Who came?", "The king."),
    ("Where did he go?", "To the river, and then home."),
    ("Why did he go there?\nSay it shortly.", "He wanted to see the sea."),
)
# Two fp32 implementations of one sum.
LIMIT = 1e-5


def own_loss(folder: Path) -> float:
    """Mean cross entropy of the answers, packed in one row as the trainer's loader packs them."""
    tokenizer = Tokenizer.load(assets.tokenizer_model())
    pairs = [instruct.encode(instruct.Conversation("", (talk,)), tokenizer, DEFAULT) for talk in TALKS]
    labels = [np.append(np.where(learned, ids, -100)[1:], -100) for ids, learned in pairs]
    tokens, cu_seqlens = pack([ids for ids, _ in pairs])
    packed = torch.from_numpy(np.concatenate(labels))[None]
    loss = load_model(folder, dtype=torch.float32).loss(tokens, packed, cu_seqlens)
    return loss.item() / int((packed != -100).sum())


def trl_loss(folder: Path, out: Path) -> float:
    """The loss that SFTTrainer logs for its first step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": [{"role": "user", "content": ask}], "completion": [{"role": "assistant", "content": answer}]}
        for ask, answer in TALKS
    ]
    settings = SFTConfig(
        output_dir=str(out), padding_free=True, per_device_train_batch_size=len(rows), max_steps=1, learning_rate=1e-9,
        max_length=None, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    )
    trainer.train()
    return next(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def main() -> int:
    try:
        import trl
    except ImportError:
        print("this needs TRL: pip install trl")
        return 3
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "hf"
        convert(assets.demo_weights(), folder, Options(to="hf", verify=False), lambda _: None, lambda *_: None)
        theirs, ours = trl_loss(folder, Path(root) / "out"), own_loss(folder)
    print(f"TRL {trl.__version__}, padding-free: {theirs:.7f}; tnllm: {ours:.7f}; difference {abs(theirs - ours):.1e}")
    return int(abs(theirs - ours) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
