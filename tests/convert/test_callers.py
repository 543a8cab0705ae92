"""The exported model as its callers use it: it does what it is asked to do, or says by name what it does not do.

`python -m tests.convert.versions` runs this file with the oldest and the newest transformers that are claimed.
"""

import inspect
import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from tnllm.convert import hf_folder
from tnllm.modeling.config import ModelConfig, get_preset
from tnllm.modeling.hf_names import from_hf_config, to_hf_config
from tnllm.modeling.model import build_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

CONFIG = get_preset("tiny", vocab_size=97, model_dim=32, num_heads=2, num_layers=3, glu_dim=48)
GREEDY = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}


def sharpen(model: nn.Module) -> nn.Module:
    """Larger weights than initial ones, so that errors show; `pad` keeps its zero row."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


both = pytest.mark.parametrize("model", [{}, {"softmax_every": 2}], ids=["linear", "hybrid"], indirect=True)


@pytest.fixture
def model(hf_code, request):
    """Linear attention alone, or what a test decorated with `both` changes."""
    config = CONFIG.model_copy(update=getattr(request, "param", {}))
    return sharpen(hf_code.TnllmForCausalLM(hf_code.TnllmConfig(**to_hf_config(config))))


def text(*shape: int) -> torch.Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


# --- the loss


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    """One batch of rows of several lengths, padded on the right."""
    tokens, labels = ([torch.tensor(row[key]) for row in rows] for key in ("input_ids", "labels"))
    stack = lambda values, fill: nn.utils.rnn.pad_sequence(values, True, fill)  # noqa: E731
    mask = stack([torch.ones_like(row) for row in tokens], 0)
    return {"input_ids": stack(tokens, 0), "labels": stack(labels, -100), "attention_mask": mask}


@both
def test_trainer_learns_the_same_however_it_is_asked(model, tmp_path):
    """Two steps on four texts: at once, accumulated, padding-free, with recomputed activations."""
    # Older versions restart position_ids only.
    has_offsets = "return_flash_attn_kwargs" in inspect.signature(DataCollatorWithFlattening.__init__).parameters
    flattened = DataCollatorWithFlattening(**{"return_flash_attn_kwargs": True} if has_offsets else {})
    ways = {
        "at once": (4, 1, padded, {}),
        "accumulated": (1, 4, padded, {}),
        "padding-free": (4, 1, DataCollatorWithFlattening(), {}),
        "padding-free with offsets": (2, 2, flattened, {}),
        "recomputed": (2, 2, padded, {"gradient_checkpointing": True}),
        "recomputed, reentrant": (
            4, 1, flattened, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        ),
    }  # fmt: skip
    texts = [text(1, length)[0].tolist() for length in (5, 9, 3, 12)]
    # No text predicts its first token, but transformers 4.51 counts its label, and only where rows are padded.
    labels = [[-100, *(token if token > 20 else -100 for token in ids[1:])] for ids in texts]
    rows = [{"input_ids": ids, "labels": learned} for ids, learned in zip(texts, labels, strict=True)]
    begun = {name: value.clone() for name, value in model.state_dict().items()}
    results = {}
    for way, (batch, steps, collator, more) in ways.items():
        model.load_state_dict(begun)
        model.gradient_checkpointing_disable()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=2,
            learning_rate=0.1, optim="sgd", max_grad_norm=0, lr_scheduler_type="constant", report_to=[], use_cpu=True,
            save_strategy="no", logging_steps=1, disable_tqdm=True, **more,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        results[way] = losses, [parameter.detach().clone() for parameter in model.parameters()]
    losses, weights = results["at once"]
    for way, (others, changed) in results.items():
        assert others == pytest.approx(losses, abs=1e-3), way
        close(changed, weights)


def test_trainer_evaluates_predicts_and_smooths_labels(model, tmp_path):
    tokens = text(4, 12)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, per_device_train_batch_size=4, max_steps=1, learning_rate=0,
        label_smoothing_factor=0.1, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    with torch.no_grad():
        output = model(tokens, labels=tokens)
    scores = output.logits[:, :-1].log_softmax(-1)
    smooth = nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), label_smoothing=0.1)
    trainer.train()
    logged = next(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(float(smooth), abs=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(smooth), abs=1e-3)
    trainer.label_smoother = None
    counts = []
    count = model.register_forward_pre_hook(
        lambda _, args, given: counts.append(given.get("num_items_in_batch")), with_kwargs=True
    )
    predicted = trainer.predict(rows)
    count.remove()
    # The Trainer of transformers 5.0 divides here too, and by all labels: two rows of 12, where 11 of each are predicted.
    divided = 1 if counts[-1] is None else 2 * 11 / int(counts[-1])
    assert predicted.metrics["test_loss"] == pytest.approx(float(output.loss) * divided, abs=1e-3)
    close(torch.from_numpy(predicted.predictions), output.logits)


def test_every_argument_of_the_loss(model):
    tokens = text(2, 9)
    labels = tokens.masked_fill(tokens < 20, -100)
    with torch.no_grad():
        full = model(tokens, labels=labels)
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        count = int((shifted != -100).sum())
        close(full.loss, nn.functional.cross_entropy(full.logits.flatten(0, 1), shifted.flatten()))
        close(model(tokens, labels=labels, num_items_in_batch=2 * count).loss, full.loss / 2)
        close(model(tokens, shift_labels=shifted).loss, full.loss)
        kept = model(tokens, labels=labels, logits_to_keep=2)
        close(kept.loss, full.loss)
        close(kept.logits, full.logits[:, -2:])
        close(model(tokens, logits_to_keep=torch.tensor([0, 3])).logits, full.logits[:, [0, 3]])
        for count in (None, 2, torch.tensor(2), np.int64(2)):
            close(model(tokens, logits_to_keep=count).logits, full.logits[:, slice(-int(count or 0), None)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_loss(model, side):
    """Where the padding is on the left, its last column would predict the row's first token from nothing."""
    rows, length = [text(1, n)[0] for n in (4, 9, 6)], 9
    pads = [(length - len(row), 0) if side == "left" else (0, length - len(row)) for row in rows]
    tokens = torch.stack([nn.functional.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])
    labels = tokens.masked_fill(mask == 0, -100)
    with torch.no_grad():
        total = sum(model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows)
        count = sum(len(row) - 1 for row in rows)
        close(model(tokens, attention_mask=mask, labels=labels).loss, total / count)
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        for given in ({"labels": labels}, {"shift_labels": shifted}):
            close(model(tokens, attention_mask=mask.bool(), num_items_in_batch=7, **given).loss, total / 7)


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_attentions": True},
        {"encoder_hidden_states": torch.ones(2, 3, 32)},
        {"token_type_ids": torch.zeros(2, 4, dtype=torch.int64)},
        {"head_mask": [1]},
        {"num_logits_to_keep": 1},
        {"lables": torch.ones(2, 4)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_it_does_not_take_is_refused_by_name(model, arguments):
    with pytest.raises(TypeError, match=f"TnllmModel does not take {next(iter(arguments))}"):
        model(text(2, 4), **arguments)
    # A value that asks for nothing is accepted.
    model(text(2, 4), **dict.fromkeys(arguments))


def test_switches_of_the_config(model):
    tokens = text(1, 4)
    model.config.output_hidden_states = True
    assert len(model(tokens).hidden_states) == CONFIG.num_layers + 1
    assert model(tokens, output_hidden_states=False).hidden_states is None
    model.config.use_cache = False
    assert len(model(tokens).to_tuple()) == 2
    model.config.return_dict = False
    assert isinstance(model(tokens), tuple) and isinstance(model.model(tokens), tuple)
    assert not isinstance(model(tokens, return_dict=True), tuple)


def test_config_json_has_the_common_names(hf_code, tmp_path):
    config = hf_code.TnllmConfig(**to_hf_config(CONFIG))
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    names = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    assert {name: values[name] for name in names} == names
    assert ModelConfig(**from_hf_config(values)) == CONFIG
    exported = hf_folder.config_values(CONFIG, torch.float32, {})
    assert {name: exported[name] for name in names} == names
    alone = {key: value for key, value in values.items() if key not in config.attribute_map.values()}
    assert hf_code.TnllmConfig(**alone).model_dim == 32
    with pytest.raises(ValueError, match="hidden_size is 64 but model_dim is 32"):
        hf_code.TnllmConfig(**{**values, "hidden_size": 64})


# --- rows


def test_layers_see_the_batch(model):
    """Padding does not change the shape: adapters of single rows and hooks rely on it."""
    seen = []
    for layer in (model.model.layers[1], model.model.layers[1].channel_mixer.l1):
        layer.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    model(text(2, 4), attention_mask=mask)
    assert seen == [(2, 4, 32)] * 2


ENDS = [5, 71, 90]
OFFSETS = torch.tensor([0, *ENDS], dtype=torch.int32)
RESTARTS = torch.cat([torch.arange(b - a) for a, b in zip([0, *ENDS], ENDS, strict=False)])[None]
TEXTS = torch.searchsorted(torch.tensor(ENDS), torch.arange(90), right=True)[None]


@both
@pytest.mark.parametrize(
    "said",
    [
        {"position_ids": RESTARTS},
        {"position_ids": RESTARTS, "cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 66},
        {"cu_seq_lens_q": OFFSETS},
        {"seq_idx": TEXTS},
        {"position_ids": RESTARTS, "seq_idx": TEXTS.to(torch.int32), "attention_mask": torch.ones(1, 90)},
    ],
    ids=lambda said: "+".join(said),
)  # fmt: skip
def test_packed_texts_do_not_see_each_other(model, said):
    tokens = text(1, 90)
    with torch.no_grad():
        packed = model(tokens, **said, use_cache=True)
        for a, b in zip([0, *ENDS], ENDS, strict=False):
            alone = model(tokens[:, a:b], use_cache=True)
            close(packed.logits[:, a:b], alone.logits)
        # The state goes on from the last text.
        close(packed.past_key_values.layers[0], alone.past_key_values.layers[0])
        assert packed.past_key_values.position.tolist() == [19]


@both
def test_packed_rows_of_a_padded_batch(model):
    """Texts of 3 and 4 tokens behind padding, and of 5 and 2 before it; their gradients are those of the texts alone."""
    tokens = text(2, 8)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])
    positions = torch.tensor([[0, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 0]])
    packed = model(tokens, attention_mask=mask, position_ids=positions).logits
    texts = [(0, 1, 4), (0, 4, 8), (1, 0, 5), (1, 5, 7)]
    sum(packed[row, a:b].square().sum() for row, a, b in texts).backward()
    packed_grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for row, a, b in texts:
        alone = model(tokens[row : row + 1, a:b]).logits[0]
        close(packed[row, a:b], alone)
        alone.square().sum().backward()
    for grad, parameter in zip(packed_grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, atol=1e-3, rtol=1e-4)


