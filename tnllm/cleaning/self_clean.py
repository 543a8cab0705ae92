"""Self-cleaning: train a small model, score every document with it, drop the least likely of each source, repeat.

    rounds = self_clean(settings, out / "work/unique", out, device="auto")

The idea is that most of a corpus is good, so a model of all of it finds the bad parts unlikely (arXiv 2307.14995,
appendix D). Each round leaves, under OUT/work/self-clean/round-N:

    train.jsonl.gz  tokens/  run/    the training text, and the training run (it resumes)
    scores/NNNNN.jsonl               id, group, tokens, bytes, nats of every document of the round
    kept/NNNNN.jsonl.gz              the documents that are kept (the last round writes OUT/clean)

Files that exist are not made again. Held-out text is never trained on. After the last round a model is trained on what
is left, and its held-out loss is compared with the earlier ones. All models train for the same number of steps.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tnllm import assets
from tnllm.cleaning.records import REJECTED, RecordWriter, read_folder, read_records
from tnllm.cleaning.score import Score, kept_scores, score_texts
from tnllm.cleaning.settings import CleanSettings, SelfCleanSection
from tnllm.data.documents import LeftOut
from tnllm.data.encode import Options
from tnllm.data.remote import find_sources, read_documents
from tnllm.data.tokenize import tokenize_corpus
from tnllm.errors import UserError
from tnllm.files import read_json, write_text_atomic
from tnllm.generation.loading import LoadedModel, load
from tnllm.progress import Status, corpus_progress, log
from tnllm.tokenizer import Tokenizer
from tnllm.training.config import load_recipe
from tnllm.training.loop import train

_BINS = 40
_MAX_BITS = 8.0


def self_clean(settings: CleanSettings, source: Path, out: Path, device: str) -> dict[str, Any]:
    """Clean the shards of `source` into OUT/clean; returns the rounds with their limits, counts and losses.

    Raises UserError for an empty corpus, and what training and scoring raise.
    """
    work = out / "work" / "self-clean"
    chosen = settings.self_clean
    held_out = _hold_out(chosen, source, work)
    kept = source
    rounds = []
    for number in range(1, chosen.rounds + 1):
        folder = work / f"round-{number}"
        seed = chosen.seed_path if number == 1 else ()
        log(f"self-cleaning round {number} of {chosen.rounds}: training on {'the seed' if seed else 'what is kept'}")
        run = _train(chosen, _training_text(folder, kept, seed, held_out), folder, device)
        ready = load(run, device)
        log(f"self-cleaning round {number}: scoring")
        _score_shards(ready, kept, folder / "scores")
        limits = _limits(chosen, folder / "scores")
        target = out / "clean" if number == chosen.rounds else folder / "kept"
        rejected = out / "rejected" if settings.output.keep_rejected else None
        _select(limits, number, kept, folder / "scores", target, rejected)
        rounds.append(_round_report(number, ready, held_out, folder, limits, target, settings.output.tally_field))
        kept = target
        log(
            f"self-cleaning round {number}: {rounds[-1]['documents_out']} of {rounds[-1]['documents_in']} documents "
            f"stay; held-out loss {rounds[-1]['held_out']['bits_per_byte']:.4f} bits per byte before them"
        )
    result: dict[str, Any] = {"rounds": rounds, "held_out_documents": sum(1 for _ in read_records(held_out))}
    log("self-cleaning: training on what is left")
    run = _train(chosen, _training_text(work / "last", kept, (), held_out), work / "last", device)
    result["after"] = _held_out_loss(load(run, device), held_out, work / "last")
    if chosen.compare:
        log("self-cleaning: training on a random subset of the same size, to compare")
        subset = _random_subset(work / "random", source, kept, held_out)
        run = _train(chosen, subset, work / "random", device)
        result["random_subset"] = _held_out_loss(load(run, device), held_out, work / "random")
    return result


def _text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


def _hold_out(settings: SelfCleanSection, source: Path, work: Path) -> Path:
    """The text that losses are measured on: the recipe's, or a share of the corpus chosen by hash."""
    path = work / "held-out.jsonl.gz"
    if path.exists():
        return path
    limit = int(settings.held_out_fraction * 2**64)
    with RecordWriter(path) as writer:
        if settings.held_out:
            for document in read_documents(find_sources(settings.held_out), on_bad=LeftOut(), more=()):
                writer.write({"text": document.text})
        else:
            for text in _texts(source):
                if int.from_bytes(_text_hash(text)) < limit:
                    writer.write({"text": text})
        if not writer.count:
            raise UserError("no document is held out for self-cleaning; raise self_clean.held_out_fraction")
    return path


def _training_text(folder: Path, kept: Path, seed: tuple[str, ...], held_out: Path) -> Path:
    """One file of training text: the seed, or what is kept, without held-out texts."""
    path = folder / "train.jsonl.gz"
    if not path.exists():
        excluded = {_text_hash(record["text"]) for record in read_records(held_out)}
        seeds = (document.text for document in read_documents(find_sources(seed), on_bad=LeftOut(), more=()))
        texts = seeds if seed else _texts(kept)
        with RecordWriter(path) as writer:
            for text in texts:
                if _text_hash(text) not in excluded:
                    writer.write({"text": text})
            if not writer.count:
                raise UserError("nothing is left to train on; loosen the filters, or self_clean.drop_highest")
    return path


def _texts(folder: Path) -> Iterator[str]:
    return (record["text"] for record in read_folder(folder))


