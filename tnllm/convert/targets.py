"""The files of a result beside its weights, for each kind of folder.

    files, copies, notes = folder_files(source, named, plan, tokenizer=None)

`files` maps names to text, `copies` names to files that are copied, `notes` are for people.
"""

import json
from pathlib import Path
from typing import Any

from tnllm.convert import hub
from tnllm.convert.fast_tokenizer import tokenizer_files
from tnllm.convert.official import to_official_config
from tnllm.convert.plan import Plan
from tnllm.convert.source import Source, read_json
from tnllm.files import format_count
from tnllm.modeling.weights import CONFIG, GENERATION, GENERATION_DEFAULTS, TOKENIZER, config_json
from tnllm.tokenizer import TIKTOKEN_SUFFIX, Tokenizer

# Tokenizers of other kinds (the released ablations have GPT-2's): copied where a Hugging Face folder is made.
_OTHER_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")


def folder_files(
    source: Source, named: Path, plan: Plan, tokenizer: Path | None
) -> tuple[dict[str, str], dict[str, Path], list[str]]:
    """Configs, tokenizer, code and card of the result. Raises UserError for a tokenizer that is none."""
    found = tokenizer or _find_tokenizer(source.folder)
    loaded = Tokenizer.load(found) if found is not None else None
    notes = []
    copies: dict[str, Path] = {}
    if loaded is None:
        notes.append(
            f"{source.folder} has no {TOKENIZER} and no *{TIKTOKEN_SUFFIX}; the result has none either (see --tokenizer)"
        )
    else:
        copies[f"transnormer_100k{TIKTOKEN_SUFFIX}" if loaded.path.suffix == TIKTOKEN_SUFFIX else TOKENIZER] = (
            loaded.path
        )
        loaded.check_vocabulary(source.config.vocab_size)
    settings = _settings(source, loaded)
    files = {GENERATION: hub.json_text(settings)}
    if plan.to == "tnllm":
        files[CONFIG] = config_json(source.config, plan.dtype)
    elif plan.to == "official":
        files[CONFIG] = hub.json_text(to_official_config(source.config, settings, plan.dtype))
        notes.append(
            "the released Python files are not part of this package: put them beside the weights to load them there"
        )
    else:
        values = hub.config_values(source.config, plan.dtype, settings)
        if plan.quantizer is not None:
            values["quantization_config"] = plan.quantizer.config_values()
        files[CONFIG] = hub.json_text(values)
        files[GENERATION] = hub.json_text(hub.generation_values(settings))
        files.update(hub.code_files())
        files["README.md"] = hub.model_card(source, plan.dtype, _facts(named, source), plan.quantizer is not None)
        if loaded is not None:
            more, tokenizer_notes = tokenizer_files(loaded, settings)
            files.update(more)
            notes += tokenizer_notes
        elif tokenizer is None:
            copies.update(
                {name: source.folder / name for name in _OTHER_TOKENIZERS if (source.folder / name).is_file()}
            )
    return files, copies, notes


def _find_tokenizer(folder: Path) -> Path | None:
    if (folder / TOKENIZER).is_file():
        return folder / TOKENIZER
    found = sorted(folder.glob(f"*{TIKTOKEN_SUFFIX}"))
    return found[0] if len(found) == 1 else None


def _settings(source: Source, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json: the source's, with the ids of its tokenizer where it says nothing."""
    own = {key: value for key, value in source.settings.items() if key != "transformers_version"}
    if not own:
        own = dict(GENERATION_DEFAULTS)
        if tokenizer is not None:
            own.update(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    # The released config says whether texts begin with the begin token.
    config = read_json(source.folder / CONFIG)
    if source.kind == "official" and config.get("add_bos_token") and "add_bos_token" not in own:
        own["add_bos_token"] = True
    return own


def _facts(named: Path, source: Source) -> dict[str, str]:
    """Rows of the model card from the run the weights come from, if they come from one."""
    for run in (named, *list(source.folder.resolve().parents)[:2]):
        metrics = run / "metrics.jsonl"
        if metrics.is_file():
            return _training_rows(metrics)
    return {}


def _training_rows(metrics: Path) -> dict[str, str]:
    last: dict[str, Any] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            last.update(json.loads(line))
        except ValueError:
            continue  # a line cut short by a kill
    rows = {}
    if "tokens" in last:
        rows["training tokens"] = f"{format_count(last['tokens'])} in {last.get('step', '?')} steps"
    for key, label in (("loss", "last training loss (nats per token)"), ("val_loss", "validation loss (nats per token)"),
                       ("val_bpb", "validation bits per byte")):  # fmt: skip
        if isinstance(last.get(key), int | float):
            rows[label] = f"{last[key]:.4f}"
    return rows
