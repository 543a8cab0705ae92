"""The settings of a cleaning run, as frozen values: the sections of a recipe such as `recipes/data/sample.yaml`.

settings = CleanSettings.model_validate({"input": {"path": ["web/"]}, "dedup": {"threshold": 0.7}})
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from tnllm.cleaning.rules import DEFAULTS, FIGURES, Range
from tnllm.errors import did_you_mean
from tnllm.recipe import Section, one_or_more

Paths = Annotated[tuple[str, ...], BeforeValidator(one_or_more)]


class InputSection(Section):
    """The input."""

    path: Paths = Field((), description="Files or folders; 'dirty-sample' is the sample that ships in the package.")
    field: str = Field("text", description="Field or column that holds the text.")
    id_field: str = Field("id", description="Field that names a document; without it file:line does.")
    source_field: str = Field("source", description="Field that names where a document comes from; else the file does.")
    split_on: Literal["none", "blank-line", "line"] = Field("none", description="Where text files are split.")
    on_error: Literal["stop", "skip"] = Field("skip", description="At an unreadable record; skip lists it as rejected.")
    max_line_mb: float = Field(16, gt=0, description="A longer line counts as unreadable.")
    shard_mb: float = Field(64, gt=0, description="Input of one shard, the unit of work and of resuming.")


class RepairSection(Section):
    """Encodings, HTML remnants, punctuation, special characters."""

    enabled: bool = Field(True, description="Repair text before any filter.")
    urls: bool = Field(True, description="Strip URLs.")
    collapse: bool = Field(True, description="Collapse repeated punctuation; Markdown and LaTeX structure stays.")
    exempt: tuple[str, ...] = Field((), description="Sources left as they are (code).")


class LanguageSection(Section):
    """Which languages are kept."""

    keep: tuple[str, ...] = Field(("en", "zh"), description="ISO 639 codes; empty keeps all.")
    min_confidence: float = Field(0.3, ge=0, le=1, description="Confidence of py3langid that a text needs.")


class BoilerplateSection(Section):
    """Lines of navigation, cookie notices, copyright."""

    enabled: bool = Field(True, description="Drop such lines.")
    max_share: float = Field(0.5, gt=0, le=1, description="A text with a larger share of such lines is dropped.")


class RulesSection(Section):
    """Ranges of figures; `tnllm data clean --keys` lists each with its defaults."""

    enabled: bool = Field(True, description="Apply the rules.")
    en: dict[str, Range] = Field({}, description="Figure: [lowest, highest], over the defaults for English.")
    zh: dict[str, Range] = Field({}, description="The same for Chinese.")
    other: dict[str, Range] = Field({}, description="The same for any other language.")
    exempt: tuple[str, ...] = Field((), description="Sources that no rule applies to, such as code.")

    @field_validator("en", "zh", "other")
    @classmethod
    def _known(cls, value: dict[str, Range]) -> dict[str, Range]:
        for name in value:
            if name not in FIGURES:
                raise ValueError(f"no figure {name!r}{did_you_mean(name, FIGURES)}")
        return value

    def limits(self, language: str) -> dict[str, Range]:
        """The ranges that apply to a language."""
        name = language if language in ("en", "zh") else "other"
        return {**DEFAULTS[name], **getattr(self, name)}


class BlocklistSection(Section):
    """Unwanted words and hosts."""

    words: Paths = Field((), description="Files of terms, one a line. None ship.")
    min_hits: int = Field(2, ge=1, description="Distinct terms of the list that reject a document.")
    hosts: Paths = Field((), description="Files of host names, one a line; also their subdomains (field url).")


class PersonalSection(Section):
    """Personal data."""

    mask: tuple[Literal["email", "ip", "phone"], ...] = Field(
        ("email", "ip", "phone"), description="What is masked. []: nothing."
    )


class DedupSection(Section):
    """Duplicates, exact and near."""

    enabled: bool = Field(True, description="Keep one document of each group of duplicates: the first in input order.")
    threshold: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of n-grams; 1: exact duplicates only.")
    words: int = Field(5, ge=1, description="Words in an n-gram.")
    characters: int = Field(5, ge=1, description="Characters in an n-gram of Chinese, Japanese or Korean text.")
    num_hashes: int = Field(256, ge=16, description="MinHash values of a document; 4 bytes each on disk.")
    rows: int = Field(5, ge=1, description="Values that must agree in a band; fewer find less similar pairs, slower.")
    verify: Literal["exact", "estimate"] = Field(
        "exact", description="The similarity that decides: exact, of the n-grams, or estimated by MinHash."
    )
    memory_mb: float = Field(1024, gt=0, description="Memory limit for matching; more documents take more passes.")
    seed: int = Field(0, ge=0, description="Seed of the hash functions.")


class DecontaminateSection(Section):
    """Overlap with evaluation sets."""

    path: Paths = Field((), description="Files or folders of evaluation sets (.jsonl .json .csv .tsv .txt). None: off.")
    words: int = Field(13, ge=5, description="Consecutive words that count as overlap.")
    characters: int = Field(24, ge=8, description="Consecutive characters, in Chinese.")
    min_hits: int = Field(1, ge=1, description="Shared n-grams that reject a document.")


class SelfCleanSection(Section):
    """Rounds of training a small model, scoring every document with it and dropping the least likely."""

    rounds: int = Field(0, ge=0, description="0: off.")
    seed_path: Paths = Field((), description="Clean text that round 1 trains on. None: everything kept so far.")
    drop_highest: float = Field(
        0.1, ge=0, lt=1, description="Share of each source with the worst scores, dropped a round."
    )
    drop_lowest: float = Field(0.0, ge=0, lt=1, description="Share with the lowest scores (endless repetition).")
    max_score: float | None = Field(None, gt=0, description="Also drop documents above this many bits per byte.")
    recipe: str = Field("tiny", description="Training recipe of the scoring model.")
    set: Paths = Field((), description="Changes to that recipe, as --set takes them: train.max_steps=200.")
    held_out: Paths = Field((), description="Clean text for the loss of each round. None: a share of round 1's text.")
    held_out_fraction: float = Field(0.02, gt=0, lt=0.5, description="That share; it is never trained on.")
    compare: bool = Field(False, description="Also train on a random subset of the same size, to compare losses.")


class OutputSection(Section):
    """The output."""

    keep_rejected: bool = Field(True, description="Keep every rejected document with its reason and figures.")
    tally_field: str | None = Field(None, description="Field whose values are counted in and out of each step.")


class SlurmSection(Section):
    """Options of the executor slurm, by datatrove's names."""

    partition: str = Field("cpu", description="Slurm partition.")
    time: str = Field("20:00:00", description="Time limit of a task.")
    cpus_per_task: int = Field(1, ge=1, description="Cores of a task.")
    mem_per_cpu_gb: int = Field(2, ge=1, description="GiB for each core.")
    env_command: str | None = Field(None, description="Shell line that activates the environment.")
    sbatch_args: dict[str, Any] = Field({}, description="Further options of sbatch.")


