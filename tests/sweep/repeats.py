"""Where the loss of a sweep's cells comes from: tokens that could be copied from the context, and the rest.

    python -m tests.sweep.repeats runs/evidence

A token is a repeat if the same pair of it and the token before it stands earlier in its document (arXiv 2312.04927 calls
these AR hits); repeats are grouped by the distance to the latest such pair. For each cell whose weights were kept
(`tnllm sweep --keep`), the mean loss of each group over the full validation set goes to DIR/repeats.csv. The mean over all
groups is the cell's validation loss, but for the rounding of the weights to bfloat16. Run it in a checkout.
"""

import argparse
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnllm.data.loader import IGNORE, Batch
from tnllm.device import pick_device
from tnllm.errors import UserError
from tnllm.files import write_csv
from tnllm.modeling.weights import load_model
from tnllm.sweep.table import REPEATS
from tnllm.training.config import load_recipe
from tnllm.training.loaders import open_loaders, open_tokenizer

# Tokens back to the latest earlier pair, each group up to the next bound.
BOUNDS = (1, 16, 64, 256, 1024)


def distances(tokens: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """How many tokens back the pair (token, label) was last seen in the same sequence; 0: never, or no label.

    tokens, labels [N] int64, sequences bounded by cu_seqlens [K] → [N] int64.
    """
    counted = np.flatnonzero(labels.numpy() != IGNORE)
    sequence = np.searchsorted(cu_seqlens.numpy(), counted, side="right")
    keys = np.stack([sequence, tokens.numpy()[counted], labels.numpy()[counted]])
    # Equal pairs side by side, in the order of the text.
    order = np.lexsort((counted, *keys))
    same = (keys[:, order[1:]] == keys[:, order[:-1]]).all(axis=0)
    result = torch.zeros(len(tokens), dtype=torch.int64)
    later = counted[order[1:]][same]
    result[torch.from_numpy(later)] = torch.from_numpy(later - counted[order[:-1]][same])
    return result


def group_names() -> list[str]:
    """`new`, then the ranges of distances."""
    upper = [f"{low}-{high - 1}" for low, high in pairwise(BOUNDS)]
    return ["new", *upper, f"{BOUNDS[-1]}+"]


def measure(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of repeats.csv for the run folder of one cell."""
    config = load_recipe(str(folder / "config.resolved.yaml"))
    if config.data.packing != "reset":
        raise UserError(f"{folder}: documents are not kept apart; repeats need data.packing=reset")
    device = pick_device(config.train.device, "train.device")
    tokenizer = open_tokenizer(config.tokenizer.path, config.data, config.init_folder, config.model.vocab_size)
    loader = open_loaders(config.data, tokenizer, config.global_batch_rows, config.train.seed)[1]
    if loader is None:
        raise UserError(f"{folder}: the run has no validation set; set data.val_fraction")
    model = load_model(folder / "weights", device, torch.float32)
    names = group_names()
    sums, counts = [0.0] * len(names), [0] * len(names)
    rows = config.train.micro_batch_size
    for first in range(0, loader.num_rows, rows):
        batch: Batch = loader.batch(first, rows).trimmed()
        assert batch.cu_seqlens is not None
        back = distances(batch.tokens[0], batch.labels[0], batch.cu_seqlens)
        group = torch.bucketize(back, torch.tensor(BOUNDS), right=True)[None]
        moved = batch.to(device)
        for index in range(len(names)):
            labels = batch.labels.masked_fill(group != index, IGNORE)
            low = device.type == "cuda"
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=low):
                sums[index] += float(
                    model.loss(moved.tokens, labels.to(device), moved.cu_seqlens, longest=batch.longest)
                )
            counts[index] += int((labels != IGNORE).sum())
    for name, loss, count in zip(names, sums, counts, strict=True):
        yield {"repeat": name, "tokens": count, "val_loss": loss / count if count else None}


def main() -> None:
    """Command line: the folder of a sweep. Cells already in its repeats.csv are measured again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    found = sorted(file.parent for file in (folder / "cells").glob("*/*/weights"))
    if not found:
        parser.exit(2, f"no weights of a cell in {folder}; run the sweep with --keep\n")
    rows: list[dict[str, Any]] = []
    for cell in found:
        name = str(cell.relative_to(folder / "cells"))
        rows += [{"cell": name, **row} for row in measure(cell)]
        print(name, *(f"{row['repeat']} {row['val_loss']:.4f}" for row in rows if row["cell"] == name), flush=True)
        write_csv(folder / REPEATS, rows)


if __name__ == "__main__":
    main()
