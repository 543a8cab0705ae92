"""The files beside the weights of the result, for each target format: configs, tokenizer, model code, model card.

    files, copies, notes = folder_files(source, path, plan, tokenizer=None)

`files` maps names to text, `copies` names to files to copy, `notes` are lines for people.
"""

import json
from pathlib import Path
from string import Template
from typing import Any

import torch

from tnllm import __version__
from tnllm.convert import hf_folder, llama
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

# The example, by the tokenizer file that the folder has: imports, token ids, text.
_EXAMPLES = {
    "tokenizer.json": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        'inputs = tokenizer(["Once upon a time"], return_tensors="pt").input_ids',
        "tokenizer.decode(output[0])",
    ),
    "tokenizer.model": (
        "import sentencepiece\nimport torch\nfrom transformers import AutoModelForCausalLM",
        "# This SentencePiece model has no form that AutoTokenizer reads.\n"
        'tokenizer = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")\n'
        'inputs = torch.tensor([tokenizer.encode("Once upon a time")])',
        "tokenizer.decode(output[0].tolist())",
    ),
    "": (
        "import torch\nfrom transformers import AutoModelForCausalLM",
        "# This folder has no tokenizer: use the one that the model was trained with.\ninputs = torch.tensor([[1, 2, 3]])",
        "output[0].tolist()",
    ),
}


_CARD = Template("""---
library_name: transformers
pipeline_tag: text-generation
license: $licence
$tags---

# $name

$what

$example
$code
| | |
| --- | --- |
$table
## Limits

$limits

## Licence

$terms

Written by tnllm $version. `sha256sum -c SHA256SUMS` checks the files.
""")
_TRANSNORMER = (
    "A TransNormerLLM: linear attention with a recurrent state of constant size, whatever the length of the text."
)
_HYBRID = " {softmax} of its {layers} layers have softmax attention instead, and a key-value cache, which grows."
_TRANSFORMER = """A Transformer with softmax attention and rotary positions: the baseline that TransNormerLLM is compared
with. The folder is that of a {family} model, so it loads with transformers' own code:"""
_CODE = f"""
`trust_remote_code` runs the Python files in this folder; read them first. They need torch, and use Triton on CUDA
where it is installed. Tested with transformers {hf_folder.TRANSFORMERS_TESTED}.
"""
_LIMITS = "Nothing here makes answers true or harmless. Evaluate the model on your own task before you rely on it."
_RECALL = " Linear attention copies from a long text less exactly than softmax attention does."
_GUESSED = " The 15B's layout was never checked against its authors' logits; it follows a best guess."
_RELEASED = """Converted from a checkpoint of OpenNLPLab. Its own terms hold: read the licence on the page it came from
(Apache-2.0 code; the first version's weights add a community licence)."""
_UNKNOWN = """Who trained these weights decides their licence, and the terms of the training texts matter; none is recorded
here."""


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
        files["README.md"] = _model_card(source, plan.dtype, _run_facts(path, source), kind, quantized, licence)
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


def _model_card(
    source: Source, dtype: torch.dtype, facts: dict[str, str], tokenizer: str, quantized: bool, licence: str | None
) -> str:
    """Return README.md.

    `tokenizer`: the folder's tokenizer file, a key of `_EXAMPLES`; `licence`: of the weights, an identifier of the hub's.
    """
    config = source.config
    linear = config.kind == "transnormer"
    what = _TRANSNORMER if linear else _TRANSFORMER.format(family="Qwen3" if config.qk_norm else "Llama")
    if linear and config.num_softmax:
        what += _HYBRID.format(softmax=config.num_softmax, layers=config.num_layers)
    rows = {
        "parameters": f"{source.num_parameters:,} ({format_count(source.num_parameters)})",
        "layers, width, heads, GLU width": f"{config.num_layers}, {config.model_dim}, {config.num_heads}, {config.glu_dim}",
        "vocabulary": f"{config.vocab_size:,}",
        **({"architecture": f"TransNormerLLM, {config.version} form"} if linear else {}),
        "weights": f"{str(dtype).removeprefix('torch.')}{', matrices in int8 (torchao)' if quantized else ''}",
        **facts,
    }
    terms = _RELEASED if source.kind == "official" else f"{licence}, said who converted them." if licence else _UNKNOWN
    guessed = source.kind == "official" and config.version == "v3"
    imports, ids, text = _EXAMPLES[tokenizer]
    example = (
        f'```python\n{imports}\n\nfolder = "."\n{ids}\n'
        'model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")\n'
        f"output = model.generate(inputs, max_new_tokens=50)\nprint({text})\n```"
    )
    return _CARD.substitute(
        licence=licence or "other",
        tags="tags: [transnormer, linear-attention, lightning-attention]\n" if linear else "",
        name=source.folder.resolve().name,
        what=what,
        example=example if linear else example.replace(", trust_remote_code=True", ""),
        code=_CODE if linear else "",
        table="".join(f"| {key} | {value} |\n" for key, value in rows.items()),
        limits=_LIMITS + (_RECALL if linear else "") + (_GUESSED if guessed else ""),
        terms=terms + (" The Python files are Apache-2.0." if linear and source.kind != "official" else ""),
        version=__version__,
    )
