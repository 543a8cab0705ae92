"""The sections of a run's config and their keys, each documented where it is declared; see tnllm/training/config.py."""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tnllm.errors import UserError
from tnllm.files import parse_count
from tnllm.recipe import Section, one_or_more


def _count(value: Any) -> Any:
    if value is None:
        return None
    try:
        return parse_count(value)
    except UserError:
        raise ValueError("expected a whole number such as 5000, 10K, 0.5M or 300B") from None


def _seconds(value: Any) -> Any:
    text = value if isinstance(value, str) else ""
    match = re.fullmatch(r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?", text)
    if match is None or not any(match.groups()):
        if isinstance(value, str):
            raise ValueError("expected a number of seconds, or a time such as 30m or 11h30m")
        return value
    return sum(int(number or 0) * unit for number, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))


def _switch(value: Any) -> Any:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _device(name: str) -> str:
    # Whether the machine has it is checked when training starts: a recipe may be read on another one.
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", name):
        raise ValueError("expected auto, cpu, cuda or cuda:N")
    return name


def steps_of(epochs: float, epoch_steps: float) -> int:
    """Steps of `epochs` passes of `epoch_steps` each: rounded up, at least one."""
    return max(1, math.ceil(epochs * epoch_steps))


def _path(name: str) -> str:
    # Names that no file can have would raise where they are first looked for.
    if not name.isprintable() or len(name) > 4000 or any(len(part.encode()) > 255 for part in name.split("/")):
        raise ValueError("not a path that a file can have")
    return name


PACKAGED = "packaged"  # train.init: the model that ships
Count = Annotated[int, BeforeValidator(_count)]
Epochs = Annotated[float, Field(gt=0, le=10**6)]
PathName = Annotated[str, AfterValidator(_path)]


class TokenizerSection(Section):
    """Which tokenizer."""

    path: PathName | None = Field(
        None,
        description="SentencePiece .model file, a folder with tokenizer.model, or a packaged one: tnllm-8k, tnllm-64k. "
        "null: tnllm-8k. Token shards bring their own, before a packaged one.",
    )


class DataSource(Section):
    """One corpus of a mixture."""

    path: PathName = Field(description="Token shards, or text to tokenize first.")
    weight: float | None = Field(None, gt=0, description="Share of the samples; null: its share of all tokens.")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        if not isinstance(value, str | dict | DataSource):
            raise ValueError("expected a path or {path: ..., weight: ...}")
        return {"path": value} if isinstance(value, str) else value


class DataSection(Section):
    """The training data."""

    path: Annotated[tuple[DataSource, ...], Field(min_length=1), BeforeValidator(one_or_more)] | None = Field(
        None,
        description="Token shards, a text file or a folder of them (txt, jsonl, parquet; .zst, .gz, .xz), or the URL of "
        "one (https, hf, s3, gs); or a list of them; or a list of {path, weight}. null: the sample corpus that ships in "
        "the package.",
    )
    format: Literal["text", "chat"] = Field(
        "text",
        description="text: documents, trained on in full. chat: instruction files (alpaca, messages, prompt and response), "
        "trained on the answers only.",
    )
    chat_template: str | None = Field(
        None,
        description="The text around a prompt, with {prompt} once; the answer and the end token follow. null: that of the "
        "weights of train.init, else the released models' Human: and Assistant: lines.",
    )
    field: str = Field("text", description="The field of a JSONL or parquet record that holds the text.")
    seq_len: Count = Field(2048, ge=1, le=2**31, description="Tokens in a row.")
    packing: Literal["reset", "concat"] = Field(
        "reset",
        description="reset: the state is reset between the documents of a row. concat: rows are cut from the stream "
        "and the state continues across document borders.",
    )
    val_fraction: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="Share of documents or conversations kept for validation when the data is tokenized.",
    )
    val_path: Annotated[tuple[PathName, ...], Field(min_length=1), BeforeValidator(one_or_more)] | None = Field(
        None,
        description="What to validate on, all of it: one or more of what path takes. Nothing of path is then held out. "
        "null: the share val_fraction of path.",
    )

    stream_gb: float | None = Field(
        None,
        gt=0,
        description="Tokenize text while training reads it, with at most so many GB of each source's tokens on disk, for "
        "corpora larger than it. null: tokenize all of it first.",
    )

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        both = {source.path for source in self.path or ()} & set(self.val_path or ())
        if both:
            raise ValueError(f"{min(both)} is in path and in val_path; validate on text that is not trained on")
        if self.stream_gb is not None and self.format == "chat":
            raise ValueError("stream_gb is for format text; conversations are packed in memory")
        return self


