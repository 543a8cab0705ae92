"""Recipes: precedence, sizes, round trips, and the one line a person sees for each kind of mistake."""

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tnllm.errors import UserError
from tnllm.modeling.config import get_preset
from tnllm.recipe import describe_keys, dump_yaml, find_recipe, parse_yaml, read_header
from tnllm.training.config import FORMAT, RunConfig, fit_rows, load_recipe

SMALL = "model:\n  preset: tiny\ndata:\n  seq_len: 64\ntrain:\n  max_steps: 200\n  global_batch_tokens: 512\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def fails(path: Path | str, *sets: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), list(sets))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_recipe_over_defaults_and_set_over_both(recipe: Path) -> None:
    config = load_recipe(str(recipe), ["train.seed=7", "model.num_layers=2", "optimizer.betas=[0.8, 0.9]"])
    assert config.model == get_preset("tiny", num_layers=2)
    assert (config.train.seed, config.train.max_steps, config.optimizer.betas) == (7, 200, (0.8, 0.9))
    assert config.optimizer.weight_decay == 0.1


def test_base_is_beneath_the_recipe(recipe: Path) -> None:
    above = recipe.parent / "above.yaml"
    above.write_text("base: small\ntrain:\n  max_steps: 10\nmodel:\n  kind: transformer\n")
    config = load_recipe(str(above))
    assert (config.train.max_steps, config.data.seq_len, config.model.kind) == (10, 64, "transformer")
    # Naming a preset starts the model section afresh.
    assert load_recipe(str(above), ["model.preset=demo"]).model == get_preset("demo")


def test_base_is_read_one_level_deep(recipe: Path) -> None:
    (recipe.parent / "a.yaml").write_text("base: small\n")
    (recipe.parent / "b.yaml").write_text("base: a\n")
    message = fails(recipe.parent / "b.yaml")
    assert message.startswith("base: a has a base itself") and message.endswith("b.yaml:1)")
    (recipe.parent / "c.yaml").write_text("base: nowhere\n")
    assert fails(recipe.parent / "c.yaml").startswith("no recipe nowhere")


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@example(seed=0, rate=1e-9, rows=1, prompts=["0E0", "08", "1_0", "-.5", "null", "\x85"], kind="cosine")
@given(
    seed=st.integers(0, 2**40),
    rate=st.floats(1e-9, 1.0),
    rows=st.integers(1, 8),
    prompts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=3),
    kind=st.sampled_from(["cosine", "wsd", "constant"]),
)
def test_resolved_yaml_round_trip_is_exact(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rate: float, rows: int, prompts: list[str], kind: str
) -> None:
    folder = tmp_path_factory.mktemp("round")
    path, resolved = folder / "r.yaml", folder / "config.resolved.yaml"
    sections = {
        "model": {"preset": "tiny"},
        "optimizer": {"learning_rate": rate},
        "schedule": {"kind": kind, "warmup_steps": 1},
        "train": {"seed": seed, "max_steps": 5, "micro_batch_size": rows, "global_batch_tokens": rows * 2048},
        "eval": {"sample_prompts": prompts},
        "data": {"path": [{"path": "a b", "weight": rate}, {"path": "c: d"}]},
    }
    path.write_text(dump_yaml(sections), encoding="utf-8")
    config = load_recipe(str(path))
    for doc in (False, True):
        resolved.write_text(config.to_yaml(doc=doc), encoding="utf-8")
        assert load_recipe(str(resolved)) == config
    assert config.eval.sample_prompts == tuple(prompts)


def test_resolved_text_is_plain_yaml_too() -> None:
    config = load_recipe("demo")
    assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_sizes_in_words(recipe: Path) -> None:
    config = load_recipe(str(recipe), ["train.max_tokens=300B", "train.max_steps=0.5M", "data.seq_len=1K",
                                       "train.global_batch_tokens=8K"])  # fmt: skip
    assert (config.train.max_tokens, config.train.max_steps) == (300_000_000_000, 500_000)
    assert config.total_steps == 500_000
    assert load_recipe(str(recipe), ["train.max_tokens=1000"]).total_steps == 2  # 512 a step, rounded up


