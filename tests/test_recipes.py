"""Every recipe that ships loads, says what it is, and would start."""

import pytest

from tests.training.sections import memory_of
from tnllm import recipe
from tnllm.errors import UserError
from tnllm.files import format_count
from tnllm.modeling.flops import count_parameters
from tnllm.recipe import packaged_recipes, read_header
from tnllm.training.config import load_recipe
from tnllm.training.dry_run import check_recipe

NAMES = [path.stem for path in packaged_recipes()]
# Trained parameters: the released checkpoints', and for 13b and 65b the papers' vocabulary.
PARAMETERS = {
    "385m": 398_984_192,
    "1b": 1_020_266_496,
    "1b-v2": 1_020_266_496,
    "3b": 2_911_111_680,
    "7b": 6_836_719_616,
    "7b-v2": 6_836_719_616,
    "15b": 14_833_382_400,
}


def test_all_sizes_are_there() -> None:
    assert set(NAMES) >= {"tiny", "demo", "13b", "65b", "175b", "transformer-385m", *PARAMETERS}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_would_start(name: str) -> None:
    report = check_recipe(name)
    assert report.parameters == PARAMETERS.get(name, report.parameters)
    header = read_header(next(path for path in packaged_recipes() if path.stem == name))
    assert header["about"] and header["hardware"] and header["loss"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("tiny", "tiny-transformer", "demo", "sft")])
def test_large_recipes_fit_their_hardware(name: str) -> None:
    config = load_recipe(name)
    header = read_header(next(path for path in packaged_recipes() if path.stem == name))
    ranks = config.parallel.num_ranks
    assert header["hardware"].startswith(f"{ranks} GPUs" if ranks > 1 else "one GPU")
    assert memory_of(config).total < 0.92 * 80 * 2**30


@pytest.mark.parametrize(("name", "baseline"), [("tiny", "tiny-transformer"), ("385m", "transformer-385m")])
def test_baselines_match_in_size_and_differ_in_the_model_alone(name: str, baseline: str) -> None:
    ours, theirs = load_recipe(name), load_recipe(baseline)
    assert theirs.model.kind == "transformer"
    assert abs(count_parameters(theirs.model) / count_parameters(ours.model) - 1) < 0.01
    assert ours.model_dump(exclude={"model"}) == theirs.model_dump(exclude={"model"})


def test_a_checkout_s_path_to_a_recipe_works_anywhere(tmp_path, monkeypatch, capsys) -> None:
    """README's `tnllm train recipes/385m.yaml` after pip install; a file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    recipe._log_packaged.cache_clear()
    assert load_recipe("recipes/385m.yaml") == load_recipe("recipes/385m.yaml") == load_recipe("385m")
    assert capsys.readouterr().err.count("using the recipe of that name that ships with tnllm") == 1
    for missing in ("recipes/386m.yaml", "mine/385m.yaml", "recipes/../recipes/tiny.yaml2"):
        with pytest.raises(UserError, match="no such file"):
            load_recipe(missing)
    (tmp_path / "recipes").mkdir()
    with pytest.raises(UserError, match="no recipe recipes: that is a folder"):
        load_recipe("recipes")
    (tmp_path / "recipes" / "385m.yaml").write_text("base: tiny\n")
    assert load_recipe("recipes/385m.yaml").model == load_recipe("tiny").model


def test_demo_is_small_enough_to_ship() -> None:
    parameters = count_parameters(load_recipe("demo").model)
    assert 10e6 < parameters < 12e6, format_count(parameters)
    assert 2 * parameters < 25e6
