"""README.md of a Hugging Face folder: what the model is, how to load it, what is known of its training, its licence.

text = model_card(source, dtype, facts, tokenizer="tokenizer.json", quantized=False, licence="apache-2.0")
"""

from string import Template

import torch

from tnllm import __version__
from tnllm.convert.hf_folder import TRANSFORMERS_TESTED
from tnllm.convert.source import Source
from tnllm.files import format_count

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
where it is installed. Tested with transformers {TRANSFORMERS_TESTED}.
"""
_LIMITS = "Nothing here makes answers true or harmless. Evaluate the model on your own task before you rely on it."
_RECALL = " Linear attention copies from a long text less exactly than softmax attention does."
_GUESSED = " The 15B's layout was never checked against its authors' logits; it follows a best guess."
_RELEASED = """Converted from a checkpoint of OpenNLPLab. Its own terms hold: read the licence on the page it came from
(Apache-2.0 code; the first version's weights add a community licence)."""
_UNKNOWN = """Who trained these weights decides their licence, and the terms of the training texts matter; none is recorded
here."""


def model_card(
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
    return _CARD.substitute(
        licence=licence or "other",
        tags="tags: [transnormer, linear-attention, lightning-attention]\n" if linear else "",
        name=source.folder.resolve().name,
        what=what,
        example=_example(tokenizer, own_code=linear),
        code=_CODE if linear else "",
        table="".join(f"| {key} | {value} |\n" for key, value in rows.items()),
        limits=_LIMITS + (_RECALL if linear else "") + (_GUESSED if guessed else ""),
        terms=terms + (" The Python files are Apache-2.0." if linear and source.kind != "official" else ""),
        version=__version__,
    )


def _example(tokenizer: str, own_code: bool) -> str:
    """The code on the card; `own_code`: the folder has its own."""
    imports, ids, text = _EXAMPLES[tokenizer]
    example = (
        f'```python\n{imports}\n\nfolder = "."\n{ids}\n'
        'model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")\n'
        f"output = model.generate(inputs, max_new_tokens=50)\nprint({text})\n```"
    )
    return example if own_code else example.replace(", trust_remote_code=True", "")
