"""Runs the test suites of transformers and PEFT on a tiny exported model, and prints the counts.

    python -m tests.convert.peer_suite                                  # both, for the installed versions
    python -m tests.convert.peer_suite peft -k lora
    python -m tests.convert.peer_suite transformers --checkout DIR      # with the tests of generation

Downloads the source packages of the installed versions from the package index (11 MB) and deletes them at the end; nothing
of theirs is kept. transformers' package has ModelTesterMixin but not GenerationTesterMixin, which `--checkout` takes from a
git checkout of the same version. Needs `pip install parameterized`, which transformers' tests import. Exit code 1 if a test
fails that docs/convert.md does not explain, 3 without network.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tnllm import assets
from tnllm.convert.run import Options, convert
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import save_model

NAME = "tnllm_tiny"
# Failures that docs/convert.md explains: parts of their names.
EXPLAINED: dict[str, tuple[str, ...]] = {
    "transformers": (),
    "peft": ("PrefixTuningConfig", "ShadowConfig", "merge_layers[Beft", "merge_layers_multi[Beft",
             "merge_layers_nan[Beft", "merge_layers_fp16[Beft"),
}  # fmt: skip

# Loaded by both suites: transformers' Auto classes find the exported classes, PEFT knows which layers to adapt.
PLUGIN = """
import importlib, sys, types
sys.path.insert(0, {root!r})
try:
    import diffusers
except ImportError:
    # PEFT's tests of language models import it and do not use it.
    sys.modules["diffusers"] = types.ModuleType("diffusers")
    sys.modules["diffusers"].StableDiffusionPipeline = object
code = importlib.import_module("{name}.modeling_tnllm")
import transformers
transformers.AutoConfig.register("tnllm", code.TnllmConfig)
transformers.AutoModel.register(code.TnllmConfig, code.TnllmModel)
transformers.AutoModelForCausalLM.register(code.TnllmConfig, code.TnllmForCausalLM)
transformers.AutoModelForSequenceClassification.register(code.TnllmConfig, code.TnllmForSequenceClassification)
try:
    import peft.utils.constants as constants
except ImportError:
    constants = None
for key, value in vars(constants).items() if constants else ():
    if key.startswith("TRANSFORMERS_MODELS_TO_") and key.endswith("_MAPPING") and isinstance(value, dict):
        value["tnllm"] = ["l3"] if "FEEDFORWARD" in key else ["out_proj", "l3"] if "IA3" in key else ["out_proj", "l1"]
"""

# What the models of transformers have in their own test files.
MODEL_TESTS = """
import copy, unittest
import torch
from transformers.testing_utils import torch_device
from transformers.models.auto import modeling_auto
from {name} import modeling_tnllm as code
from ...test_modeling_common import ModelTesterMixin, ids_tensor
from ...generation.test_utils import GenerationTesterMixin

# The mixin reads there which classes have no loss.
modeling_auto.MODEL_MAPPING_NAMES["tnllm"] = "TnllmModel"

class Tester:
    def __init__(self, parent):
        self.parent = parent
        self.batch_size, self.seq_length, self.is_training = 3, 7, True
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 99, 32, 2, 2
        self.num_labels = 3
    def get_config(self):
        return code.TnllmConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], 96) + 3
        mask = torch.ones_like(ids)
        return self.get_config(), {{"input_ids": ids, "attention_mask": mask}}

class TnllmModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (code.TnllmModel, code.TnllmForCausalLM, code.TnllmForSequenceClassification)
    all_generative_model_classes = (code.TnllmForCausalLM,)
    has_attentions = False
    test_headmasking = False
    model_tester_class = Tester
    def setUp(self):
        self.model_tester = Tester(self)
    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs)
        if return_labels:
            if "Sequence" in model_class.__name__:
                inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long, device=torch_device)
            elif "Causal" in model_class.__name__:
                shape = (self.model_tester.batch_size, self.model_tester.seq_length)
                inputs["labels"] = torch.zeros(shape, dtype=torch.long, device=torch_device)
        return inputs
    def _check_past_key_values_for_generate(self, batch_size, cache, seq_length, config):
        self.assertEqual(cache.get_seq_length(), seq_length)
        self.assertEqual(cache.position.shape, (batch_size,))
