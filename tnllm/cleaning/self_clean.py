"""Self-cleaning: train a small model, score every document with it, drop the least likely of each source, repeat.

    report = self_clean(settings, source=out / "work/unique", out=out, device="auto", say=print)

(arXiv 2307.14995, appendix D: most of a corpus is good, so a model of all of it finds the bad parts unlikely.) Each
round leaves, under OUT/work/self-clean/round-N:

    train.jsonl.gz  tokens/  run/    what was learned from, and the training run (it resumes)
    scores/NNNNN.jsonl.gz            id, group, tokens, bytes, nats of every document that was still in
    kept/NNNNN.jsonl.gz              what stays (the last round writes OUT/clean)

A round whose files are there is not done again. What is held out is never learned from; after the last round a model
learns from what is left, and its loss there is the measure. Every model takes the same number of steps.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tnllm import assets
from tnllm.cleaning.score import Score, score_texts
from tnllm.cleaning.settings import SelfCleanSection
from tnllm.cleaning.shards import REJECTED, Lines, read_lines
from tnllm.data.corpus import find_files, read_documents
from tnllm.data.encode import Options
from tnllm.data.tokenize import tokenize_corpus
from tnllm.errors import UserError
from tnllm.files import write_text_atomic
from tnllm.generation.loading import Ready, load
from tnllm.tokenizer import Tokenizer
from tnllm.training.config import load_recipe
from tnllm.training.loop import train

Say = Callable[[str], None]
_BINS = 40
_MAX_BITS = 8.0


def self_clean(
    settings: SelfCleanSection,
    source: Path,
    out: Path,
    device: str,
    keep_rejected: bool,
    tally_field: str | None,
    say: Say,
) -> dict[str, Any]:
    """Clean the shards of `source` into OUT/clean; returns rounds with their limits, counts and losses.

    Raises UserError for an empty corpus and what training and scoring raise.
    """
    work = out / "work" / "self-clean"
    shards = sorted(source.glob("*.jsonl.gz"))
    held_out = _hold_out(settings, shards, work)
    kept = source
    rounds = []
    for number in range(1, settings.rounds + 1):
        folder = work / f"round-{number}"
        seed = settings.seed_path if number == 1 else ()
        say(f"self-cleaning round {number} of {settings.rounds}: training on {'the seed' if seed else 'what is kept'}")
        run = _train(settings, _learned_from(folder, kept, seed, held_out), folder, device)
        ready = load(run, device)
        say(f"self-cleaning round {number}: scoring")
        _score_shards(ready, kept, folder / "scores", say)
        limits = _limits(settings, folder / "scores")
        target = out / "clean" if number == settings.rounds else folder / "kept"
        rejected = out / "rejected" if keep_rejected else None
        _select(limits, number, kept, folder / "scores", target, rejected)
        rounds.append(_round_report(number, ready, held_out, folder, limits, target, tally_field))
        kept = target
        say(
            f"self-cleaning round {number}: {rounds[-1]['documents_out']} of {rounds[-1]['documents_in']} documents "
            f"stay; held-out loss {rounds[-1]['held_out']['bits_per_byte']:.4f} bits per byte before them"
        )
    result: dict[str, Any] = {"rounds": rounds, "held_out_documents": sum(1 for _ in read_lines(held_out))}
    say("self-cleaning: training on what is left")
    run = _train(settings, _learned_from(work / "last", kept, (), held_out), work / "last", device)
    result["after"] = _held_out_loss(load(run, device), held_out, work / "last")
    if settings.compare:
        say("self-cleaning: training on a random subset of the same size, to compare")
        subset = _random_subset(work / "random", source, kept, held_out)
        run = _train(settings, subset, work / "random", device)
        result["random_subset"] = _held_out_loss(load(run, device), held_out, work / "random")
    return result


def _identity(record: dict[str, Any]) -> bytes:
    return hashlib.blake2b(record["text"].encode("utf-8", "replace"), digest_size=8).digest()


def _hold_out(settings: SelfCleanSection, shards: list[Path], work: Path) -> Path:
    """What losses are measured on: the recipe's own text, or a share of the corpus chosen by hash."""
    path = work / "held-out.jsonl.gz"
    if path.exists():
        return path
    limit = int(settings.held_out_fraction * 2**64)
    with Lines(path) as lines:
        if settings.held_out:
            for document in read_documents(find_files(map(assets.named, settings.held_out))):
                lines.write({"text": document.text})
        else:
            for shard in shards:
                for record in read_lines(shard):
                    if int.from_bytes(_identity(record)) < limit:
                        lines.write({"text": record["text"]})
        if not lines.count:
            raise UserError("no document is held out for self-cleaning; raise self_clean.held_out_fraction")
    return path


