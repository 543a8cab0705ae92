"""A 7B-size release with random weights, converted in a process of its own: time and peak memory. Not a test CI runs.

    python -m tests.convert.large /tmp/large --layers 30        # about 28 GB of disk, deleted afterwards

Fewer layers make it smaller; memory depends on the width of a layer, not on their number.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.convert import official_files

WIDTHS = {"vocab_size": 64_000, "decoder_embed_dim": 4096, "hidden_dim": 4096, "glu_dim": 11008}
SHARD_BYTES = 2_970_000_000  # as the 7B v2 was released


def write_release(folder: Path, layers: int) -> None:
    """Shards of bf16 `.bin` files, one in memory at a time."""
    folder.mkdir(parents=True)
    lrpe = [1] + [0] * (layers - 1)
    values = official_files.config(
        "v2", **WIDTHS, decoder_layers=layers, decoder_attention_heads=32, linear_use_lrpe_list=lrpe
    )
    (folder / "config.json").write_text(json.dumps(values))
    # A large pool of random numbers, shifted for each tensor: drawing all of them would take longer than converting.
    pool = (0.02 * torch.randn(2**26)).bfloat16()
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []

    def flush() -> None:
        torch.save(shard, folder / f"pytorch_model-{len(shards) + 1:05d}.bin")
        shards.append(list(shard))
        shard.clear()

    embedding = None
    for number, (key, shape) in enumerate(official_files.keys("v2", values).items()):
        size = torch.Size(shape).numel()
        parts = [pool.roll(number * 1_000_003 + part * 77_777) for part in range(-(-size // len(pool)))]
        value = embedding if key == "lm_head.weight" and embedding is not None else torch.cat(parts)[:size].view(shape)
        embedding = value if key == "model.embed_tokens.weight" else embedding
        if shard and sum(each.nbytes for each in shard.values()) + value.nbytes > SHARD_BYTES:
            flush()
        shard[key] = value.clone()
    flush()
    weight_map = {key: f"pytorch_model-{number:05d}.bin" for number, keys in enumerate(shards, start=1) for key in keys}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main() -> None:
    """Write, convert, report, delete."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--to", default="hf")
    arguments = parser.parse_args()
    try:
        # In a process of its own: ours would count the memory of writing.
        release, result = arguments.folder / "release", arguments.folder / "result"
        write = f"from tests.convert.large import *; write_release(Path({str(release)!r}), {arguments.layers})"
        subprocess.run([sys.executable, "-c", write], check=True)
        start = time.monotonic()
        command = [sys.executable, "-m", "tnllm", "convert", str(release), str(result), "--to", arguments.to]
        child = os.posix_spawn(sys.executable, command, os.environ)
        _, status, usage = os.wait4(child, 0)
        assert status == 0, status
        print(f"{time.monotonic() - start:.0f} s, peak memory {usage.ru_maxrss / 2**20:.2f} GiB")
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
