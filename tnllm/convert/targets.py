"""The files beside the weights of the result, for each target format: configs, tokenizer, model code, model card.

    files, copies, notes = folder_files(source, path, plan, tokenizer=None)

`files` maps names to text, `copies` names to files to copy, `notes` are lines for people.
"""

import json
from pathlib import Path
from typing import Any

import torch

from tnllm.convert import hf_folder, llama
from tnllm.convert.card import model_card
from tnllm.convert.fast_tokenizer import tokenizer_files
from tnllm.convert.official import to_official_config
from tnllm.convert.plan import Plan
from tnllm.convert.quantize import Int8Quantizer
from tnllm.convert.source import Source
from tnllm.files import format_count, read_json
from tnllm.modeling.weights import CONFIG, GENERATION, GENERATION_DEFAULTS, TOKENIZER, config_json, trained_length
from tnllm.tokenizer import TIKTOKEN_SUFFIX, Tokenizer

# Other kinds of tokenizers (the released ablations use GPT-2's) are copied into Hugging Face folders.
_OTHER_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")


def folder_files(
    source: Source, path: Path, plan: Plan, tokenizer: Path | None, licence: str | None = None
) -> tuple[dict[str, str], dict[str, Path], list[str]]:
    """Return files, copies and notes. `path` is what the user gave: a run folder there puts its figures on the card.
    `licence` of the weights goes on it too.

    Raises UserError for a file that is not a tokenizer, or not this model's.
    """
    own = (source.folder / TOKENIZER).is_file() or len([*source.folder.glob(f"*{TIKTOKEN_SUFFIX}")]) == 1
    loaded = Tokenizer.load(tokenizer or source.folder) if tokenizer or own else None
    notes = []
    copies: dict[str, Path] = {}
    if loaded is None:
        notes.append(
            f"{source.folder} has no {TOKENIZER} and no *{TIKTOKEN_SUFFIX}; the result has none either (see --tokenizer)"
        )
    else:
        tiktoken = loaded.path.suffix == TIKTOKEN_SUFFIX
        copies[f"transnormer_100k{TIKTOKEN_SUFFIX}" if tiktoken else TOKENIZER] = loaded.path
        loaded.check_vocabulary(source.config.vocab_size)
    generation = _generation_config(source, loaded)
    files = {GENERATION: hf_folder.json_text(generation)}
    if plan.to == "tnllm":
        files[CONFIG] = config_json(source.config, torch.int8 if plan.quantizer is not None else plan.dtype)
    elif plan.to == "official":
        files[CONFIG] = hf_folder.json_text(to_official_config(source.config, generation, plan.dtype))
        notes.append(
            "the released Python files are not part of this package: put them beside the weights to load those with them"
        )
    else:
        kind = ""  # of tokenizer
        own_code = source.config.kind == "transnormer"
        if loaded is not None:
            fast_files, tokenizer_notes = tokenizer_files(loaded, generation, own_code)
            files.update(fast_files)
            notes += tokenizer_notes
            kind = "tokenizer.json" if fast_files else TOKENIZER
        elif tokenizer is None:
            others = {name: source.folder / name for name in _OTHER_TOKENIZERS if (source.folder / name).is_file()}
            copies.update(others)
            kind = "tokenizer.json" if others else ""
        if own_code:
            values = hf_folder.config_values(source.config, plan.dtype, generation)
            if isinstance(plan.quantizer, Int8Quantizer):
                values["quantization_config"] = plan.quantizer.config_values()
            files.update(hf_folder.code_files())
        else:
            length = trained_length(source.folder) or source.config.max_position
            values = llama.config_values(source.config, plan.dtype, generation, length)
        files[CONFIG] = hf_folder.json_text(values)
        quantized = plan.quantizer is not None
        files["README.md"] = model_card(source, plan.dtype, _run_facts(path, source), kind, quantized, licence)
        files[GENERATION] = hf_folder.json_text(hf_folder.generation_values(generation))
    return files, copies, notes


def _generation_config(source: Source, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The source's generation_config.json, or the defaults with the ids of its tokenizer."""
    own = {key: value for key, value in source.generation.items() if key != "transformers_version"}
    if not own:
        own = dict(GENERATION_DEFAULTS)
        if tokenizer is not None:
            own.update(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    # In the released layout config.json says whether texts start with the begin token.
    config = read_json(source.folder / CONFIG)
    if source.kind == "official" and config.get("add_bos_token") and "add_bos_token" not in own:
        own["add_bos_token"] = True
    return own


def _run_facts(path: Path, source: Source) -> dict[str, str]:
    """Rows of the model card about the training run, if the weights are in a run folder."""
    runs = (path, *list(source.folder.resolve().parents)[:2])
    metrics = next((file for run in runs if (file := run / "metrics.jsonl").is_file()), None)
    last: dict[str, Any] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics else ():
        try:
            last.update(json.loads(line))
        except ValueError:
            continue  # a line that a killed process left incomplete
    rows = {}
    if "tokens" in last:
        rows["training tokens"] = f"{format_count(last['tokens'])} in {last.get('step', '?')} steps"
    for key, label in (("loss", "last training loss (nats per token)"), ("val_loss", "validation loss (nats per token)"),
                       ("val_bpb", "validation bits per byte")):  # fmt: skip
        if isinstance(last.get(key), int | float):
            rows[label] = f"{last[key]:.4f}"
    return rows