@both
@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        ([0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 2]),
        ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 1, 2]),
        ([1, 1, 1, 0, 0, 0], [0, 1, 2, 0, 0, 0]),
        ([1, 1, 1, 0, 0, 0], [0, 1, 2, 1, 1, 1]),
        ([1, 0, 1, 0, 0, 1], [0, 7, 1, 0, 9, 2]),
    ],
)
def test_positions_that_generate_passes(model, mask, positions):
    tokens, mask, positions = text(1, 6), torch.tensor([mask]), torch.tensor([positions])
    with torch.no_grad():
        close(
            model(tokens, attention_mask=mask, position_ids=positions).logits[mask.bool()],
            model(tokens[mask.bool()][None]).logits[0],
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"position_ids": torch.tensor([[0, 1, 3, 4]])},
            r"position_ids\[0, 2\] is 3; it must be 2, which continues, or 0",
        ),
        ({"position_ids": torch.tensor([[2, 3, 4, 5]])}, r"position_ids\[0, 0\] is 2; it must be 0"),
        ({"position_ids": torch.tensor([[0, 1]])}, r"position_ids must be \[1, 4\]; got \[1, 2\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 2])}, r"must rise from 0 to 4; got \[0, 2\]"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 2, 4])},
            "disagree about where texts",
        ),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]]), "cu_seq_lens_q": torch.tensor([0, 4])}, "disagree"),
        ({"attention_mask": torch.tensor([[1, 1, 2, 2]])}, "must be 0 at padding and 1 elsewhere"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, r"attention_mask must end in \[1, 4\]"),
        ({"cache_position": torch.tensor([3, 4, 5, 6])}, "cache_position must be 0 to 3"),
        (
            {"past_key_values": DynamicCache()},
            "past_key_values is a DynamicCache, but this model has a recurrent state",
        ),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "the input is empty"),
        ({"input_ids": torch.ones(4, dtype=torch.int64)}, r"input_ids must be \[B, T\] .* got \[4\]"),
        ({"attention_mask": {"full_attention": None}}, r"attention_mask must end in \[1, 4\]; got dict"),
        ({"position_ids": torch.tensor([[1, 2, 3, 4]])}, r"\[0, 0\] is 1; it must be 0, where a text begins"),
        ({"logits_to_keep": -1}, "logits_to_keep is -1; give the number"),
    ],
    ids=str,
)
def test_rows_that_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": text(1, 4), **arguments})