class OptimizerSection(Section):
    """AdamW."""

    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="Decay of the running means of gradients and of their squares."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the root of the mean square.")
    weight_decay: float = Field(
        0.1, ge=0, description="Decoupled decay of matrices; vectors and LRPE's theta are not decayed."
    )
    grad_clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0: no clipping.")


class ScheduleSection(Section):
    """Learning rate over the run."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine",
        description="After warm-up: cosine or linear fall to the end; wsd: constant, then a linear fall; constant.",
    )
    warmup_steps: Count | None = Field(
        None, ge=0, description="Steps of linear rise from zero. null: 100, or a tenth of a horizon below 1000."
    )
    horizon_steps: Count | None = Field(
        None,
        ge=1,
        description="Step at which the schedule ends. null: the recipe's own length, not the one set by --set, so "
        "that runs which differ only in max_steps agree step for step.",
    )
    horizon_epochs: Epochs | None = Field(
        None, description="The same in passes over the data, as in train.max_epochs; the smaller of the two wins."
    )
    min_ratio: float = Field(0.1, ge=0, le=1, description="Last learning rate as a share of the peak.")
    decay_steps: Count | None = Field(
        None, ge=1, description="Length of wsd's linear fall. null: a tenth of the horizon, or what warm-up leaves."
    )


class TrainSection(Section):
    """Length, batch and precision."""

    seed: Count = Field(0, description="Seeds the weights, the order of data and sampled text.")
    init: PathName | None = Field(
        None,
        description="Start from these weights: a weights folder, a run folder, or `packaged`, the model that ships. The "
        "model section comes from there. null: new weights.",
    )
    max_steps: Count | None = Field(None, ge=1, description="Stop after this many steps, counted from the run's start.")
    max_tokens: Count | None = Field(None, ge=1, description="Stop after this many tokens.")
    max_epochs: Epochs | None = Field(
        None,
        description="Stop after this many passes over the training data, such as 3 or 0.5, rounded up to a step. Of "
        "max_steps, max_tokens and max_epochs the one that ends first wins.",
    )
    max_time: Annotated[float, Field(gt=0, le=10**7), BeforeValidator(_seconds)] | None = Field(
        None,
        description="Save and end after this long in one process, such as 30m, 11h30m or a number of seconds; nothing is "
        "published, and --resume auto continues.",
    )
    global_batch_tokens: Count = Field(
        524_288, ge=1, description="Tokens in an optimizer step over all ranks; gradients accumulate to reach it."
    )
    micro_batch_size: Count = Field(
        8, ge=1, le=2**20, description="Rows of seq_len tokens in one forward pass of one rank."
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Compute type, independent of train.weights. auto: bf16 on a GPU, fp32 on CPU."
    )
    weights: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Type of weights and AdamW's moments. bf16: 8 bytes a parameter, not 16, with stochastic rounding; "
        "for models that do not fit otherwise. One device only.",
    )
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = Field(
        "auto", description="torch.compile. auto: on a GPU only."
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="What the backward pass recomputes. selective: everything but matrix products, about half the memory "
        "for almost no work. full: entire blocks (only their input is kept), for about a third more work.",
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="If a loss or gradient is NaN or infinite: stop, or skip the step; both report the batch."
    )
    spikes: Literal["report", "skip"] = Field(
        "report",
        description="A loss far above the last ones: report it, or also skip the update if its loss or gradient norm is; "
        "decided on the device, before the update.",
    )
    device: Annotated[str, AfterValidator(_device)] = Field(
        "auto",
        description="auto: a GPU if there is one; cpu, cuda, cuda:N. Under torchrun: the GPU of each LOCAL_RANK.",
    )

    def limits(self, epoch_steps: float | None = None) -> dict[str, int]:
        """The steps after which max_steps, max_tokens and, of a pass of `epoch_steps`, max_epochs end the run, if given."""
        limits = {} if self.max_steps is None else {"max_steps": self.max_steps}
        if self.max_tokens is not None:
            limits["max_tokens"] = -(-self.max_tokens // self.global_batch_tokens)
        if self.max_epochs is not None and epoch_steps is not None:
            limits["max_epochs"] = steps_of(self.max_epochs, epoch_steps)
        return limits

    def describe_ends(self, epoch_steps: float | None) -> str:
        """Which of several limits ends the run; empty if they agree."""
        limits = self.limits(epoch_steps)
        if len(set(limits.values())) < 2:
            return ""
        first, *later = sorted(limits, key=lambda key: limits[key])
        others = ", ".join(f"train.{key} at step {limits[key]}" for key in later)
        return f"train.{first} ends the run at step {limits[first]}, before {others}"


class EvalSection(Section):
    """Validation while training."""

    every_steps: Count = Field(
        500, ge=0, description="Steps between validations; 0: never. The last step validates too."
    )
    tokens: Count | None = Field(1_000_000, ge=1, description="Validation tokens read each time; null: the full split.")
    sample_prompts: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        (), description="A prompt or a list of them, sampled from at every validation."
    )
    sample_tokens: Count = Field(64, ge=1, description="Tokens sampled for each prompt.")
    tasks: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        (), description="Tasks of lm-evaluation-harness to score while training, as in tnllm eval. One device only."
    )
    tasks_every_steps: Count = Field(
        0, ge=0, description="Steps between scores of eval.tasks; 0: only at the end. The last step scores too."
    )
    tasks_limit: float | None = Field(
        None, gt=0, description="Only the first questions of each task, or a share below 1; null: all."
    )
    tasks_data_dir: PathName | None = Field(
        None, description="Folder of evaluation sets (tnllm eval ls). null: the samples that ship."
    )


class LogSection(Section):
    """Logging and profiling."""

    every_steps: Count = Field(10, ge=1, description="Steps between rows of metrics.jsonl and lines of the log.")
    tensorboard: bool = Field(False, description="Also write TensorBoard events (extra `track`).")
    wandb: bool = Field(False, description="Also log to Weights & Biases (extra `wandb`).")
    trackio: bool = Field(False, description="Also log to trackio (extra `trackio`).")
    project: str = Field(
        "tnllm",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="The project there. The run is called as its folder, and an identifier.",
    )
    profile_steps: Count = Field(
        0, ge=0, description="Steps to profile, after the first three, into the run's profile/; 0: none."
    )


class CheckpointSection(Section):
    """Checkpoints, from which a run resumes."""

    every_steps: Count = Field(1000, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep: Count = Field(2, ge=1, description="Newest checkpoints kept; older ones are removed.")
    async_save: bool = Field(True, description="Write in the background while training continues.")


class ParallelSection(Section):
    """The device mesh; the product is the number of ranks."""

    replicate: Count = Field(1, ge=1, le=2**16, description="Copies of the model, each with its own rows.")
    shard: Count = Field(
        1, ge=1, le=2**16, description="Ranks that shard one copy's weights and optimizer, each with its own rows."
    )
    sequence: Count = Field(1, ge=1, le=2**16, description="Ranks that split each row along the sequence.")
    tensor: Count = Field(1, ge=1, le=2**16, description="Ranks that split each matrix and the heads.")
    timeout_s: float = Field(
        600, gt=0, le=10**7, description="Seconds that a rank waits for the others before the run fails."
    )

    @property
    def data_ranks(self) -> int:
        """Ranks that read different rows: replicate * shard."""
        return self.replicate * self.shard

    @property
    def num_ranks(self) -> int:
        """The product of the axes."""
        return self.data_ranks * self.sequence * self.tensor