def test_lengths_on_the_command_line_do_not_move_the_schedule(recipe: Path) -> None:
    for sets in ([], ["train.max_steps=20"], ["train.max_steps=900"], ["train.max_tokens=5120"]):
        assert load_recipe(str(recipe), sets).schedule.horizon_steps == 200
    assert load_recipe(str(recipe), ["schedule.horizon_steps=120"]).schedule.horizon_steps == 120
    by_tokens = recipe.parent / "tokens.yaml"
    by_tokens.write_text(SMALL.replace("max_steps: 200", "max_tokens: 102400"))
    assert load_recipe(str(by_tokens), ["train.max_steps=3"]).schedule.horizon_steps == 200


def test_epochs_are_steps_once_the_data_is_known(recipe: Path) -> None:
    """64 tokens a row and 512 a step: 100 rows are 12.5 steps."""
    by_epochs = recipe.parent / "epochs.yaml"
    by_epochs.write_text(SMALL.replace("max_steps: 200", "max_epochs: 20"))
    config = load_recipe(str(by_epochs))
    assert (config.schedule.horizon_steps, config.schedule.horizon_epochs, config.schedule.warmup_steps) == (
        None,
        20,
        None,
    )
    with pytest.raises(UserError, match=r"train\.max_epochs is 20, and how many steps that is depends on the data"):
        _ = config.total_steps
    known = config.with_epochs(100)
    assert (known.total_steps, known.schedule.horizon_steps, known.schedule.warmup_steps) == (250, 250, 25)
    assert known.with_epochs(100) == known
    # What is written is read as the same run, whose data may still grow.
    by_epochs.write_text(known.to_yaml())
    assert load_recipe(str(by_epochs)) == known
    assert config.with_epochs(1).total_steps == 3  # 2.5 steps, rounded up
    assert (
        load_recipe(str(by_epochs), ["train.max_steps=null", "train.max_epochs=1e-3"]).with_epochs(100).total_steps == 1
    )


@pytest.mark.parametrize(
    ("own", "sets", "total", "horizon"),
    [
        # Of 100 rows: 12.5 steps a pass. The recipe's own length decides the schedule, as with max_steps.
        ("max_epochs: 8", ["train.max_steps=30"], 30, 100),
        ("max_epochs: 8", ["train.max_epochs=16"], 200, 100),
        ("max_epochs: 8\n  max_steps: 60", [], 60, 60),
        ("max_epochs: 8\n  max_tokens: 1M", [], 100, 100),
        ("max_steps: 60", ["train.max_epochs=8"], 60, 60),
        ("max_steps: 60", ["train.max_epochs=2"], 25, 60),
        # Taken away, it is not the recipe's length any more.
        ("max_steps: 60", ["train.max_epochs=8", "train.max_steps=null"], 100, 100),
        ("max_steps: 60", ["train.max_epochs=8", "schedule.horizon_steps=50"], 60, 50),
        ("max_steps: 60", ["schedule.horizon_epochs=2"], 60, 25),
        ("max_steps: 60", ["schedule.horizon_epochs=2", "schedule.horizon_steps=20"], 60, 20),
    ],
)
def test_epochs_beside_other_lengths(recipe: Path, own: str, sets: list[str], total: int, horizon: int) -> None:
    recipe.write_text(SMALL.replace("max_steps: 200", own))
    config = load_recipe(str(recipe), sets).with_epochs(100)
    assert (config.total_steps, config.schedule.horizon_steps) == (total, horizon)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["train.max_epochs=0"], "train.max_epochs is 0: input should be greater than 0 (--set)"),
        (["train.max_epochs=-1"], "train.max_epochs is -1: input should be greater than 0 (--set)"),
        (["train.max_epochs=1e9"], "train.max_epochs is 1000000000.0: input should be less than or equal to 1000000"),
        (["train.max_epochs=true"], "train.max_epochs is True: expected a number (--set)"),
        (["train.max_time=true"], "train.max_time is True: expected a number (--set)"),
        (["optimizer.learning_rate=true"], "optimizer.learning_rate is True: expected a number (--set)"),
        (
            ["train.max_time=5K"],
            "train.max_time is '5K': expected a number of seconds, or a time such as 30m or 11h30m (",
        ),
        (["train.max_epochs=two"], "train.max_epochs is 'two': expected a number (--set)"),
        (
            ["train.max_epochs=2", "data.path=[{path: a, weight: 2}, b]"],
            "train.max_epochs is 2, but data.path has weights: some sources end before others",
        ),
        (
            ["schedule.horizon_epochs=2", "data.path=[{path: a, weight: 2}, b]"],
            "schedule.horizon_epochs is 2, but data.path has weights: some sources end before others",
        ),
        (
            ["train.max_epochs=2", "data.stream_gb=5"],
            "train.max_epochs is 2, but data.stream_gb is 5: the data is read in",
        ),
    ],
)
def test_lengths_that_are_refused(recipe: Path, sets: list[str], message: str) -> None:
    assert fails(recipe, *sets).startswith(message)