@both
def test_one_column_with_a_state(model):
    tokens = text(1, 6)
    with torch.no_grad():
        whole = model(tokens).logits
        for positions in (None, torch.tensor([[5]])):
            state = model(tokens[:, :5], use_cache=True).past_key_values
            close(model(tokens[:, 5:], past_key_values=state, position_ids=positions).logits, whole[:, 5:])
        state = model(tokens[:, :5], use_cache=True).past_key_values
        begun = model(tokens[:, 5:], past_key_values=state, position_ids=torch.tensor([[0]]))
        close(begun.logits, model(tokens[:, 5:]).logits)
        with pytest.raises(ValueError, match="it must be 1, which continues, or 0"):
            model(tokens[:, 5:], past_key_values=begun.past_key_values, position_ids=torch.tensor([[7]]))
        with pytest.raises(ValueError, match="past_key_values is of 1 rows, the input has 2"):
            model(text(2, 3), past_key_values=begun.past_key_values)


# --- generate


@both
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_pads_either_side(model, side, use_cache):
    rows = [text(1, length)[0] for length in (3, 7, 1, 5)]
    filled = [(0, 7 - len(row)) if side == "right" else (7 - len(row), 0) for row in rows]
    tokens = torch.stack([nn.functional.pad(row, pads) for row, pads in zip(rows, filled, strict=True)])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), pads) for row, pads in zip(rows, filled, strict=True)])
    texts = model.generate(tokens, attention_mask=mask, use_cache=use_cache, **GREEDY)[:, 7:]
    for row, written in zip(rows, texts, strict=True):
        assert torch.equal(model.generate(row[None], **GREEDY)[0, len(row) :], written)


