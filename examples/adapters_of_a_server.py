"""Train two small adapters, serve both beside the model, and ask each: python examples/adapters_of_a_server.py [STEPS]

Each learns one sentence by heart, so that the difference shows. The adapters stay in adapters/.
"""

import json
import subprocess
import sys
from urllib.request import Request, urlopen

import torch

from tnllm.generation.loading import load
from tnllm.modeling.config import LoraConfig
from tnllm.modeling.lora import add_lora, save_adapter

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 30
TEXTS = {"cook": "The old man put the bread into the oven.", "sailor": "The old man took his boat out to the sea."}

for name, text in TEXTS.items():
    ready = load(device="cpu")
    add_lora(ready.model, LoraConfig(rank=4, alpha=8.0))
    ids = torch.tensor([ready.encode(text)])
    weights = [weight for weight in ready.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(STEPS):
        logits, _ = ready.model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_adapter(ready.model, f"adapters/{name}")
    print(f"{name}: loss {loss.item():.2f} after {STEPS} steps")

options = [word for name in TEXTS for word in ("--adapter", f"{name}=adapters/{name}")]
command = [sys.executable, "-m", "tnllm", "serve", "--port", "0", "--slots", "2", "--device", "cpu", *options]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
try:
    # It says where it listens.
    url = next(line.split()[4] for line in server.stderr if line.startswith("try the page at")).rstrip("/")
    for model in [one["id"] for one in json.load(urlopen(f"{url}/v1/models"))["data"]]:
        body = {"model": model, "prompt": "The old man", "max_tokens": 10, "temperature": 0}
        request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request) as answer:
            print(f"{model}: The old man{json.load(answer)['choices'][0]['text']!r}")
finally:
    server.terminate()
    server.wait()
