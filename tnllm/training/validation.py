"""Validation: loss and bits per byte over the same held-out rows every time."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tnllm.data.instruct_loader import InstructLoader
from tnllm.data.loader import IGNORE, Batch, Loader
from tnllm.modeling.model import LanguageModel
from tnllm.parallel.ranks import SingleProcess
from tnllm.tokenizer import bits_per_byte


def validate(
    loss_sum: Callable[[Batch], Tensor],
    loader: Loader | InstructLoader,
    rows_per_batch: int,
    max_tokens: int | None,
    ranks: SingleProcess | None = None,
) -> tuple[float, float]:
    """Mean loss in nats per counted token, and bits per byte of the text of those tokens.

    `loader` reads in order, not shuffled. The rows that fit into `max_tokens` are read, at least one (None: all), whatever
    `rows_per_batch` and the number of ranks. Every batch has the same shape, so a compiled loss is compiled once: rows
    past the end hold only ignored labels. Several `ranks` split the batches; all return the same result.
    """
    ranks = ranks or SingleProcess()
    rows = loader.num_rows
    if max_tokens is not None:
        rows = min(rows, max(1, max_tokens // loader.seq_len))
    loss, labels, num_bytes = 0.0, 0, 0
    with torch.no_grad():
        for first in range(0, rows, rows_per_batch * ranks.data_size):
            batch = _batch(loader, first + ranks.data_rank * rows_per_batch, rows_per_batch, rows)
            loss += float(loss_sum(batch))
            labels += batch.num_labels
            num_bytes += batch.num_bytes
    loss, labels, num_bytes = ranks.sum_counts(loss, labels, num_bytes)
    return loss / max(labels, 1), bits_per_byte(loss, num_bytes)


@torch.no_grad()
def accuracy(
    model: LanguageModel, loader: Loader, rows_per_batch: int, max_tokens: int | None
) -> dict[str, float | dict[int, float]]:
    """`val_accuracy`: the share of the counted labels that are the model's most likely token; rows as in `validate`.

    `val_accuracy_by_pairs` is there for a synthetic task whose rows are of several numbers of pairs in turn.
    """
    rows = loader.num_rows if max_tokens is None else min(loader.num_rows, max(1, max_tokens // loader.seq_len))
    unit, pairs = loader.row_pairs
    right, labels = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    for first in range(0, rows, rows_per_batch):
        batch = loader.batch(first, min(rows_per_batch, rows - first))
        offsets = (batch.labels.flatten() != IGNORE).nonzero()[:, 0]
        kind = (first * loader.seq_len + offsets) // unit % len(pairs)
        moved = batch.to(model.device)
        right.index_add_(0, kind, model.correct(moved.tokens, moved.labels, moved.cu_seqlens).float().cpu())
        labels += kind.bincount(minlength=len(pairs))
    shares = dict(zip(pairs, (right / labels.clamp(min=1)).tolist(), strict=True))
    return {
        "val_accuracy": float(right.sum() / labels.sum().clamp(min=1)),
        **({"val_accuracy_by_pairs": shares} if len(pairs) > 1 else {}),
    }


def _batch(loader: Loader | InstructLoader, first: int, count: int, end: int) -> Batch:
    """`count` rows from `first` on, of which those from `end` on have only ignored labels."""
    batch, counted = loader.batch(first, count), max(0, min(count, end - first))
    if counted == count:
        return batch
    labels = batch.labels.clone()
    labels.view(count, -1)[counted:] = IGNORE
    partial = loader.batch(first, counted) if counted else None
    num_labels, num_bytes = (0, 0) if partial is None else (partial.num_labels, partial.num_bytes)
    return replace(batch, labels=labels, num_labels=num_labels, num_bytes=num_bytes)
