"""The steps of one shard as datatrove pipeline steps: read, mend, filter, write. Each runs on any of its executors.

A document that a step rejects stays in the stream, marked with step, reason and figures, and later steps pass it by;
the last step writes both kinds. So one place writes, each shard is whole or absent, and nothing vanishes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from tnllm.cleaning import progress, rules, text
from tnllm.cleaning.blocklist import Blocklist
from tnllm.cleaning.decontaminate import Index
from tnllm.cleaning.language import identify
from tnllm.cleaning.settings import CleanSettings, InputSection
from tnllm.cleaning.shards import REJECTED, Lines, Piece
from tnllm.data.corpus import read_file
from tnllm.errors import RunError, UserError


def reject(doc: Document, step: str, reason: str, **figures: Any) -> None:
    """Mark a document."""
    doc.metadata[REJECTED] = {"step": step, "reason": reason, **figures}


class Step(PipelineStep):
    """Base of the steps: counts documents and bytes in, time, and rejections by reason and tallied field."""

    type = "tnllm"

    def __init__(self, tally_field: str | None = None) -> None:
        super().__init__()
        self.tally_field = tally_field

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for doc in data:
            if REJECTED not in doc.metadata:
                self.stat_update("documents")
                self.stat_update("bytes", value=len(doc.text.encode("utf-8", "replace")))
                with self.track_time():
                    self.process(doc)
                if REJECTED in doc.metadata:
                    self.note_rejected(doc)
            yield doc

    def process(self, doc: Document) -> None:
        """Change the document, or mark it by `reject`."""
        raise NotImplementedError

    def note_rejected(self, doc: Document) -> None:
        self.stat_update(f"rejected/{doc.metadata[REJECTED]['reason']}")
        if self.tally_field and self.tally_field in doc.metadata:
            self.stat_update(f"tally/{doc.metadata[self.tally_field]}")


class Reader(Step):
    """Documents of this rank's shard; what is none is passed on as rejected, or stops the run."""

    name = "read"

    def __init__(self, shards: list[list[Piece]], settings: InputSection, tally_field: str | None) -> None:
        super().__init__(tally_field)
        self.shards, self.settings = shards, settings

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        limit = int(self.settings.max_line_mb * 2**20)
        for piece in self.shards[rank]:
            done = start = 0 if piece.span is None else piece.span[0]
            for doc in self._documents(piece, limit):
                position = doc.metadata.pop("position", done)
                progress.advance(position - done, 1)
                done = position
                self.stat_update("documents")
                self.stat_update("bytes", value=len(doc.text.encode("utf-8", "replace")))
                if self.tally_field and self.tally_field in doc.metadata:
                    self.stat_update(f"all/{doc.metadata[self.tally_field]}")
                if REJECTED not in doc.metadata and not doc.text.strip():
                    reject(doc, self.name, "empty")
                if REJECTED in doc.metadata:
                    self.note_rejected(doc)
                yield doc
            progress.advance(start + piece.size - done, 0)

    def _documents(self, piece: Piece, limit: int) -> Iterator[Document]:
        settings, path = self.settings, Path(piece.path)
        source = path.name.split(".")[0]
        stop = settings.on_error == "stop"
        try:
            for found in read_file(path, settings.field, settings.split_on, piece.to_span(), limit):
                if hasattr(found, "reason"):
                    if stop:
                        raise UserError(f"{found}; mend it, or set input.on_error to skip")
                    yield self._bad(found.where, found.reason)
                    continue
                record = found.record
                name = str(record.pop(settings.id_field, found.where))
                record["source"] = str(record.pop(settings.source_field, source))
                record["where"], record["position"] = found.where, found.position
                yield Document(found.text, name, metadata=record)
        except RunError as error:
            # A damaged file: what came before the damage is kept, and the rest is named.
            if stop:
                raise
            yield self._bad(piece.path, str(error))

    def _bad(self, where: str, why: str) -> Document:
        doc = Document("", where, metadata={"where": where})
        reject(doc, self.name, "unreadable", why=why)
        return doc


class Repair(Step):
    """Encodings, tags, URLs, punctuation."""

    name = "repair"

    def __init__(self, settings: CleanSettings) -> None:
        super().__init__(settings.output.tally_field)
        self.settings = settings.repair

    def process(self, doc: Document) -> None:
        if doc.metadata["source"] in self.settings.exempt:
            return
        mended = text.repair(doc.text, self.settings.urls, self.settings.collapse)
        self.stat_update("changed", value=int(mended != doc.text))
        doc.text = mended
        if not mended:
            reject(doc, self.name, "nothing left")


class Language(Step):
    """Language by py3langid, offline."""

    name = "language"

    def __init__(self, settings: CleanSettings) -> None:
        super().__init__(settings.output.tally_field)
        self.settings = settings.language

    def process(self, doc: Document) -> None:
        language, confidence = identify(doc.text)
        doc.metadata["lang"] = language
        self.stat_update(f"language/{language}")
        figures = {"lang": language, "confidence": round(confidence, 4)}
        if language not in self.settings.keep:
            reject(doc, self.name, "not a kept language", **figures)
        elif confidence < self.settings.min_confidence:
            reject(doc, self.name, "language unsure", **figures, least=self.settings.min_confidence)