def test_a_schedule_must_fit_into_the_epochs(recipe: Path) -> None:
    recipe.write_text(SMALL.replace("max_steps: 200", "max_epochs: 1") + "schedule:\n  warmup_steps: 50\n")
    with pytest.raises(
        UserError, match=r"warmup_steps is 50, and schedule.horizon_steps 13 leaves .*\(100 rows of data\)"
    ):
        load_recipe(str(recipe)).with_epochs(100)


def test_scalars_follow_yaml_1_2() -> None:
    text = "a: 1e-4\nb: on\nc: no\nd: 1:30\ne: 0o7\nf: 10_000\ng: true\nh: ~\ni: 'true'\nj: 2026-01-02\nk: .5\nl: -3"
    values, lines = parse_yaml(text)
    assert values == {
        "a": 1e-4, "b": "on", "c": "no", "d": "1:30", "e": "0o7", "f": 10_000, "g": True, "h": None, "i": "true",
        "j": "2026-01-02", "k": 0.5, "l": -3,
    }  # fmt: skip
    assert lines["l"] == 12


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:13"])
def test_devices(recipe: Path, name: str) -> None:
    assert load_recipe(str(recipe), [f"train.device={name}"]).train.device == name


@pytest.mark.parametrize(("written", "meant"), [("on", "on"), ("off", "off"), ("true", "on"), ("false", "off")])
def test_switches(recipe: Path, written: str, meant: str) -> None:
    assert load_recipe(str(recipe), [f"train.compile={written}"]).train.compile == meant


def test_data_path_forms(recipe: Path) -> None:
    def paths(value: str) -> list[tuple[str, float | None]]:
        sources = load_recipe(str(recipe), [f"data.path={value}"]).data.path
        assert sources is not None
        return [(source.path, source.weight) for source in sources]

    assert load_recipe(str(recipe)).data.path is None
    assert paths("corpus") == [("corpus", None)]
    assert paths("[a, b]") == [("a", None), ("b", None)]
    assert paths("[{path: a, weight: 2}, b]") == [("a", 2.0), ("b", None)]


@pytest.mark.parametrize(
    ("given_set", "message"),
    [
        (
            "optimizer.learningrate=1",
            "optimizer.learningrate: no such key; did you mean 'optimizer.learning_rate'? (--set)",
        ),
        ("max_steps=3", "max_steps: no such key; did you mean 'train.max_steps'? (--set)"),
        ("train.warmup_steps=3", "train.warmup_steps: no such key; did you mean 'schedule.warmup_steps'? (--set)"),
        ("trian.seed=3", "trian: no such key; did you mean 'train'? (--set)"),
        ("model.num_layer=3", "model.num_layer: no such key; did you mean 'model.num_layers'? (--set)"),
        ("model.preset=385", "model.preset is '385'; allowed: "),
        (
            "train.max_steps=many",
            "train.max_steps is 'many': expected a whole number such as 5000, 10K, 0.5M or 300B (--set)",
        ),
        ("train.seed=true", "train.seed is True: expected a whole number such as"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate is 'fast': expected a number (--set)"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate is 'inf': input should be a finite number (--set)"),
        ("log.tensorboard=maybe", "log.tensorboard is 'maybe': expected true or false (--set)"),
        ("tokenizer.path=3", "tokenizer.path is 3: expected a string (quote it) (--set)"),
        ("train.dtype=fp16", "train.dtype is 'fp16': input should be 'auto', 'fp32' or 'bf16' (--set)"),
        ("train.device=tpu", "train.device is 'tpu': expected auto, cpu, cuda or cuda:N (--set)"),
        ("train.device=cuda:x", "train.device is 'cuda:x': expected auto, cpu, cuda or cuda:N (--set)"),
        ("data.path=[]", "data.path is []: expected more items (--set)"),
        ("train.max_steps={", "--set train.max_steps:1: not YAML: "),
        ("lora=null", "--set is 'lora=null', and lora is a section: set one of its keys, such as lora.rank=0"),
        ("train", "--set is 'train', and train is a section: set one of its keys, such as train.seed=0"),
        ("train.max_steps", "--set is 'train.max_steps'; write section.key=value, such as train.max_steps=100"),
        ("train.max_steps=null", "the run has no end; set train.max_steps, train.max_tokens or train.max_epochs ("),
        (
            "schedule.warmup_steps=300",
            "schedule.warmup_steps is 300, and schedule.horizon_steps 200 leaves room for 199 with",
        ),
        ("schedule.decay_steps=5", "schedule.decay_steps belongs to schedule.kind wsd, not cosine; remove it ("),
        ("parallel.tensor=3", "parallel.tensor is 3; it must divide model.num_heads 2 ("),
        ("parallel.sequence=3", "parallel.sequence is 3; it must divide data.seq_len 64 ("),
    ],
)
def test_one_clear_line(recipe: Path, given_set: str, message: str) -> None:
    assert fails(recipe, given_set).startswith(message)