def test_generate_with_an_empty_prompt(model):
    with pytest.raises(ValueError, match="the prompt is empty; give at least one token, such as the begin token 1"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), **GREEDY)
    with pytest.raises(ValueError, match="row 1 of the batch is empty"):
        model.generate(text(2, 3), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]), **GREEDY)
    # Without a prompt transformers begins with the begin token itself.
    assert torch.equal(model.generate(**GREEDY), model.generate(torch.tensor([[1]]), **GREEDY))


@both
def test_generate_goes_on_from_a_state(model):
    tokens = text(2, 4)
    whole = model.generate(tokens, **{**GREEDY, "max_new_tokens": 6})
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    padded = model.generate(tokens, attention_mask=mask, **{**GREEDY, "max_new_tokens": 6})
    for attention_mask, expected in ((None, whole), (mask, padded)):
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        begun = model.generate(tokens, **given, **{**GREEDY, "max_new_tokens": 3}, return_dict_in_generate=True)
        if given:
            given = {"attention_mask": nn.functional.pad(attention_mask, (0, 3), value=1)}
        more = model.generate(
            begun.sequences, past_key_values=begun.past_key_values, **given, **{**GREEDY, "max_new_tokens": 3}
        )
        assert torch.equal(more, expected)
    with pytest.raises(ValueError, match=r"recurrent state|does not support an instance of `Cache`"):
        model.generate(tokens, past_key_values=DynamicCache(), **GREEDY)


