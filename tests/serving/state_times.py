"""The first token after a text that was read once, beside reading it again, and beside a Transformer of the same size.

python -m tests.serving.state_times --tokens 4096

Random weights of the demo model's size; each through the engine, on this machine, in turns.
"""

import argparse
import statistics
import time
from dataclasses import replace

from tnllm.generation.loading import load
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model
from tnllm.serving.engine import Engine, PromptRead


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    loaded = load()
    config = loaded.model.config
    same = {name: getattr(config, name) for name in ("vocab_size", "model_dim", "num_heads", "num_layers", "glu_dim")}
    draw = [(7919 * index) % (config.vocab_size - 300) + 290 for index in range(args.tokens)]
    book, question = draw, draw[:8]
    for kind in ("transnormer", "transformer"):
        ready = replace(loaded, model=build_model(get_preset("tiny", kind=kind, **same), seed=1).eval())
        ready.model.requires_grad_(False)
        with Engine(ready, num_slots=4, cache_bytes=0) as engine:

            def seconds(ids, engine=engine, ready=ready, **more):
                start = time.perf_counter()
                events = list(engine.submit(ids, ready.params(max_tokens=1), **more))
                return time.perf_counter() - start, next(e for e in events if isinstance(e, PromptRead))

            _, read = seconds(book, keep_context=True)
            again = [seconds(book + question)[0] for _ in range(args.repeats)]
            state = [seconds(question, start=read.context)[0] for _ in range(args.repeats)]
        print(
            f"{kind}: {statistics.median(again):.2f} s with the text, {statistics.median(state):.3f} s from its state "
            f"({read.context.nbytes / 2**20:.1f} MiB)",
            flush=True,
        )


if __name__ == "__main__":
    main()
