import pytest

from tnllm.cleaning.recipe import describe, load_clean_recipe
from tnllm.cleaning.settings import CleanSettings
from tnllm.errors import UserError


def test_defaults_and_the_packaged_recipe():
    assert load_clean_recipe(None) == CleanSettings()
    sample = load_clean_recipe("data/sample")
    assert sample == load_clean_recipe("sample") and sample.input.path == ("dirty-sample",)
    assert sample.rules.limits("zh")["length"] == (40, 200_000) and sample.rules.limits("en")["length"] == (50, 100_000)
    assert load_clean_recipe("data/sample", ["dedup.threshold=0.5", "input.path=a.txt"]).input.path == ("a.txt",)


def test_one_figure_can_be_set():
    settings = load_clean_recipe("data/sample", ["rules.zh.end_marks=[null, null]"])
    assert settings.rules.zh == {"length": (40, 200_000), "end_marks": (None, None)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dedup:\n  treshold: 0.5\n", r"dedup.treshold: no such key; did you mean 'dedup.threshold'\? \(.*r.yaml:2\)"),
        ("dedupe:\n  x: 1\n", r"dedupe: no such key; did you mean 'dedup'\?"),
        ("dedup:\n  threshold: 2\n", r"dedup.threshold is 2: input should be less than or equal to 1 \(.*:2\)"),
        ("rules:\n  en:\n    lenght: [1, 2]\n", r"rules.en is .*no figure 'lenght'; did you mean 'length'\?"),
        ("- 1\n", "expected sections such as input: and dedup:, found list"),
        ("dedup: {\n", "not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_clean_recipe(str(tmp_path / "r.yaml"))


def test_unknown_recipe_and_set():
    with pytest.raises(UserError, match=r"no cleaning recipe data/sampel: .*did you mean 'data/sample'\?"):
        load_clean_recipe("data/sampel")
    with pytest.raises(UserError, match=r"^threshold: no such key; did you mean 'dedup.threshold'\? \(--set\)$"):
        load_clean_recipe(None, ["threshold=1"])
    with pytest.raises(UserError, match="such as dedup"):
        load_clean_recipe(None, ["dedup.threshold"])


def test_described_keys_are_a_recipe(tmp_path):
    (tmp_path / "all.yaml").write_text(describe())
    assert load_clean_recipe(str(tmp_path / "all.yaml")) == CleanSettings()


def test_a_base_is_beneath_the_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("base: data/sample\ndedup:\n  threshold: 0.6\n")
    settings = load_clean_recipe(str(tmp_path / "r.yaml"))
    assert settings == load_clean_recipe("data/sample", ["dedup.threshold=0.6"])


def test_an_empty_recipe_means_the_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text("# nothing yet\n")
    assert load_clean_recipe(str(tmp_path / "r.yaml")) == CleanSettings()
