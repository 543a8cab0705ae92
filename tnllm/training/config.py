"""The config of a run: frozen pydantic models, read from a recipe.

config = load_recipe("385m", ["train.max_steps=20", "model.kind=transformer"])
config.model                   # tnllm.modeling.config.ModelConfig, the preset and its overrides resolved
config.schedule.horizon_steps  # never None once loaded
config.to_yaml()               # every key; load_recipe of that text is equal to config

Precedence: defaults here < the recipe's `base` < the recipe < `--set`. Sizes may be written 5000, 0.5M or 300B.
"""

import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from tnllm import recipe
from tnllm.errors import UserError
from tnllm.files import parse_count
from tnllm.modeling.config import PRESETS, LoraConfig, ModelConfig, get_preset
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
        return value
    return sum(int(number or 0) * unit for number, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True))


def _switch(value: Any) -> Any:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _device(name: str) -> str:
    # Whether the machine has it is checked when training starts: a recipe may be read on another one.
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", name):
        raise ValueError("expected auto, cpu, cuda or cuda:N")
    return name


def _steps(epochs: float, epoch_steps: float) -> int:
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
        "stop",
        description="If a loss or gradient is NaN or infinite: stop, or skip the step; both report the batch.",
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
            limits["max_epochs"] = _steps(self.max_epochs, epoch_steps)
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