def _random_subset(folder: Path, source: Path, kept: Path, held_out: Path) -> Path:
    """As many bytes of the corpus before self-cleaning as were kept, chosen at random."""
    path = folder / "train.jsonl.gz"
    if not path.exists():
        target = sum(len(text.encode()) for text in _texts(kept))
        excluded = {_text_hash(record["text"]) for record in read_records(held_out)}
        texts = [text for text in _texts(source) if _text_hash(text) not in excluded]
        random.Random(0).shuffle(texts)
        with RecordWriter(path) as writer:
            size = 0
            for text in texts:
                if size < target:
                    writer.write({"text": text})
                    size += len(text.encode())
    return path


def _train(settings: SelfCleanSection, text: Path, folder: Path, device: str) -> Path:
    """The run folder of a model trained on `text`; finished or partial work is reused."""
    run = folder / "run"
    if (run / "weights" / "config.json").exists():
        return run
    sets = [*settings.set, f"train.device={device}"]
    tokenizer = Tokenizer.load(assets.tokenizer_model(load_recipe(settings.recipe, sets).tokenizer.path))
    tokens = folder / "tokens"
    tokenize_corpus([text], tokens, tokenizer, Options(val_fraction=0), workers=1, outer_command=True)
    sets += [f"data.path={tokens}", f"tokenizer.path={tokenizer.path}", "eval.every_steps=0", "eval.tasks=[]"]
    train(load_recipe(settings.recipe, sets), run, resume="auto", outer_command=True)
    return run


def _score_shards(ready: LoadedModel, kept: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in sorted(kept.glob("*.jsonl.gz")):
        scores = _scores_of(shard, folder)
        if scores.exists():
            continue
        records = [
            {"id": r["id"], "group": f"{r.get('source', '')}/{r.get('lang', '')}", "bytes": len(r["text"].encode())}
            for r in read_records(shard)
        ]
        with kept_scores(scores, ready.model) as (old, write), corpus_progress(f"scoring {shard.name}") as report:
            before, total = sum(row["bytes"] for row in old), sum(record["bytes"] for record in records)
            texts = (record["text"] for record in islice(read_records(shard), len(old), None))

            def show(tokens: int, num_bytes: int, before: int = before, total: int = total) -> None:
                report(Status(before + num_bytes, total, tokens=tokens))

            for record, score in zip(
                records[len(old) :], score_texts(ready.model, ready.tokenizer, texts, report=show), strict=True
            ):
                write({**record, "tokens": score.tokens, "bytes": score.num_bytes, "nats": score.nats})
        log(f"  {shard.name}: {len(records)} documents scored")


def _scores_of(shard: Path, folder: Path) -> Path:
    return folder / shard.name.removesuffix(".gz")


def _scores(folder: Path) -> Iterator[dict[str, Any]]:
    return (record for path in sorted(folder.glob("*.jsonl")) for record in read_records(path))


def _bits_per_byte(record: dict[str, Any]) -> float:
    return Score(record["tokens"], record["nats"], record["bytes"]).bits_per_byte


def _limits(settings: SelfCleanSection, scores: Path) -> dict[str, tuple[float, float]]:
    """Lowest and highest bits per byte to keep, per source and language: the quantiles, and `max_score`."""
    groups: dict[str, list[float]] = {}
    for record in _scores(scores):
        groups.setdefault(record["group"], []).append(_bits_per_byte(record))
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
        with RecordWriter(target / shard.name) as writer:
            for record, score in zip(read_records(shard), read_records(_scores_of(shard, scores)), strict=True):
                bits = _bits_per_byte(score)
                low, high = limits[score["group"]]
                if low <= bits <= high:
                    writer.write(record)
                    continue
                reason = "unlikely text" if bits > high else "too likely text"
                figures = {"bits_per_byte": round(bits, 4), "range": [round(low, 4), round(high, 4)], "round": number}
                record[REJECTED] = {"step": "self-clean", "reason": reason, **figures}
                dropped.append(record)
            if rejected is not None:
                # Inside the block, so that the kept shard, whose presence means done, appears last.
                with RecordWriter(rejected / f"self-clean-{number}-{shard.name}") as rejected_writer:
                    for record in dropped:
                        rejected_writer.write(record)


def _round_report(
    number: int,
    ready: LoadedModel,
    held_out: Path,
    folder: Path,
    limits: dict[str, tuple[float, float]],
    target: Path,
    tally_field: str | None,
) -> dict[str, Any]:
    counts = [0] * _BINS
    documents = size = 0
    reasons = {"unlikely text": 0, "too likely text": 0}
    for record in _scores(folder / "scores"):
        bits = _bits_per_byte(record)
        low, high = limits[record["group"]]
        reasons["unlikely text"] += bits > high
        reasons["too likely text"] += bits < low
        counts[min(_BINS - 1, int(bits / _MAX_BITS * _BINS))] += 1
        documents, size = documents + 1, size + record["bytes"]
    documents_out = bytes_out = 0
    tally: Counter[str] = Counter()
    for record in read_folder(target):
        documents_out, bytes_out = documents_out + 1, bytes_out + len(record["text"].encode())
        if tally_field and tally_field in record:
            tally[str(record[tally_field])] += 1
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


def _held_out_loss(ready: LoadedModel, held_out: Path, folder: Path) -> dict[str, float]:
    """Nats a token and bits per byte over the held-out text."""
    path = folder / "held-out.json"
    if path.exists():
        return read_json(path)
    texts = (record["text"] for record in read_records(held_out))
    scores = list(score_texts(ready.model, ready.tokenizer, texts))
    total = Score(*(sum(getattr(s, name) for s in scores) for name in ("tokens", "nats", "num_bytes")))
    loss = {"loss": total.nats / max(total.tokens, 1), "bits_per_byte": total.bits_per_byte}
    write_text_atomic(path, json.dumps(loss))
    return loss