def test_batch_that_does_not_divide_names_its_neighbours(recipe: Path) -> None:
    message = fails(recipe, "train.global_batch_tokens=0.001M", "parallel.shard=2", "train.micro_batch_size=2")
    assert message.startswith(
        "train.global_batch_tokens is 1000; it must be a multiple of 256 = data.seq_len 64 * "
        "train.micro_batch_size 2 * 2 data ranks, such as 768 or 1024 ("
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  max_steps: 5\n  seeed: 1\n", "train.seeed: no such key; did you mean 'train.seed'? ({path}:3)"),
        ("train:\n  max_steps: x\n", "train.max_steps is 'x': expected a whole number such as 5000, 10K, 0.5M or "
         "300B ({path}:2)"),
        ("train:\n  max_steps: 5\n  max_steps: 6\n", "{path}:3: train.max_steps is given twice"),
        ("train:\n  max_steps: [5\n", "{path}:3: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("train:\n\tmax_steps: 5\n", "{path}:2: not YAML: found character '\\t' that cannot start any token"),
        ("train: &a\n  seed: *a\n", "{path}:2: aliases (*name) and tags (!name) are not read; write the value out"),
        ("train:\n  seed: !!python/name:os.system\n", "{path}:2: aliases (*name) and tags"),
        ("train:\n  max_steps: 5\n---\n", "{path}:3: not YAML: but found another document"),
        ("train: 5\n", "train is 5; expected a section of keys ({path}:1)"),
        ("- train\n", "{path}: expected sections such as model: and train:, found list"),
        ("", "{path}: expected sections such as model: and train:, found nothing"),
        ("model:\n  preset: tiny\n  num_heads: 3\n", "model: model_dim 128 must be a multiple of num_heads 3"),
    ],
)  # fmt: skip
def test_one_clear_line_with_file_and_line(recipe: Path, text: str, message: str) -> None:
    recipe.write_text(text)
    assert fails(recipe).startswith(message.format(path=recipe))


def test_not_utf8(recipe: Path) -> None:
    recipe.write_bytes(b"# caf\xe9\n")
    assert fails(recipe) == f"{recipe}: not UTF-8 text (byte 5); save it as UTF-8"


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("385m").name == "385m.yaml"
    assert fails("386m").endswith("did you mean '385m'?")
    assert find_recipe("recipes/385m.yaml").name == "385m.yaml"
    (tmp_path / "385m").mkdir()  # a run folder of that name does not hide the recipe
    assert find_recipe("385m").name == "385m.yaml"


def test_header(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("# One thing.\n# More.\n# Hardware: a GPU,\n# or two\n# Loss: 3.1\ntrain:\n# no: header\n")
    assert read_header(path) == {"about": "One thing. More.", "hardware": "a GPU, or two", "loss": "3.1"}


def test_every_key_is_documented() -> None:
    assert [key for key, text in describe_keys(FORMAT).items() if not text] == []


def test_batch_arithmetic() -> None:
    config = load_recipe("15b")
    assert (config.parallel.num_ranks, config.global_batch_rows, config.accumulation_steps) == (104, 624, 1)


def test_rows_are_fitted_to_a_mesh():
    sets = ["parallel.shard=16"]
    with pytest.raises(UserError, match=r"multiple of 4194304 .* or set train.micro_batch_size=8"):
        load_recipe("7b", sets)
    assert fit_rows("7b", sets) == ["train.micro_batch_size=8"]
    assert load_recipe("7b", [*sets, *fit_rows("7b", sets)]).parallel.num_ranks == 128
    assert fit_rows("7b") == fit_rows("7b", ["parallel.shard=3"]) == []