class RunConfig(Section):
    """All sections of a recipe."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()
    checkpoint: CheckpointSection = CheckpointSection()
    parallel: ParallelSection = ParallelSection()
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        train, schedule = self.train, self.schedule
        if train.max_steps is None and train.max_tokens is None and train.max_epochs is None:
            raise ValueError("the run has no end; set train.max_steps, train.max_tokens or train.max_epochs")
        unit = self.data.seq_len * train.micro_batch_size * self.data_ranks
        if train.global_batch_tokens % unit:
            below = train.global_batch_tokens // unit * unit
            near = f"{below} or {below + unit}" if below else f"{unit}"
            rows = train.global_batch_tokens // self.data.seq_len // self.data_ranks
            if rows and train.global_batch_tokens % (self.data.seq_len * self.data_ranks) == 0:
                near += f"; or set train.micro_batch_size={most_rows(rows, train.micro_batch_size)}"
            raise ValueError(
                f"train.global_batch_tokens is {train.global_batch_tokens}; it must be a multiple of {unit} = "
                f"data.seq_len {self.data.seq_len} * train.micro_batch_size {train.micro_batch_size} * "
                f"{self.data_ranks} data ranks, such as {near}"
            )
        horizon = schedule.horizon_steps
        most = None if horizon is None else horizon - (schedule.kind != "constant")
        if most is not None and (schedule.warmup_steps or 0) > most:
            raise ValueError(
                f"schedule.warmup_steps is {schedule.warmup_steps}, and schedule.horizon_steps {horizon} leaves room for "
                f"{most} with schedule.kind {schedule.kind}; lower the one or raise the other"
            )
        if schedule.decay_steps is not None and schedule.kind != "wsd":
            raise ValueError(f"schedule.decay_steps belongs to schedule.kind wsd, not {schedule.kind}; remove it")
        if horizon is not None and (schedule.warmup_steps or 0) + (schedule.decay_steps or 0) > horizon:
            raise ValueError(
                f"schedule.warmup_steps {schedule.warmup_steps} and schedule.decay_steps {schedule.decay_steps} overlap: "
                f"together they exceed schedule.horizon_steps {horizon}; lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        train = self.train
        if train.weights == "bf16" and (train.dtype == "fp32" or self.world_size > 1):
            reason = "train.dtype fp32" if train.dtype == "fp32" else f"{self.world_size} ranks"
            raise ValueError(f"train.weights is bf16, which cannot be combined with {reason}; set train.weights=fp32")
        if self.lora.rank and train.weights == "bf16":
            raise ValueError("train.weights bf16 cannot be combined with lora: frozen weights are in bf16 anyway")
        if self.lora.rank and self.parallel.tensor > 1:
            raise ValueError(
                f"parallel.tensor is {self.parallel.tensor}, but an adapter's matrices are not split; with lora set "
                "parallel.tensor=1 and use replicate, shard or sequence"
            )
        smallest = min(self.model.model_dim, self.model.glu_dim)
        if self.lora.rank > smallest:
            raise ValueError(
                f"lora.rank is {self.lora.rank}, more than the {smallest} channels of the narrowest projection; lower it"
            )
        if self.model.position == "ape" and self.data.seq_len > self.model.max_position:
            raise ValueError(
                f"data.seq_len is {self.data.seq_len}, but model.position ape has {self.model.max_position} positions; "
                "lower it or raise model.max_position"
            )
        weighted = self.data.path is not None and len(self.data.path) > 1 and any(s.weight for s in self.data.path)
        epochs = {"train.max_epochs": train.max_epochs, "schedule.horizon_epochs": self.schedule.horizon_epochs}
        for key, value in epochs.items():
            why = "data.path has weights: some sources end before others" if weighted else ""
            if self.data.stream_gb is not None:
                why = (
                    f"data.stream_gb is {self.data.stream_gb:g}: the data is read in chunks, and its size is not known"
                )
            if value is not None and why:
                steps = key.replace("epochs", "steps")
                raise ValueError(f"{key} is {value:g}, but {why}, so there are no passes; set {steps} in its place")
        if self.data.format == "chat" and self.data.packing != "reset":
            raise ValueError(
                "data.packing concat cannot be combined with data.format chat: conversations must stay separate"
            )
        return self

    @model_validator(mode="after")
    def _check_mesh(self) -> Self:
        if self.world_size > 2**20:
            raise ValueError(
                f"the parallel section asks for {self.world_size} ranks; a plan is made for up to a million"
            )
        if self.parallel.tensor > 1 and self.model.qk_norm:
            raise ValueError(
                f"parallel.tensor is {self.parallel.tensor}, but every head shares the weights of model.qk_norm; "
                "set parallel.tensor=1 or model.qk_norm=false"
            )
        for key in ("num_heads", "glu_dim", "vocab_size"):
            size, value = self.parallel.tensor, getattr(self.model, key)
            if value % size:
                raise ValueError(f"parallel.tensor is {size}; it must divide model.{key} {value}")
        if self.parallel.sequence > 1 and self.model.kind == "transformer":
            raise ValueError(
                f"parallel.sequence is {self.parallel.sequence}, but softmax attention has no state to pass on; "
                "set parallel.sequence=1 for model.kind transformer"
            )
        if self.data.seq_len % self.parallel.sequence:
            raise ValueError(
                f"parallel.sequence is {self.parallel.sequence}; it must divide data.seq_len {self.data.seq_len}"
            )
        return self

    @cached_property
    def init_folder(self) -> Path | None:
        """The weights folder behind train.init (None: new weights). Raises UserError if there is none."""
        return None if self.train.init is None else _find_weights(self.train.init)

    @property
    def data_ranks(self) -> int:
        """Ranks that read different rows: replicate * shard."""
        return self.parallel.replicate * self.parallel.shard

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of the mesh's axes."""
        return self.data_ranks * self.parallel.sequence * self.parallel.tensor

    @property
    def global_batch_rows(self) -> int:
        """Rows of an optimizer step over all ranks."""
        return self.train.global_batch_tokens // self.data.seq_len

    @property
    def accumulation_steps(self) -> int:
        """Forward passes of one rank in an optimizer step."""
        return self.global_batch_rows // (self.train.micro_batch_size * self.data_ranks)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: the smaller of `max_steps` and `max_tokens`, rounded up.

        With only `max_epochs` they are known once the data is; see `with_epochs`.
        """
        limits = self.train.limits()
        if not limits:
            raise UserError(
                f"train.max_epochs is {self.train.max_epochs:g}, and how many steps that is depends on the data; set "
                "train.max_steps or train.max_tokens here"
            )
        return min(limits.values())

    def with_epochs(self, rows: float) -> "RunConfig":
        """This config with `max_steps` and the schedule's horizon from its epochs, where the data has `rows` rows.

        Raises UserError if the warm-up does not fit into them.
        """
        train, schedule, epoch_steps = self.train, self.schedule, rows / self.global_batch_rows
        if train.max_epochs is not None:
            limits = train.limits(epoch_steps)
            steps = min(limits[key] for key in ("max_steps", "max_epochs") if key in limits)
            train = train.model_copy(update={"max_steps": steps})
        if schedule.horizon_epochs is not None:
            horizon = _steps(schedule.horizon_epochs, epoch_steps)
            horizon = min(horizon, schedule.horizon_steps or horizon)
            warmup = _default_warmup(horizon) if schedule.warmup_steps is None else schedule.warmup_steps
            schedule = schedule.model_copy(update={"horizon_steps": horizon, "warmup_steps": warmup})
        try:
            sections = {name: getattr(self, name) for name in RunConfig.model_fields}
            return RunConfig.model_validate({**sections, "train": train, "schedule": schedule})
        except ValidationError as error:
            raise recipe.explain(FORMAT, error, {}, f"{rows:.0f} rows of data") from None

    def to_yaml(self, doc: bool = False) -> str:
        """Every key with its value, `load_recipe` of which gives an equal config; with `doc`, what each means."""
        return "# Every key of this run; `tnllm train` reads it like any recipe.\n" + recipe.to_yaml(FORMAT, self, doc)


def _default_warmup(horizon: int) -> int:
    return min(100, horizon // 10)


PRESET_DOC = f"Where the model section starts; keys beside it override it. One of {', '.join(PRESETS)}."
FORMAT = recipe.Format(
    RunConfig,
    sections="model: and train:",
    setting="train.max_steps=100",
    extra={"model.preset": PRESET_DOC},
    restarts={"model": "preset"},
)


def describe_keys() -> dict[str, str]:
    """Every dotted key of a recipe and what it means, in order."""
    return recipe.describe_keys(FORMAT)


def load_recipe(name: str, sets: Sequence[str] = ()) -> RunConfig:
    """Read the recipe `name` (a path, or the name of a packaged one) with `sets` (`"section.key=value"`) on top.

    Raises UserError, one line with the key and the file and line it came from, for anything wrong.
    """
    values, origins = recipe.read_recipe(FORMAT, name)
    own_train = values.get("train", {})
    values, origins = recipe.apply_sets(FORMAT, values, origins, sets)
    init = values.get("train", {}).get("init")
    model = _resolve_model(values.get("model", {}), origins, init)
    try:
        # The recipe's own length, not the one from --set: max_steps must not change the learning rate. A length that --set
        # takes away is not the recipe's any more.
        train = TrainSection.model_validate(values.get("train", {}))
        kept = [key for key in ("max_steps", "max_tokens", "max_epochs") if getattr(train, key) is not None]
        own = {key: own_train[key] for key in kept if own_train.get(key) is not None}
        batch = {"global_batch_tokens": train.global_batch_tokens}
        ends = TrainSection.model_validate({**own, **batch}) if own else train
        schedule = dict(values.get("schedule", {}))
        if schedule.get("horizon_steps") is None and schedule.get("horizon_epochs") is None:
            schedule["horizon_steps"] = min(ends.limits().values(), default=None)
            schedule["horizon_epochs"] = ends.max_epochs
        found = ScheduleSection.model_validate(schedule)
        if found.horizon_steps is not None and found.horizon_epochs is None and found.warmup_steps is None:
            schedule["warmup_steps"] = _default_warmup(found.horizon_steps)
        return RunConfig.model_validate({**values, "model": model, "schedule": schedule})
    except ValidationError as error:
        raise recipe.explain(FORMAT, error, origins, name) from None


def most_rows(rows: int, most: int) -> int:
    """The largest micro-batch of at most `most` rows that divides `rows`."""
    return next(size for size in range(min(rows, most), 0, -1) if rows % size == 0)


def fit_rows(name: str, sets: Sequence[str] = ()) -> list[str]:
    """`--set` items that make `name` load on its mesh: a smaller micro-batch, if a step has too few rows for all ranks."""
    values, _ = recipe.apply_sets(FORMAT, *recipe.read_recipe(FORMAT, name), sets)
    try:
        data = DataSection.model_validate(values.get("data", {}))
        train = TrainSection.model_validate(values.get("train", {}))
        mesh = ParallelSection.model_validate(values.get("parallel", {}))
    except ValidationError:
        return []  # load_recipe reports what is wrong
    rows, left = divmod(train.global_batch_tokens, data.seq_len * mesh.replicate * mesh.shard)
    if left or rows % train.micro_batch_size == 0:
        return []
    return [f"train.micro_batch_size={most_rows(rows, train.micro_batch_size)}"]


def _resolve_model(keys: dict[str, Any], origins: dict[str, str], init: Any) -> ModelConfig:
    overrides = dict(keys)
    start = None if init is None else _initial_model(str(init), origins)
    if start is not None and not overrides:
        return start
    preset = overrides.pop("preset", "385m")
    try:
        model = get_preset(str(preset), **overrides)
    except UserError as error:
        key = str(error).split()[0].rstrip(":")
        raise UserError(f"{error}{recipe.origin_of(key, origins)}") from None
    if start is not None and model != start:
        ours, theirs = model.model_dump(), start.model_dump()
        key = next(key for key in ours if ours[key] != theirs[key])
        raise UserError(
            f"model.{key} is {ours[key]!r}, but the weights of train.init {init} have {theirs[key]!r}; remove the model "
            f"section, which comes from the weights{recipe.origin_of('train.init', origins)}"
        )
    return model


def _find_weights(init: str) -> Path:
    from tnllm.modeling.weights import resolve_model

    return resolve_model(None if init == PACKAGED else init)


def _initial_model(init: str, origins: dict[str, str]) -> ModelConfig:
    """The config of the weights a run starts from."""
    from tnllm.modeling.weights import read_config

    try:
        return read_config(_find_weights(init))[0]
    except (UserError, OSError) as error:
        raise UserError(f"train.init: {error}{recipe.origin_of('train.init', origins)}") from None
