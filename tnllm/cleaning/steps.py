"""The steps of one shard as datatrove pipeline steps: read, repair, filter, write. Each runs on any of its executors.

A document that a step rejects stays in the stream, marked with step, reason and figures, and later steps skip it; the
last step writes kept and rejected documents. So only one step writes, a shard is complete or absent, and no document is
lost.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from tnllm.cleaning import repair, rules
from tnllm.cleaning.blocklist import Blocklist
from tnllm.cleaning.decontaminate import Index
from tnllm.cleaning.input_shards import Piece
from tnllm.cleaning.language import identify
from tnllm.cleaning.records import REJECTED, RecordWriter, named_fields
from tnllm.cleaning.settings import (
    BlocklistSection,
    BoilerplateSection,
    CleanSettings,
    DecontaminateSection,
    InputSection,
    LanguageSection,
    PersonalSection,
    RepairSection,
    RulesSection,
)
from tnllm.cleaning.worker_counter import advance
from tnllm.data.documents import BadDocument
from tnllm.data.documents import Document as CorpusDocument
from tnllm.data.folders import shown
from tnllm.data.remote import read_source
from tnllm.errors import RunError, UserError

# Names a task counts one by one.
_MAX_NAMED = 20


def reject(doc: Document, step: str, reason: str, **figures: Any) -> None:
    """Mark a document."""
    doc.metadata[REJECTED] = {"step": step, "reason": reason, **figures}


class Step(PipelineStep):
    """Base of the steps: counts documents and bytes in, time, and rejections by reason and tallied field.

    `section` names the part of `CleanSettings` that a step reads as `self.settings`.
    """

    type, section = "tnllm", ""

    def __init__(self, settings: CleanSettings) -> None:
        super().__init__()
        self.tally_field = settings.output.tally_field
        self.settings = getattr(settings, self.section)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for doc in data:
            if REJECTED not in doc.metadata:
                count_document(self, doc)
                with self.track_time():
                    self.process(doc)
                self.count_rejected(doc)
            yield doc

    def process(self, doc: Document) -> None:
        """Change the document, or mark it by `reject`."""
        raise NotImplementedError

    def count_rejected(self, doc: Document) -> None:
        """Count the document if it is marked as rejected."""
        if REJECTED in doc.metadata:
            self.stat_update(f"rejected/{doc.metadata[REJECTED]['reason']}")
            self.count_tally(doc, "tally")

    def count_tally(self, doc: Document, label: str) -> None:
        """Count the value of the tallied field."""
        if self.tally_field and self.tally_field in doc.metadata:
            self.stat_update(f"{label}/{doc.metadata[self.tally_field]}")


def count_document(step: PipelineStep, doc: Document) -> None:
    step.stat_update("documents")
    step.stat_update("bytes", value=len(doc.text.encode("utf-8", "replace")))


class Reader(Step):
    """Documents of this rank's shard; unreadable records are passed on as rejected, or stop the run.

    What could not be read and fields that could not be kept are counted by name: `unreadable/WHERE: WHY`,
    `lost/FIELD of FILE: WHY`.
    """

    name, section = "read", "input"
    settings: InputSection

    def __init__(self, settings: CleanSettings, shards: list[list[Piece]]) -> None:
        super().__init__(settings)
        self.shards = shards
        self._names: dict[str, set[str]] = {"unreadable": set(), "lost": set()}

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for piece in self.shards[rank]:
            done = start = piece.span.start if piece.span else 0
            for doc, position in self._documents(piece):
                position = max(position, done)
                advance(position - done, 1)
                done = position
                count_document(self, doc)
                self.count_tally(doc, "all")
                if REJECTED not in doc.metadata and not doc.text.strip():
                    reject(doc, self.name, "empty")
                self.count_rejected(doc)
                yield doc
            advance(start + piece.size - done, 0)

    def _documents(self, piece: Piece) -> Iterator[tuple[Document, int]]:
        """Each document with the reading position after it; 0 after what could not be read."""
        settings = self.settings
        max_line_bytes = int(settings.max_line_mb * 2**20)
        for item in read_source(piece.file, None, settings.field, settings.split_on, piece.span, max_line_bytes):
            if isinstance(item, CorpusDocument):
                name, fields, lost = named_fields(item, settings.id_field, settings.source_field)
                for field, why in lost.items():
                    self._count_name("lost", f"{field} of {piece.file}: {why}")
                yield Document(item.text, name, metadata=fields), item.position
            elif settings.on_error == "stop":
                advice = "fix it, or set input.on_error to skip"
                raise (RunError if item.is_damage else UserError)(f"{item}; {advice}")
            else:
                yield self._bad(item), 0

    def _bad(self, item: BadDocument) -> Document:
        self._count_name("unreadable", shown(item))
        doc = Document("", item.where, metadata={"where": item.where})
        reject(doc, self.name, "unreadable", why=item.reason)
        return doc

    def _count_name(self, kind: str, name: str) -> None:
        known = self._names[kind]
        if len(known) < _MAX_NAMED:
            known.add(name)
        self.stat_update(f"{kind}/{name if name in known else 'others'}")


class Repair(Step):
    """Encodings, tags, URLs, punctuation."""

    name = section = "repair"
    settings: RepairSection

    def process(self, doc: Document) -> None:
        if doc.metadata["source"] in self.settings.exempt:
            return
        repaired = repair.repair(doc.text, self.settings.urls, self.settings.collapse)
        self.stat_update("changed", value=int(repaired != doc.text))
        doc.text = repaired
        if not repaired:
            reject(doc, self.name, "nothing left")


class Language(Step):
    """Language by py3langid, offline."""

    name = section = "language"
    settings: LanguageSection

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

    name = section = "boilerplate"
    settings: BoilerplateSection

    def process(self, doc: Document) -> None:
        before = len(doc.text)
        kept, removed = repair.remove_boilerplate(doc.text)
        if not removed:
            return
        self.stat_update("changed")
        if removed > self.settings.max_share * before or not kept.strip():
            reject(doc, self.name, "mostly boilerplate", share=round(removed / before, 4))
        else:
            doc.text = kept


class Rules(Step):
    """Figures within their ranges."""

    name = section = "rules"
    settings: RulesSection

    def process(self, doc: Document) -> None:
        if doc.metadata["source"] in self.settings.exempt:
            return
        language = doc.metadata.get("lang") or identify(doc.text)[0]
        figures = rules.figures(doc.text, language)
        broken = rules.check(figures, self.settings.limits(language))
        if broken is not None:
            name, value, (low, high) = broken
            side = "low" if low is not None and value < low else "high"
            rounded = {key: round(figure, 4) for key, figure in figures.items()}
            reject(doc, self.name, f"{name} too {side}", value=round(value, 4), range=[low, high], figures=rounded)


class Blocked(Step):
    """Unwanted words and hosts."""

    name = section = "blocklist"
    settings: BlocklistSection
    _list: Blocklist | None = None

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

    name = section = "personal"
    settings: PersonalSection

    def process(self, doc: Document) -> None:
        doc.text, count = repair.mask_personal_data(doc.text, self.settings.mask)
        if count:
            self.stat_update("changed")
            self.stat_update("masked", value=count)


class Decontaminate(Step):
    """Documents that contain a part of an evaluation set."""

    name = section = "decontaminate"
    settings: DecontaminateSection
    _index: Index | None = None

    def __init__(self, settings: CleanSettings, index: Path) -> None:
        super().__init__(settings)
        self.path = index

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
        name = f"{rank:05d}.jsonl.gz"
        keep_rejected = RecordWriter(self.rejected / f"{self.stage}-{name}") if self.rejected else nullcontext()
        with RecordWriter(self.kept / name) as kept, keep_rejected as rejected:
            for doc in data:
                record = {"text": doc.text, "id": doc.id} | doc.metadata
                if REJECTED not in doc.metadata:
                    count_document(self, doc)
                    kept.write(record)
                elif rejected is not None:
                    rejected.write(record)
                yield doc


def filter_steps(
    settings: CleanSettings, shards: list[list[Piece]], index: Path | None, more: Sequence[PipelineStep]
) -> list[PipelineStep]:
    """The steps of one shard that the settings ask for, followed by `more`."""
    steps: list[PipelineStep] = [Reader(settings, shards)]
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
