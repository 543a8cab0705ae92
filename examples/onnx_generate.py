"""Text from an ONNX graph, without torch: python examples/onnx_generate.py FOLDER "Once upon a time" [TOKENS]

FOLDER is what `tnllm convert MODEL FOLDER --to onnx` wrote. Needs numpy, onnxruntime and sentencepiece.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import sentencepiece

folder, prompt = Path(sys.argv[1]), sys.argv[2]
limit = int(sys.argv[3]) if len(sys.argv) > 3 else 40
graph = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
settings = json.loads((folder / "generation_config.json").read_text())

# A matrix for each head and layer, of constant size; a hybrid has caches too, whose length is a name here and grows from 0.
sizes = {item.name: [n if isinstance(n, int) else 0 for n in item.shape[1:]] for item in graph.get_inputs()[2:]}
state = {name: np.zeros((1, *size), np.float32) for name, size in sizes.items()}
position = np.zeros(1, np.int64)


def read(ids: list[int]) -> np.ndarray:
    """Logits after `ids`; the next call continues."""
    logits, *after = graph.run(None, {"tokens": np.array([ids]), "position": position, **state})
    state.update(zip(state, after, strict=True))
    position[:] += len(ids)
    return logits[0, -1]


ids = tokenizer.encode(prompt)
for start in range(0, len(ids), 128):  # a long prompt in chunks
    logits = read(ids[start : start + 128])
made: list[int] = []
while len(made) < limit and (token := int(logits.argmax())) != settings["eos_token_id"]:
    made.append(token)
    logits = read([token])
print(tokenizer.decode([*ids, *made]))
