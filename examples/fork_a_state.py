"""Read a text once, save what the model remembers, ask many questions: python examples/fork_a_state.py [FILE]

The state has the same size after ten tokens and after a million, so a saved book is some hundred kilobytes.
"""

import sys
from pathlib import Path

from tnllm.generation.context import load_context, read, save_context, weights_hash
from tnllm.generation.decoder import Result, generate
from tnllm.generation.loading import load

loaded = load()  # the model that ships
text = (
    Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else "The old house stood by the river. " * 200
)

[book] = read(loaded.model, [loaded.encode(text)])
digest = weights_hash(loaded.model)
save_context("book.state", book, digest)
print(f"{len(text)} characters became {Path('book.state').stat().st_size / 1024:.0f} KiB")

# Later, or on another machine with the same weights: the text is not read again.
book = load_context("book.state", loaded.model, digest)
questions = ["In the morning", "At night", "The river"]
params = loaded.params(max_tokens=20, seed=1)
# Each question continues a copy of the same state.
for event in generate(loaded.model, loaded.tokenizer, questions, params, contexts=[book] * len(questions)):
    if isinstance(event, Result):
        print(f"{questions[event.index]}{event.text!r}")
