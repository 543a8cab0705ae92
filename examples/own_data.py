"""Your own texts as training data, by the commands' functions: python examples/own_data.py FOLDER-OR-FILES..."""

import subprocess
import sys
from pathlib import Path

texts = sys.argv[1:]
if not texts:
    sys.exit("usage: python examples/own_data.py FOLDER-OR-FILES...")


def tnllm(*words: str) -> None:
    """A command of tnllm, as it would be typed; stops at the first that fails."""
    print("$ tnllm", *words, flush=True)
    subprocess.run([sys.executable, "-m", "tnllm", *words], check=True)


work = Path("own-data")
work.mkdir(exist_ok=True)
tnllm("tokenizer", "train", *texts, "--vocab-size", "2000", "-o", str(work / "tokenizer"))
tnllm("data", "tokenize", *texts, "--tokenizer", str(work / "tokenizer"), "-o", str(work / "tokens"))
tnllm("data", "inspect", str(work / "tokens"), "--verify", "--samples", "0")
# The recipe's batch and length would not fit a small corpus; a run says in its plan how often it passes over the data.
short = ["data.seq_len=128", "train.max_steps=20", "train.global_batch_tokens=512", "train.micro_batch_size=4"]
settings = [f"data.path={work / 'tokens'}", *short]
tnllm("train", "tiny", *(word for item in settings for word in ("--set", item)), "--out", str(work / "run"))