@both
def test_generate_goes_on_from_longer_embeddings(model):
    tokens = text(1, 4)
    embed = model.get_input_embeddings()
    whole = model.generate(tokens, **GREEDY)[:, 4:]
    settings = {**GREEDY, "return_dict_in_generate": True}
    begun = model.generate(inputs_embeds=embed(tokens), **{**settings, "max_new_tokens": 2})
    assert torch.equal(begun.sequences, whole[:, :2])
    longer = embed(torch.cat([tokens, begun.sequences], 1))
    more = model.generate(
        inputs_embeds=longer, past_key_values=begun.past_key_values, **{**settings, "max_new_tokens": 3}
    )
    assert torch.equal(more.sequences, whole[:, 2:])
    assert torch.equal(model.generate(inputs_embeds=embed(tokens), use_cache=False, **GREEDY), whole)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"repetition_penalty": 1.5}], ids=str)
def test_generate_with_embeddings_and_their_ids(model, more):
    tokens = text(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    for given in ({}, {"attention_mask": mask}):
        settings = {**GREEDY, **more, **given}
        both = model.generate(tokens, inputs_embeds=model.get_input_embeddings()(tokens), **settings)
        assert torch.equal(both, model.generate(tokens, **settings))


def test_generate_returns_hidden_states(model):
    output = model.generate(text(1, 4), output_hidden_states=True, return_dict_in_generate=True, **GREEDY)
    assert [len(step) for step in output.hidden_states] == [CONFIG.num_layers + 1] * 5
    assert [step[0].shape[1] for step in output.hidden_states] == [4, 1, 1, 1, 1]


def test_generate_with_a_tuned_prompt(model):
    """PEFT's virtual tokens are in the state, but not in the mask that its callers give."""
    peft = pytest.importorskip("peft")
    tokens, mask = text(2, 4), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    prompt = tuned.get_prompt(batch_size=2).detach()
    written = tuned.generate(input_ids=tokens, attention_mask=mask, **GREEDY)[:, 4:]
    base = tuned.get_base_model()
    embeds = torch.cat([prompt, base.get_input_embeddings()(tokens)], 1)
    longer = torch.cat([torch.ones(2, 3, dtype=torch.int64), mask], 1)
    assert torch.equal(written, base.generate(inputs_embeds=embeds, attention_mask=longer, **GREEDY))


# --- torch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model"),
    [("plain", {}), ("padded", {}), ("packed", {}), ("packed", {"softmax_every": 2})],
    indirect=["model"],
)
def test_compile_makes_one_graph(model, kind):
    tokens = text(2, 70)
    said = {
        "plain": {},
        "padded": {"attention_mask": torch.ones(2, 70).index_fill(1, torch.tensor([0, 1, 66, 69]), 0)},
        "packed": {"position_ids": torch.cat([torch.arange(66), torch.arange(4)]).expand(2, -1)},
    }[kind]
    with torch.no_grad():
        eager = model(tokens, **said, use_cache=True)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        traced = compiled(tokens, **said, use_cache=True)
        close(traced.logits, eager.logits)
        last = text(2, 1)
        close(
            compiled(last, past_key_values=traced.past_key_values).logits,
            model(last, past_key_values=eager.past_key_values).logits,
        )


