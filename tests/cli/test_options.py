"""Values of options as people type them, and one clear error for each mistake."""

import json

import pytest

from tnllm.cli import options
from tnllm.errors import UserError


def test_lengths_are_lists_or_doublings():
    assert options.length("64k", "--seqlen") == 65536 and options.length("1M", "--seqlen") == 1 << 20
    assert options.lengths("100, 2k", "--seqlens") == [100, 2048]
    assert options.lengths("1k:8k", "--seqlens") == [1024, 2048, 4096, 8192]
    assert options.lengths("3:10", "--seqlens") == [3, 6]
    assert options.lengths("5:5", "--seqlens") == [5]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: options.length("0", "--tokens"), "--tokens has '0'; write tokens such as 1000"),
        (lambda: options.lengths("8k:1k", "--seqlens"), "the first length must not exceed the second"),
        (lambda: options.counts("1,0", "--gpus", "1,2"), "--gpus is '1,0'; write numbers with commas, such as 1,2"),
        (lambda: options.check_choice("--dtype", "fp8", ("bf16", "fp32")), "--dtype is 'fp8'; allowed: bf16, fp32"),
        (lambda: options.choices("a,c", "--kinds", ("a", "b")), "--kinds has 'c'; allowed: a, b"),
    ],
)
def test_mistakes_name_the_option_and_what_is_allowed(check, message):
    with pytest.raises(UserError) as error:
        check()
    assert message in str(error.value)


def test_a_choice_that_is_not_given_passes():
    options.check_choice("--dtype", None, ("bf16",))
    assert options.counts(" 1, 4", "--gpus", "1,2") == [1, 4] and options.choices("b, a", "--kinds", ("a", "b"))


def test_only_files_that_are_given_are_written(tmp_path, capsys):
    def write(results, path):
        path.write_text(json.dumps(results))

    options.write_outputs({"a": 1}, (tmp_path / "r.json", write), (None, write))
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}
    assert capsys.readouterr().err == f"wrote {tmp_path / 'r.json'}\n"