class Boilerplate(Step):
    """Lines of navigation and notices."""

    name = "boilerplate"

    def __init__(self, settings: CleanSettings) -> None:
        super().__init__(settings.output.tally_field)
        self.settings = settings.boilerplate

    def process(self, doc: Document) -> None:
        before = len(doc.text)
        kept, removed = text.remove_boilerplate(doc.text)
        if not removed:
            return
        self.stat_update("changed")
        if removed > self.settings.max_share * before or not kept.strip():
            reject(doc, self.name, "mostly boilerplate", share=round(removed / before, 4))
        else:
            doc.text = kept


class Rules(Step):
    """Figures within their ranges."""

    name = "rules"

    def __init__(self, settings: CleanSettings) -> None:
        super().__init__(settings.output.tally_field)
        self.settings = settings.rules

    def process(self, doc: Document) -> None:
        if doc.metadata["source"] in self.settings.exempt:
            return
        language = doc.metadata.get("lang") or identify(doc.text)[0]
        found = rules.figures(doc.text, language)
        broken = rules.check(found, self.settings.limits(language))
        if broken is not None:
            name, value, (low, high) = broken
            side = "low" if low is not None and value < low else "high"
            rounded = {key: round(figure, 4) for key, figure in found.items()}
            reject(doc, self.name, f"{name} too {side}", value=round(value, 4), range=[low, high], figures=rounded)


class Blocked(Step):
    """Unwanted words and hosts."""

    name = "blocklist"

    def __init__(self, settings: CleanSettings) -> None:
        super().__init__(settings.output.tally_field)
        self.settings = settings.blocklist
        self._list: Blocklist | None = None

    def process(self, doc: Document) -> None:
        if self._list is None:
            self._list = Blocklist.read(self.settings.words, self.settings.hosts)
        host = self._list.blocked_host(doc.metadata.get("url"))
        if host:
            reject(doc, self.name, "host", host=host)
        elif len(terms := self._list.terms_in(doc.text)) >= self.settings.min_hits:
            reject(doc, self.name, "words", terms=terms[:20])


class Personal(Step):
    """Masks mail addresses, public IP addresses and phone numbers."""

    name = "personal"

    def __init__(self, settings: CleanSettings) -> None:
        super().__init__(settings.output.tally_field)
        self.kinds = settings.personal.mask

    def process(self, doc: Document) -> None:
        doc.text, count = text.mask_personal_data(doc.text, self.kinds)
        if count:
            self.stat_update("changed")
            self.stat_update("masked", value=count)


class Decontaminate(Step):
    """Documents that hold a piece of an evaluation set."""

    name = "decontaminate"

    def __init__(self, settings: CleanSettings, index: Path) -> None:
        super().__init__(settings.output.tally_field)
        self.settings, self.path = settings.decontaminate, index
        self._index: Index | None = None

    def process(self, doc: Document) -> None:
        if self._index is None:
            self._index = Index.load(self.path)
        hits = self._index.hits(doc.text)
        if len(hits) >= self.settings.min_hits:
            reject(doc, self.name, "evaluation text", hits=len(hits), sets=sorted(set(hits))[:5])


class Writer(PipelineStep):
    """Kept documents to `kept/NNNNN.jsonl.gz`, rejected ones to `rejected/STAGE-NNNNN.jsonl.gz`."""

    type, name = "tnllm", "write"

    def __init__(self, kept: Path, rejected: Path | None, stage: str) -> None:
        super().__init__()
        self.kept, self.rejected, self.stage = kept, rejected, stage

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if self.rejected is None:
            with Lines(self.kept / f"{rank:05d}.jsonl.gz") as kept:
                yield from self._write(data, kept, None)
            return
        path = self.rejected / f"{self.stage}-{rank:05d}.jsonl.gz"
        with Lines(self.kept / f"{rank:05d}.jsonl.gz") as kept, Lines(path) as rejected:
            yield from self._write(data, kept, rejected)

    def _write(self, data: DocumentsPipeline, kept: Lines, rejected: Lines | None) -> DocumentsPipeline:
        for doc in data:
            record = {"text": doc.text, "id": doc.id, **doc.metadata}
            if REJECTED not in doc.metadata:
                self.stat_update("documents")
                self.stat_update("bytes", value=len(doc.text.encode("utf-8", "replace")))
                kept.write(record)
            elif rejected is not None:
                rejected.write(record)
            yield doc


def filter_steps(
    shards: list[list[Piece]], settings: CleanSettings, index: Path | None, more: Sequence[PipelineStep]
) -> list[PipelineStep]:
    """The steps of one shard that the settings ask for, `more` behind them."""
    tally = settings.output.tally_field
    steps: list[PipelineStep] = [Reader(shards, settings.input, tally)]
    if settings.repair.enabled:
        steps.append(Repair(settings))
    if settings.language.keep:
        steps.append(Language(settings))
    if settings.boilerplate.enabled:
        steps.append(Boilerplate(settings))
    if settings.rules.enabled:
        steps.append(Rules(settings))
    if settings.blocklist.words or settings.blocklist.hosts:
        steps.append(Blocked(settings))
    if settings.personal.mask:
        steps.append(Personal(settings))
    if index is not None:
        steps.append(Decontaminate(settings, index))
    return [*steps, *more]