@pytest.mark.slow
@both
def test_export_of_any_batch_and_length(model):
    """One graph for every batch and length, down to one token, with padding and packed texts and without."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask", "position_ids", "labels")}

    def inputs(rows: int, columns: int) -> dict[str, torch.Tensor]:
        tokens, mask = text(rows, columns), torch.ones(rows, columns, dtype=torch.int64)
        mask[0, : columns // 3] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        positions[-1, columns - columns // 4 :] = torch.arange(columns // 4)
        return dict(zip(shapes, (tokens, mask, positions, tokens), strict=True))

    for names in (["input_ids"], list(shapes)):
        given = {name: inputs(3, 70)[name] for name in names}
        dynamic = {**{name: shapes[name] for name in names}, "use_cache": None}
        program = torch.export.export(model, (), {**given, "use_cache": True}, dynamic_shapes=dynamic)
        for rows, columns in ((1, 1), (1, 64), (5, 65), (2, 200)):
            given = {name: inputs(rows, columns)[name] for name in names}
            with torch.no_grad():
                found, expected = (run(**given, use_cache=True) for run in (program.module(), model))
            close(found.logits, expected.logits)
            # A state sums up to 200 products, some of which cancel.
            torch.testing.assert_close(
                found.past_key_values.layers, expected.past_key_values.layers, atol=1e-4, rtol=1e-4
            )
            assert "labels" not in names or columns == 1 or found.loss.isclose(expected.loss, rtol=1e-4)


@both
def test_recomputed_activations_change_no_gradient(model):
    tokens = text(2, 9)
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    model.train()
    model(tokens, attention_mask=mask, labels=tokens).loss.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    calls = []
    model.model.layers[0].channel_mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(tokens, attention_mask=mask, labels=tokens).loss.backward()
    assert len(calls) == 2
    for grad, parameter in zip(wanted, model.parameters(), strict=True):
        close(parameter.grad, grad)


def test_two_folders_in_one_process(hf_code, model, tmp_path):
    for name, source in hf_folder.code_files().items():
        (tmp_path / name).write_text(source)
    with hf_folder.imported_code(tmp_path) as other:
        twin = other.TnllmForCausalLM(other.TnllmConfig(**to_hf_config(CONFIG)))
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(twin(text(1, 5)).logits, model(text(1, 5)).logits)


# --- classification


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_classifier_pools_at_the_last_token(hf_code, side, with_mask):
    config = hf_code.TnllmConfig(**to_hf_config(CONFIG), num_labels=3)
    model = sharpen(hf_code.TnllmForSequenceClassification(config))
    rows = [text(1, length)[0] for length in (3, 7, 1)]
    tokens = torch.stack(
        [nn.functional.pad(row, (0, 7 - len(row)) if side == "right" else (7 - len(row), 0)) for row in rows]
    )
    given = {"attention_mask": (tokens != 0).long()} if with_mask else {}
    with torch.no_grad():
        output = model(tokens, labels=torch.tensor([0, 2, 1]), **given)
        alone = torch.cat([model(row[None]).logits for row in rows])
    assert output.logits.shape == (3, 3)
    close(output.logits, alone)
    close(output.loss, nn.functional.cross_entropy(alone, torch.tensor([0, 2, 1])))


def test_classifier_trains_under_peft(hf_code, tmp_path):
    peft = pytest.importorskip("peft")
    config = hf_code.TnllmConfig(**to_hf_config(CONFIG), num_labels=2)
    model = hf_code.TnllmForSequenceClassification(config)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["qkvu_proj", "out_proj"])
    tuned = peft.get_peft_model(model, settings)
    tokens = text(8, 6)
    labels = tokens[:, -1] % 2
    mask = torch.ones_like(tokens).index_put((torch.tensor([0, 1]), torch.tensor([0, 0])), torch.tensor(0))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(30):
        loss = tuned(input_ids=tokens, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(hf_code.TnllmForSequenceClassification(config), tmp_path)
    assert transformers.__version__ and any("score" in name for name in peft.get_peft_model_state_dict(again))


# --- weights


def test_our_weights_are_its_weights(hf_code):
    ours = build_model(CONFIG, seed=0)
    theirs = hf_code.TnllmForCausalLM(hf_code.TnllmConfig(**to_hf_config(CONFIG)))
    names = {f"model.{name}" for name in ours.state_dict()}
    assert names == set(theirs.state_dict()) - {"lm_head.weight"}
    # The decays are not among the files, and no cast rounds them.
    half = theirs.to(torch.bfloat16)
    decays = [block.token_mixer.log_decay for block in ours.blocks]
    assert all(torch.equal(block.token_mixer.log_decay, a) for block, a in zip(half.model.layers, decays, strict=True))
