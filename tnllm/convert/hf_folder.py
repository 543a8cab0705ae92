"""The files of a Hugging Face folder beside its weights: configs, model code, model card.

    files = code_files()                                  # file name → text
    values = config_values(config, dtype, generation)     # config.json
    text = model_card(source, dtype, facts, quantized=False)

The model code is `hf_code/` and this package's Lightning Attention kernels, with `from tnllm...` rewritten to relative
imports, so the folder needs only torch and transformers.
"""

import inspect
import json
import re
from importlib import resources
from typing import Any

import torch

from tnllm import __version__
from tnllm.convert.source import Source
from tnllm.files import format_count
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.hf_names import to_hf_config

# Module of tnllm → file in the folder. launch, kernels and step need Triton, the others only torch.
CODE = {
    "tnllm.convert.hf_code.configuration_tnllm": "configuration_tnllm.py",
    "tnllm.convert.hf_code.modeling_tnllm": "modeling_tnllm.py",
    "tnllm.kernels.lightning_attention.chunk": "lightning_attention_chunk.py",
    "tnllm.kernels.lightning_attention.launch": "lightning_attention_launch.py",
    "tnllm.kernels.lightning_attention.kernels": "lightning_attention_kernels.py",
    "tnllm.kernels.lightning_attention.step": "lightning_attention_step.py",
}
# Versions of transformers the exported code was tested with.
TRANSFORMERS_TESTED = "4.51 to 5.23"
AUTO_MAP = {
    "AutoConfig": "configuration_tnllm.TnllmConfig",
    "AutoModel": "modeling_tnllm.TnllmModel",
    "AutoModelForCausalLM": "modeling_tnllm.TnllmForCausalLM",
}


def code_files() -> dict[str, str]:
    """Return the model code: file name → source text."""
    files = {}
    for module, name in CODE.items():
        package, _, stem = module.rpartition(".")
        text = resources.files(package).joinpath(f"{stem}.py").read_text(encoding="utf-8")
        for other, target in CODE.items():
            text = re.sub(rf"from {re.escape(other)} import", f"from .{target.removesuffix('.py')} import", text)
        files[name] = f"# Written by tnllm {__version__} from {module} (Apache-2.0).\n{text}"
    return files


def config_values(config: ModelConfig, dtype: torch.dtype, generation: dict[str, Any]) -> dict[str, Any]:
    """Return the values of config.json; `generation` are those of generation_config.json."""
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["TnllmForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "tnllm",
        "tnllm_version": __version__,
        # transformers 5 reads dtype, transformers 4 torch_dtype.
        "dtype": name,
        "torch_dtype": name,
        **to_hf_config(config),
        "bos_token_id": generation.get("bos_token_id"),
        "eos_token_id": generation.get("eos_token_id"),
        "use_cache": True,
    }


def generation_values(generation: dict[str, Any]) -> dict[str, Any]:
    """Return generation_config.json without the sampling values that `do_sample: false` would contradict."""
    greedy = generation.get("do_sample") is False
    sampling = ("temperature", "top_p", "top_k", "min_p")
    return {key: value for key, value in generation.items() if not (greedy and key in sampling)}


def json_text(values: dict[str, Any]) -> str:
    """Format JSON as the files of the folder hold it."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def model_card(source: Source, dtype: torch.dtype, facts: dict[str, str], quantized: bool) -> str:
    """Return README.md: the model, how to load it, what is known of its training, its licence."""
    config = source.config
    rows = {
        "parameters": f"{source.num_parameters:,} ({format_count(source.num_parameters)})",
        "layers, width, heads, GLU width": f"{config.num_layers}, {config.model_dim}, {config.num_heads}, {config.glu_dim}",
        "vocabulary": f"{config.vocab_size:,}",
        "architecture": f"TransNormerLLM, {config.version} form",
        "weights": f"{str(dtype).removeprefix('torch.')}{', matrices in int8 (torchao)' if quantized else ''}",
        **facts,
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    if source.kind == "official":
        licence = (
            "Converted from a checkpoint of OpenNLPLab. Its own terms hold: read the licence on the page it came from "
            "(Apache-2.0 code; the first version's weights add a community licence)."
        )
    else:
        licence = (
            "Whoever trained these weights decides their licence, and the terms of the training texts matter; none is "
            "recorded here. The Python files are Apache-2.0."
        )
    version_note = (
        "\nThe 15B's layout was never checked against its authors' logits; it follows a best guess.\n"
        if source.kind == "official" and config.version == "v3"
        else ""
    )
    return inspect.cleandoc(
        f"""
        ---
        library_name: transformers
        pipeline_tag: text-generation
        license: other
        tags: [transnormer, linear-attention, lightning-attention]
        ---

        # {source.folder.resolve().name}

        A TransNormerLLM: linear attention with a recurrent state of constant size, whatever the length of the text.

        ```python
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = "."
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
        inputs = tokenizer(["Once upon a time"], return_tensors="pt")
        print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50)))
        ```

        `trust_remote_code` runs the Python files in this folder; read them first. They need torch, and use Triton on CUDA
        where it is installed. Tested with transformers {TRANSFORMERS_TESTED}.
        """
    ) + (
        f"\n\n| | |\n| --- | --- |\n{table}{version_note}\n## Licence\n\n{licence}\n\n"
        f"Written by tnllm {__version__}. `sha256sum -c SHA256SUMS` checks the files.\n"
    )
