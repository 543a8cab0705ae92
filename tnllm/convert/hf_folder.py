"""The files of a Hugging Face folder beside its weights: configs and model code.

    files = code_files()                                  # file name → text
    values = config_values(config, dtype, generation)     # config.json

The model code is `hf_code/`, this package's layers and its Lightning Attention kernels, with `from tnllm...` rewritten to
relative imports, so the folder needs only torch and transformers.
"""

import ast
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, resources
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tnllm import __version__
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.hf_names import ALIASES, DEFAULTS, to_hf_config

# Module of tnllm → file in the folder. launch, kernels and step need Triton, the others only torch.
CODE = {
    "tnllm.convert.hf_code.configuration_tnllm": "configuration_tnllm.py",
    "tnllm.convert.hf_code.modeling_tnllm": "modeling_tnllm.py",
    "tnllm.convert.hf_code.tokenization_tnllm": "tokenization_tnllm.py",
    "tnllm.convert.hf_code.state": "state.py",
    "tnllm.convert.hf_code.rows": "rows.py",
    "tnllm.convert.hf_code.operators": "operators.py",
    "tnllm.modeling.attention": "attention.py",
    "tnllm.modeling.transformer": "transformer.py",
    "tnllm.modeling.cache": "cache.py",
    "tnllm.modeling.layers": "layers.py",
    "tnllm.modeling.decay": "decay.py",
    "tnllm.kernels.lightning_attention.chunk": "lightning_attention_chunk.py",
    "tnllm.kernels.lightning_attention.launch": "lightning_attention_launch.py",
    "tnllm.kernels.lightning_attention.kernels": "lightning_attention_kernels.py",
    "tnllm.kernels.lightning_attention.states": "lightning_attention_states.py",
    "tnllm.kernels.lightning_attention.step": "lightning_attention_step.py",
}
# Modules of registered operators, and of what knows packed rows: the folder's `operators.py` has the same functions.
OPERATORS = ("gated_attention", "glu", "lightning_attention", "lrpe", "srms_norm", "softmax_attention")
# Versions of transformers the exported code was tested with.
TRANSFORMERS_TESTED = "4.51 to 5.24"
AUTO_MAP = {
    "AutoConfig": "configuration_tnllm.TnllmConfig",
    "AutoModel": "modeling_tnllm.TnllmModel",
    "AutoModelForCausalLM": "modeling_tnllm.TnllmForCausalLM",
    "AutoModelForSequenceClassification": "modeling_tnllm.TnllmForSequenceClassification",
}


def code_files() -> dict[str, str]:
    """Return the model code: file name → source text."""
    files = {}
    for module, name in CODE.items():
        text = _with_definitions(_source(module))
        for other, target in CODE.items():
            text = re.sub(rf"from {re.escape(other)} import", f"from .{target.removesuffix('.py')} import", text)
        text = re.sub(
            rf"from tnllm\.(?:kernels|modeling)\.({'|'.join(OPERATORS)}) import", "from .operators import", text
        )
        text = text.replace(
            "from tnllm.modeling.config import ModelConfig",
            "from .configuration_tnllm import TnllmConfig as ModelConfig",
        )
        # transformers requires what a file imports, unless it tries to. Without Triton nothing imports these files.
        text = re.sub(r"((?:^import triton.*\n)+)", _tried, text, flags=re.M)
        if name == "modeling_tnllm.py":
            others = [file.removesuffix(".py") for file in CODE.values() if file not in (name, "tokenization_tnllm.py")]
            named = "".join(f"    from .{other} import __doc__ as _\n" for other in others)
            text += f"\n\nif False:\n    # transformers 4 copies only the files that this one names.\n{named}"
        files[name] = f"# Written by tnllm {__version__} from {module} (Apache-2.0).\n{text}"
    return files


def _source(module: str) -> str:
    package, _, stem = module.rpartition(".")
    return resources.files(package).joinpath(f"{stem}.py").read_text(encoding="utf-8")


def _tried(imports: re.Match[str]) -> str:
    return f"try:\n{textwrap.indent(imports[0], '    ')}finally:\n    pass\n"


def _with_definitions(text: str) -> str:
    """Write out what `text` takes from files that cannot travel: references, rules of ModelConfig, defaults."""
    references = re.findall(r"^from (tnllm\.kernels\.\w+) import (\w+_reference)\n", text, re.M)
    text = re.sub(r"^from tnllm\.kernels\.\w+ import \w+_reference\n", "", text, flags=re.M)
    if references:  # what they import
        text = text.replace("\nfrom typing", "\nfrom collections.abc import Callable\nfrom typing", 1)
    for module, name in references:
        text += f"\n\n{_definition(module, name)}\n"
    text = re.sub(
        r"^    (\w+) = ModelConfig\.\1$", lambda m: _definition("tnllm.modeling.config", m[1]), text, flags=re.M
    )
    fields = {**ModelConfig.model_fields, "tie_word_embeddings": ModelConfig.model_fields["tie_embeddings"]}
    keys = "".join(
        f"{textwrap.fill(str(fields[key].description), 120, initial_indent='    # ', subsequent_indent='    # ')}\n"
        f'    "{key}": {json.dumps(value) if isinstance(value, str) else value},\n'
        for key, value in DEFAULTS.items()
    )
    return text.replace(
        "from tnllm.modeling.config import ModelConfig\nfrom tnllm.modeling.hf_names import ALIASES, DEFAULTS\n",
        f"ALIASES = {json.dumps(ALIASES, indent=4)}\nDEFAULTS: dict[str, Any] = {{\n{keys}}}\n",
    )


def _definition(module: str, name: str) -> str:
    """The source of a function or method, decorators included."""
    text = _source(module)
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(lines[start - 1 : node.end_lineno])
    raise AssertionError(f"{module} has no function {name}")


# A name of its own for each import: folders may differ, and one may still be in use when another is forgotten.
_imports = itertools.count()


@contextmanager
def imported_code(folder: Path) -> Iterator[ModuleType]:
    """Import `modeling_tnllm.py` of a folder, which needs transformers; afterwards its modules are forgotten."""
    name = f"tnllm_exported_{next(_imports)}"
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[name] = module_from_spec(spec)
    dont_write, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield import_module(f"{name}.modeling_tnllm")
    finally:
        sys.dont_write_bytecode = dont_write
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[module]


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
        **(own := to_hf_config(config)),
        **{alias: own[key] for alias, key in ALIASES.items()},
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
