"""Train a model from Python, and ask it something: python examples/train_from_python.py [STEPS]"""

import sys
from pathlib import Path

from tnllm.generation.decoder import generate_text
from tnllm.generation.loading import load
from tnllm.training.config import load_recipe
from tnllm.training.loop import train

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
run = Path("runs/from-python")

# A packaged recipe, with keys changed as `--set` would.
config = load_recipe("tiny", [f"train.max_steps={steps}", "eval.every_steps=100"])
# "auto" continues a run that is there, and begins one that is not.
train(config, run, resume="auto")

loaded = load(str(run))
print(generate_text(loaded.model, loaded.tokenizer, "My dear", max_tokens=40, seed=1))