class CleanSettings(Section):
    """All sections."""

    input: InputSection = InputSection()
    repair: RepairSection = RepairSection()
    language: LanguageSection = LanguageSection()
    boilerplate: BoilerplateSection = BoilerplateSection()
    rules: RulesSection = RulesSection()
    blocklist: BlocklistSection = BlocklistSection()
    personal: PersonalSection = PersonalSection()
    decontaminate: DecontaminateSection = DecontaminateSection()
    dedup: DedupSection = DedupSection()
    self_clean: SelfCleanSection = SelfCleanSection()
    output: OutputSection = OutputSection()
    slurm: SlurmSection = SlurmSection()


def only_dedup(**changes: Any) -> CleanSettings:
    """Settings that only drop duplicates; `changes` are fields of the dedup and input sections."""
    dedup = {key: value for key, value in changes.items() if key in DedupSection.model_fields}
    given = {key: value for key, value in changes.items() if key in InputSection.model_fields}
    return CleanSettings(
        input=InputSection(**given),
        repair=RepairSection(enabled=False),
        language=LanguageSection(keep=()),
        boilerplate=BoilerplateSection(enabled=False),
        rules=RulesSection(enabled=False),
        personal=PersonalSection(mask=()),
        dedup=DedupSection(**dedup),
    )
