"""A context is the same however the text was cut, whatever was read beside it, and after a trip through a file."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tests.small_models import small_model
from tnllm.errors import UserError
from tnllm.generation.context import load_context, read, save_context, weights_hash

# Cutting a text elsewhere, or packing it beside others, changes only the order of fp32 sums. Logits have a standard
# deviation of about 3; the largest difference seen over 600 random splits was 4e-5.
ATOL = 1e-4


def ids(length, seed=0):
    return torch.randint(3, 340, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def same(a, b, atol=ATOL):
    assert a.num_tokens == b.num_tokens
    assert a.tail == b.tail
    assert a.seen.equal(b.seen)
    torch.testing.assert_close(a.logits, b.logits, atol=atol, rtol=0)
    for x, y in zip(a.state.layers, b.state.layers, strict=True):
        torch.testing.assert_close(x, y, atol=atol * max(1.0, y.abs().max().item()), rtol=0)


@pytest.mark.slow
@given(st.integers(1, 90), st.integers(1, 100))
@settings(deadline=None, max_examples=25)
def test_any_chunk_size_reads_the_same(model, length, chunk_tokens):
    [whole] = read(model, [ids(length)])
    [chunked] = read(model, [ids(length)], chunk_tokens=chunk_tokens)
    same(chunked, whole)
    assert whole.num_tokens == length


@pytest.mark.slow
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 50))
@settings(deadline=None, max_examples=25)
def test_unequal_prompts_read_as_if_alone(model, lengths, chunk_tokens):
    prompts = [ids(length, seed) for seed, length in enumerate(lengths)]
    for prompt, together in zip(prompts, read(model, prompts, chunk_tokens=chunk_tokens), strict=True):
        same(together, read(model, [prompt])[0])


@given(st.integers(1, 40), st.integers(0, 40))
@settings(deadline=None, max_examples=20)
def test_reading_on_equals_reading_at_once(model, first, second):
    text = ids(first + second)
    [context] = read(model, [text[:first]])
    [longer] = read(model, [text[first:]], [context])
    same(longer, read(model, [text])[0])


def test_contexts_are_values(model):
    [book] = read(model, [ids(30)])
    before = [layer.clone() for layer in book.state.layers], book.logits.clone(), book.seen.clone()
    first, second = read(model, [ids(5, 1), ids(9, 2)], [book, book])
    assert (first.num_tokens, second.num_tokens, book.num_tokens) == (35, 39, 30)
    for layer, old in zip(book.state.layers, before[0], strict=True):
        assert layer.equal(old)
    assert book.logits.equal(before[1])
    assert book.seen.equal(before[2])
    same(first, read(model, [ids(30) + ids(5, 1)])[0])


def test_next_logits_are_those_of_the_full_forward(model):
    text = ids(50)
    [context] = read(model, [text], chunk_tokens=7)
    full = model(torch.tensor([text]))[0][0, -1]
    torch.testing.assert_close(context.logits[0], full, atol=ATOL, rtol=0)


def test_reading_needs_memory_for_one_chunk(model, monkeypatch):
    lengths = []
    hidden = type(model).hidden

    def spy(self, tokens, *rest):
        lengths.append(tokens.shape[1])
        return hidden(self, tokens, *rest)

    monkeypatch.setattr(type(model), "hidden", spy)
    read(model, [ids(100), ids(1), ids(60)], chunk_tokens=32)
    assert max(lengths) == 32
    assert sum(lengths) == 161
    assert len(lengths) == 6


def test_a_token_the_model_does_not_have(model):
    with pytest.raises(UserError, match="token id 352 is outside the model's vocabulary of 352"):
        read(model, [[3, 352]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same(tmp_path, dtype):
    model = small_model(dtype)
    [context] = read(model, [ids(40)])
    weights = weights_hash(model)
    save_context(tmp_path / "a.state", context, weights)
    loaded = load_context(tmp_path / "a.state", model, weights)
    same(loaded, context, atol=0)
    same(read(model, [ids(9)], [loaded])[0], read(model, [ids(9)], [context])[0], atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]


def test_the_hash_tells_weights_configs_and_dtypes_apart():
    hashes = [
        weights_hash(small_model()),
        weights_hash(small_model(torch.bfloat16)),
        weights_hash(small_model(gate="none")),
    ]
    changed = small_model()
    changed.layers[2].channel_mixer.l3.weight[3, 5] += 1e-3
    hashes.append(weights_hash(changed))
    assert len(set(hashes)) == 4
    assert weights_hash(small_model()) == hashes[0]


def test_states_of_other_models_and_other_files_are_refused(tmp_path, model):
    [context] = read(model, [ids(5)])
    path = tmp_path / "a.state"
    save_context(path, context, "0123456789abcdef")
    with pytest.raises(UserError, match=r"written with other weights \(0123456789ab, here fedcba987654\).*--model"):
        load_context(path, model, "fedcba9876543210")
    with pytest.raises(UserError, match=r"does not exist; write one with --state-out"):
        load_context(tmp_path / "b.state", model, "")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="is not a state file"):
        load_context(tmp_path / "weights.safetensors", model, "")
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(UserError, match="damaged"):
        load_context(tmp_path / "text", model, "")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged"):
        load_context(path, model, "0123456789abcdef")


def edited(path, change):
    """Rewrite a state file after `change(tensors, metadata)`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t, m: t.pop("layers.1"), r"lacks tensors of this model or holds others \(layers.1\)"),
        (lambda t, m: t.update(extra=torch.zeros(1)), r"holds others \(extra\)"),
        (lambda t, m: t.update(position=torch.tensor([-1])), "its position is -1, not the number of tokens"),
        (lambda t, m: (t.update(position=torch.tensor([-1])), m.update(num_tokens="-1")), "its position is -1;"),
        (lambda t, m: t.update(position=torch.tensor([5.0])), r"position is torch.float32 \[1\], not torch.int64"),
        (lambda t, m: t.update(position=torch.tensor([5, 5])), r"position is torch.int64 \[2\]"),
        (lambda t, m: t.update(logits=t["logits"][:, :9].clone()), r"logits is torch.float32 \[1, 9\], not"),
        (lambda t, m: t.update({"layers.0": t["layers.0"].half()}), r"layers.0 is torch.float16"),
        (lambda t, m: t.update({"layers.0": t["layers.0"][:, :1].clone()}), r"layers.0 is torch.float32 \[1, 1,"),
        (lambda t, m: t["layers.0"].view(-1)[3:4].fill_(float("nan")), "numbers that no model writes"),
        (lambda t, m: t["seen"].fill_(7), "numbers that no model writes"),
        (lambda t, m: t["layers.0"].view(-1)[3:4].add_(1), "do not match their digest"),
        (lambda t, m: m.pop("tail"), "KeyError"),
        (lambda t, m: m.update(tail="[1, 352]"), "hold 352, which is not in the vocabulary of 352"),
        (lambda t, m: m.update(tail="[-1]"), "hold -1"),
        (lambda t, m: m.update(tail="[true]"), "hold True"),
        (lambda t, m: m.update(tail="{}"), "not a short list"),
        (lambda t, m: m.update(tail="[1"), "JSONDecodeError"),
        (lambda t, m: m.update(tail="[" * 100_000), "RecursionError"),
    ],
)
def test_a_damaged_state_is_refused_in_one_line(tmp_path, model, change, fault):
    [context] = read(model, [ids(5)])
    path = tmp_path / "a.state"
    save_context(path, context, "0123456789abcdef")
    edited(path, lambda tensors, metadata: None)
    same(load_context(path, model, "0123456789abcdef"), context, atol=0)
    edited(path, change)
    with pytest.raises(UserError, match=rf"a.state is damaged.*{fault}.*write it again") as error:
        load_context(path, model, "0123456789abcdef")
    assert "\n" not in str(error.value)


def test_a_key_value_cache_of_another_length_is_refused(tmp_path):
    model = small_model(kind="transformer")
    [context] = read(model, [ids(9)])
    path = tmp_path / "a.state"
    save_context(path, context, "x")
    same(load_context(path, model, "x"), context, atol=0)
    edited(path, lambda tensors, _: tensors.update({"layers.0": tensors["layers.0"][:, :, :2].clone()}))
    with pytest.raises(UserError, match=r"layers.0 is torch.float32 \[1, 2, 2, .*, not torch.float32 \[1, 2, "):
        load_context(path, model, "x")


def test_a_state_file_without_the_hash_of_its_model_is_not_one(tmp_path, model):
    [context] = read(model, [ids(5)])
    save_context(tmp_path / "a", context, "x")
    edited(tmp_path / "a", lambda _, metadata: metadata.pop("weights"))
    with pytest.raises(UserError, match="is not a state file this version can read"):
        load_context(tmp_path / "a", model, "x")
    with pytest.raises(UserError, match="is not a file"):
        load_context(tmp_path, model, "x")