def _learned_from(folder: Path, kept: Path, seed: tuple[str, ...], held_out: Path) -> Path:
    """One file of training text: the seed, or what is kept, without what is held out."""
    path = folder / "train.jsonl.gz"
    if not path.exists():
        without = {_identity(record) for record in read_lines(held_out)}
        with Lines(path) as lines:
            for text in _texts(kept, seed):
                if _identity({"text": text}) not in without:
                    lines.write({"text": text})
            if not lines.count:
                raise UserError("nothing is left to learn from; loosen the filters, or self_clean.drop_highest")
    return path


def _texts(kept: Path, seed: tuple[str, ...]) -> Iterator[str]:
    if seed:
        for document in read_documents(find_files(seed)):
            yield document.text
    else:
        for shard in sorted(kept.glob("*.jsonl.gz")):
            for record in read_lines(shard):
                yield record["text"]


def _random_subset(folder: Path, source: Path, kept: Path, held_out: Path) -> Path:
    """As many bytes of the corpus before self-cleaning as were kept, chosen at random."""
    path = folder / "train.jsonl.gz"
    if not path.exists():
        target = sum(len(text.encode()) for text in _texts(kept, ()))
        without = {_identity(record) for record in read_lines(held_out)}
        texts = [text for text in _texts(source, ()) if _identity({"text": text}) not in without]
        random.Random(0).shuffle(texts)
        with Lines(path) as lines:
            size = 0
            for text in texts:
                if size < target:
                    lines.write({"text": text})
                    size += len(text.encode())
    return path


def _train(settings: SelfCleanSection, text: Path, folder: Path, device: str) -> Path:
    """The run folder of a model trained on `text`; done or half-done work is gone on with."""
    run = folder / "run"
    if (run / "weights" / "config.json").exists():
        return run
    config = load_recipe(settings.recipe, [*settings.set, f"train.device={device}"])
    tokenizer = Tokenizer.load(assets.tokenizer_model(config.tokenizer.path))
    tokens = folder / "tokens"
    tokenize_corpus([text], tokens, tokenizer, Options(val_fraction=0), workers=1)
    changes = [f"data.path={tokens}", f"tokenizer.path={tokenizer.path}", "eval.every_steps=0"]
    sets = [*settings.set, *changes, f"train.device={device}"]
    train(load_recipe(settings.recipe, sets), run, resume="auto")
    return run


def _score_shards(ready: Ready, kept: Path, folder: Path, say: Say) -> None:
    for shard in sorted(kept.glob("*.jsonl.gz")):
        if (folder / shard.name).exists():
            continue
        records = [{"id": r["id"], "group": f"{r.get('source', '')}/{r.get('lang', '')}"} for r in read_lines(shard)]
        texts = (record["text"] for record in read_lines(shard))
        with Lines(folder / shard.name) as lines:
            for record, score in zip(records, score_texts(ready.model, ready.tokenizer, texts), strict=True):
                lines.write({**record, "tokens": score.tokens, "bytes": score.num_bytes, "nats": score.nats})
        say(f"  {shard.name}: {len(records)} documents scored")


def _scores(folder: Path) -> Iterator[tuple[dict[str, Any], float]]:
    for path in sorted(folder.glob("*.jsonl.gz")):
        for record in read_lines(path):
            yield record, Score(record["tokens"], record["nats"], record["bytes"]).bits_per_byte


