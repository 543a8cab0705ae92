"""The config of a run: frozen pydantic models, read from a recipe.

config = load_recipe("385m", ["train.max_steps=20", "model.kind=transformer"])
config.model                   # tnllm.modeling.config.ModelConfig, the preset and its overrides resolved
config.schedule.horizon_steps  # never None once loaded
config.to_yaml()               # every key; load_recipe of that text is equal to config

Precedence: defaults here < the recipe's `base` < the recipe < `--set`. Sizes may be written 5000, 0.5M or 300B.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from tnllm import recipe
from tnllm.errors import UserError
from tnllm.modeling.config import PRESETS, LoraConfig, ModelConfig, get_preset
from tnllm.recipe import Section
from tnllm.training.sections import (
    PACKAGED,
    CheckpointSection,
    DataSection,
    EvalSection,
    LogSection,
    OptimizerSection,
    ParallelSection,
    ScheduleSection,
    TokenizerSection,
    TrainSection,
    steps_of,
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
        unit = self.data.seq_len * train.micro_batch_size * self.parallel.data_ranks
        if train.global_batch_tokens % unit:
            below = train.global_batch_tokens // unit * unit
            near = f"{below} or {below + unit}" if below else f"{unit}"
            rows = train.global_batch_tokens // self.data.seq_len // self.parallel.data_ranks
            if rows and train.global_batch_tokens % (self.data.seq_len * self.parallel.data_ranks) == 0:
                near += f"; or set train.micro_batch_size={most_rows(rows, train.micro_batch_size)}"
            raise ValueError(
                f"train.global_batch_tokens is {train.global_batch_tokens}; it must be a multiple of {unit} = "
                f"data.seq_len {self.data.seq_len} * train.micro_batch_size {train.micro_batch_size} * "
                f"{self.parallel.data_ranks} data ranks, such as {near}"
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
        if train.weights == "bf16" and (train.dtype == "fp32" or self.parallel.num_ranks > 1):
            reason = "train.dtype fp32" if train.dtype == "fp32" else f"{self.parallel.num_ranks} ranks"
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
        if self.parallel.num_ranks > 2**20:
            raise ValueError(
                f"the parallel section asks for {self.parallel.num_ranks} ranks; a plan is made for up to a million"
            )
        if self.parallel.tensor > 1 and self.model.qk_norm:
            raise ValueError(
                f"parallel.tensor is {self.parallel.tensor}, but every head shares the weights of model.qk_norm; "
                "set parallel.tensor=1 or model.qk_norm=false"
            )
        for key in ("num_heads", "glu_dim", "vocab_size"):
            size, value = self.parallel.tensor, getattr(self.model, key)
            if value % size:
                hint = f"; raise it to {value + size - value % size}" if key == "vocab_size" else ""
                raise ValueError(f"parallel.tensor is {size}; it must divide model.{key} {value}{hint}")
        if self.parallel.sequence > 1 and self.model.num_softmax:
            raise ValueError(
                f"parallel.sequence is {self.parallel.sequence}, but softmax attention has no state to pass on; "
                "set parallel.sequence=1 for model.kind transformer and model.softmax_every"
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
    def prompt_template(self) -> str:
        """The text around a prompt: data.chat_template, else that of the weights of train.init, else the default."""
        from tnllm.training.run_model import chat_template

        return chat_template(self.data.chat_template, self.init_folder)

    @property
    def global_batch_rows(self) -> int:
        """Rows of an optimizer step over all ranks."""
        return self.train.global_batch_tokens // self.data.seq_len

    @property
    def accumulation_steps(self) -> int:
        """Forward passes of one rank in an optimizer step."""
        return self.global_batch_rows // (self.train.micro_batch_size * self.parallel.data_ranks)

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
            horizon = steps_of(schedule.horizon_epochs, epoch_steps)
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
    overrides, start = dict(keys), None
    if init is not None:
        from tnllm.modeling.weights import read_config

        try:
            start = read_config(_find_weights(str(init)))[0]
        except (UserError, OSError) as error:
            raise UserError(f"train.init: {error}{recipe.origin_of('train.init', origins)}") from None
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
