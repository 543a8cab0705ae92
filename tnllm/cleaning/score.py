"""Log-likelihood of documents under a model: nats, bits per byte and perplexity of each, its state of constant size.

    ready = load("runs/tiny")
    for score in score_texts(ready.model, ready.tokenizer, texts):
        score.bits_per_byte, score.perplexity

Each token of a document from the second to the end token is predicted from all tokens before it; documents do not see
each other.
"""

import glob
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np

from tnllm.files import end_of_links, is_special, only_writer
from tnllm.generation.documents import last_batch, score_documents, token_parts
from tnllm.generation.scoring import BATCH_TOKENS, Scorer
from tnllm.modeling.model import LanguageModel
from tnllm.tokenizer import Tokenizer, bits_per_byte


@dataclass(frozen=True)
class Score:
    """Total `nats` of `tokens` predicted tokens, which stand for `num_bytes` bytes of text."""

    tokens: int
    nats: float
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The value that selection compares: it does not depend on the tokenizer."""
        return bits_per_byte(self.nats, self.num_bytes)

    @property
    def perplexity(self) -> float:
        """exp of the mean nats a token; infinity if that overflows."""
        mean = self.nats / max(self.tokens, 1)
        return math.exp(mean) if mean < 700 else math.inf


def score_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    batch_tokens: int | None = None,
    report: Callable[[int, int], None] = lambda tokens, num_bytes: None,
) -> Iterator[Score]:
    """The score of every text, in order; `batch_tokens` are computed together (None: by device).

    `report` gets the tokens scored so far and their bytes, also within a long text. Raises UserError for text with lone
    surrogates, RunError if the model gives non-finite logits.
    """
    scorer = Scorer(model, share=False, batch_tokens=batch_tokens)
    sizes = np.array([len(data) for data in tokenizer.token_bytes])
    parts = score_documents(scorer, (token_parts(tokenizer, text, eos=True) for text in texts))
    done = done_bytes = 0
    for _, document in groupby(parts, key=lambda part: part.document):
        tokens = num_bytes = 0
        nats = 0.0
        for part in document:
            tokens, nats = tokens + len(part.ids), nats - float(part.logprobs.sum())
            num_bytes += int(sizes[part.ids].sum())
            report(done + tokens, done_bytes + num_bytes)
        done, done_bytes = done + tokens, done_bytes + num_bytes
        yield Score(tokens, nats, num_bytes)


@contextmanager
def kept_scores(
    path: Path, model: LanguageModel, about: str = ""
) -> Iterator[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """Write scores as JSON Lines: gives the rows that a stopped call with the same `about` wrote, and takes the others.

    The file `path` appears when the block ends without an error. Until then the rows are in a hidden folder beside it.
    Raises UserError if another process writes them.
    """

    def put(file: IO[bytes], row: dict[str, Any]) -> None:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()

    if is_special(path):
        with open(path, "wb") as file:
            yield [], partial(put, file)
        return
    target = end_of_links(path)
    stem = f".{target.name}.partial-"
    folder = target.with_name(stem + hashlib.sha256(about.encode()).hexdigest()[:12])
    with only_writer(folder):
        rows = folder / "rows.jsonl"
        # What a kill left of a line is written again.
        lines = rows.read_bytes().splitlines(keepends=True) if rows.exists() else []
        old = [json.loads(line) for line in lines if line.endswith(b"\n")]
        # What is computed together must not depend on where the call was stopped, or the last digits would.
        del old[last_batch([row["tokens"] + 1 for row in old], BATCH_TOKENS[model.device.type]) :]
        with open(rows, "wb") as file:
            file.writelines(lines[: len(old)])
            file.flush()
            yield old, partial(put, file)
            os.fsync(file.fileno())
        os.replace(rows, target)
    for left in target.parent.glob(f"{glob.escape(stem)}*"):
        shutil.rmtree(left, ignore_errors=True)