"""


def fetch(package: str, folder: Path) -> Path:
    """Download and unpack the source package of the installed version; exits with 3 without network."""
    version = importlib.metadata.version(package)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", package, "-d", str(folder)]
    result = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
    archive = folder / f"{package}-{version}.tar.gz"
    if not archive.is_file():
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"the source package of {package} {version} could not be downloaded ({reason}); this needs a network")
        sys.exit(3)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"{package}-{version}"


def write_model(root: Path) -> Path:
    """A tiny exported model with the demo's tokenizer, which is also a Python package of its code."""
    config = get_preset("tiny", num_layers=2, model_dim=32, num_heads=2, glu_dim=48)
    model = build_model(config.model_copy(update={"init_std": 0.3}), seed=0)  # so that adapters change the texts
    save_model(model, root / "weights", tokenizer=assets.tokenizer_model())
    convert(root / "weights", root / NAME, Options(to="hf", verify=False), lambda _: None, lambda *_: None)
    (root / NAME / "__init__.py").touch()
    (root / "peer_plugin.py").write_text(PLUGIN.format(root=str(root), name=NAME))
    return root / NAME


def stub(package: Path, module: str, mixin: str, checkout: Path | None) -> None:
    """Put `mixin`'s file beside the tests that import it: from a checkout, or one without tests."""
    target = package / "tests" / module
    target.parent.mkdir(parents=True, exist_ok=True)
    (target.parent / "__init__.py").touch()
    source = None if checkout is None else checkout / "tests" / module
    text = source.read_text() if source is not None and source.is_file() else f"class {mixin}:\n    pass\n"
    target.write_text(text)


def transformers_suite(root: Path, checkout: Path | None) -> tuple[Path, list[str]]:
    package = fetch("transformers", root)
    (package / "tests/__init__.py").touch()
    stub(package, "generation/test_utils.py", "GenerationTesterMixin", checkout)
    stub(package, "exporters/test_export.py", "ExportTesterMixin", checkout)
    folder = package / "tests/models/tnllm"
    folder.mkdir(parents=True)
    for parent in (folder, folder.parent):
        (parent / "__init__.py").touch()
    (folder / "test_modeling_tnllm.py").write_text(MODEL_TESTS.format(name=NAME))
    return package, ["tests/models/tnllm/test_modeling_tnllm.py"]


def peft_suite(root: Path, model: Path) -> tuple[Path, list[str]]:
    package = fetch("peft", root)
    file = package / "tests/test_decoder_models.py"
    text = re.sub(
        r"^PEFT_DECODER_MODELS_TO_TEST = \[.*?^\]", f"PEFT_DECODER_MODELS_TO_TEST = [{str(model)!r}]", file.read_text(),
        flags=re.M | re.S,
    )  # fmt: skip
    file.write_text(text)
    (package / "tests/__init__.py").touch()
    # Tests that name a model of their own need the hub.
    return package, ["tests/test_decoder_models.py", "-k", NAME]


def run(name: str, package: Path, arguments: list[str], root: Path, keyword: str | None) -> bool:
    """Run a suite, print its counts and the failures; whether every failure is explained."""
    if keyword:
        arguments = [*arguments, "-k", f"{NAME} and ({keyword})" if name == "peft" else keyword]
    env = {
        **os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"),
        "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "peer_plugin",
        "-q",
        "-rf",
        "--tb=line",
        "-o",
        "addopts=",
        "-o",
        "filterwarnings=default",
        *arguments,
    ]
    result = subprocess.run(command, cwd=package, env=env, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines()
    if not any(" passed" in line for line in lines[-1:]):
        print(result.stdout[-3000:], result.stderr[-3000:], file=sys.stderr)
    failures = [line for line in lines if line.startswith(("FAILED", "SUBFAILED", "ERROR"))]
    new = [line for line in failures if not any(part in line for part in EXPLAINED[name])]
    for line in failures:
        print(("  explained  " if line not in new else "  FAILS      ") + line.split(" ", 1)[1][:200])
    print(f"{name} {importlib.metadata.version(name)}: {lines[-1] if lines else result.stderr[-300:]}", flush=True)
    return not new and bool(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", choices=["transformers", "peft", []], help="which (both)")
    parser.add_argument("-k", dest="keyword", help="pytest's -k")
    parser.add_argument("--checkout", type=Path, help="a git checkout of transformers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = write_model(root)
        fine = True
        for name in options.suites or ["transformers", "peft"]:
            suite = transformers_suite(root, options.checkout) if name == "transformers" else peft_suite(root, model)
            fine &= run(name, *suite, root, options.keyword)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