def _limits(settings: SelfCleanSection, scores: Path) -> dict[str, tuple[float, float]]:
    """Lowest and highest bits per byte of each source and language that stay: the quantiles, and `max_score`."""
    groups: dict[str, list[float]] = {}
    for record, bits in _scores(scores):
        groups.setdefault(record["group"], []).append(bits)
    limits = {}
    for group, values in groups.items():
        values.sort()
        lowest = values[int(settings.drop_lowest * len(values))]
        highest = values[len(values) - 1 - int(settings.drop_highest * len(values))]
        limits[group] = (lowest, min(highest, settings.max_score or highest))
    return limits


def _select(
    limits: dict[str, tuple[float, float]], number: int, kept: Path, scores: Path, target: Path, rejected: Path | None
) -> None:
    for shard in sorted(kept.glob("*.jsonl.gz")):
        if (target / shard.name).exists():
            continue
        dropped = []
        with Lines(target / shard.name) as lines:
            for record, score in zip(read_lines(shard), read_lines(scores / shard.name), strict=True):
                bits = Score(score["tokens"], score["nats"], score["bytes"]).bits_per_byte
                low, high = limits[score["group"]]
                if low <= bits <= high:
                    lines.write(record)
                    continue
                reason = "unlikely text" if bits > high else "too likely text"
                figures = {"bits_per_byte": round(bits, 4), "range": [round(low, 4), round(high, 4)], "round": number}
                record[REJECTED] = {"step": "self-clean", "reason": reason, **figures}
                dropped.append(record)
            if rejected is not None:
                # Inside the block: the kept shard, whose presence means done, appears last.
                with Lines(rejected / f"self-clean-{number}-{shard.name}") as lost:
                    for record in dropped:
                        lost.write(record)


def _round_report(
    number: int,
    ready: Ready,
    held_out: Path,
    folder: Path,
    limits: dict[str, tuple[float, float]],
    target: Path,
    tally_field: str | None,
) -> dict[str, Any]:
    counts = [0] * _BINS
    documents = size = 0
    reasons = {"unlikely text": 0, "too likely text": 0}
    for record, bits in _scores(folder / "scores"):
        low, high = limits[record["group"]]
        reasons["unlikely text"] += bits > high
        reasons["too likely text"] += bits < low
        counts[min(_BINS - 1, int(bits / _MAX_BITS * _BINS))] += 1
        documents, size = documents + 1, size + record["bytes"]
    documents_out = bytes_out = 0
    tally: dict[str, int] = {}
    for shard in sorted(target.glob("*.jsonl.gz")):
        for record in read_lines(shard):
            documents_out, bytes_out = documents_out + 1, bytes_out + len(record["text"].encode())
            if tally_field and tally_field in record:
                tally[str(record[tally_field])] = tally.get(str(record[tally_field]), 0) + 1
    return {
        "round": number,
        "documents_in": documents,
        "documents_out": documents_out,
        "bytes_in": size,
        "bytes_out": bytes_out,
        "reasons": reasons,
        "limits": {group: [round(low, 4), round(high, 4)] for group, (low, high) in limits.items()},
        "histogram": {"from": 0, "to": _MAX_BITS, "counts": counts},
        "kept_by_tally": tally,
        "held_out": _held_out_loss(ready, held_out, folder),
    }


def _held_out_loss(ready: Ready, held_out: Path, folder: Path) -> dict[str, float]:
    """Nats a token and bits per byte over everything held out."""
    path = folder / "held-out.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    scores = list(score_texts(ready.model, ready.tokenizer, (record["text"] for record in read_lines(held_out))))
    total = Score(*(sum(getattr(s, name) for s in scores) for name in ("tokens", "nats", "num_bytes")))
    loss = {"loss": total.nats / max(total.tokens, 1), "bits_per_byte": total.bits_per_byte}
    write_text_atomic(path, json.dumps(loss))
    return loss
