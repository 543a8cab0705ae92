"""Runs the test suites of transformers and PEFT on a tiny exported model, and prints the counts.

    python -m tests.convert.peer_suite                                  # both, for the installed versions
    python -m tests.convert.peer_suite peft -k lora
    python -m tests.convert.peer_suite transformers --checkout DIR      # with the tests of generation, and our peers

Downloads the source packages of the installed versions from the package index (11 MB) and deletes them at the end; nothing
of theirs is kept. transformers' package has ModelTesterMixin but not GenerationTesterMixin. `--checkout` takes the library
and all its tests from a git checkout instead, and runs the tests of Mamba, Mamba2 and MiniMax beside ours. Needs `pip
install parameterized`, which transformers' tests import. Exit code 1 if a test fails that docs/convert.md does not explain,
3 without network.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tnllm import assets
from tnllm.convert.run import Options, convert
from tnllm.modeling.config import get_preset
from tnllm.modeling.model import build_model
from tnllm.modeling.weights import save_model

NAME = "tnllm_tiny"
# Models with a recurrent state whose own tests are run beside ours.
PEERS = ("mamba", "mamba2", "minimax")
# What the source package of transformers lacks.
MISSING = (("generation/test_utils.py", "GenerationTesterMixin"), ("exporters/test_export.py", "ExportTesterMixin"))
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
    sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {{}})
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
    # One of these tables holds functions, not names of layers.
    if key.startswith("TRANSFORMERS_MODELS_TO_") and key.endswith("_MAPPING") and "POSTPROCESS" not in key:
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
    # The mixin knows only caches of keys and values.
    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        self.assertEqual(past_key_values.get_seq_length(), seq_length)
        self.assertEqual(past_key_values.position.shape, (batch_size,))
    def _check_caches_are_equal(self, one, other):
        self.assertEqual(one.length, other.length)
        torch.testing.assert_close([*one.layers, one.position], [*other.layers, other.position], rtol=1e-4, atol=1e-4)
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
    # It samples by default; the suites compare the texts of two calls.
    (root / NAME / "generation_config.json").unlink()
    (root / NAME / "__init__.py").touch()
    (root / "peer_plugin.py").write_text(PLUGIN.format(root=str(root), name=NAME))
    return root / NAME


def transformers_suite(root: Path, checkout: Path | None) -> tuple[Path, list[str]]:
    """Our test file among those of a checkout, with our peers' files; or in the source package, without generation."""
    if checkout is None:
        package = fetch("transformers", root)
        for module, mixin in MISSING:
            file = package / "tests" / module
            file.parent.mkdir(parents=True)
            file.write_text(f"class {mixin}:\n    pass\n")
    else:
        package = root / "checkout"
        shutil.copytree(checkout / "tests", package / "tests")
        for name in ("src", "utils"):
            (package / name).symlink_to((checkout / name).resolve())
    folder = package / "tests/models/tnllm"
    folder.mkdir(parents=True)
    for parent in (folder, *folder.parents[:2]):
        (parent / "__init__.py").touch()
    for module, _ in MISSING:
        (package / "tests" / module).with_name("__init__.py").touch()
    (folder / "test_modeling_tnllm.py").write_text(MODEL_TESTS.format(name=NAME))
    names = ["tnllm", *(PEERS if checkout else [])]
    return package, [f"tests/models/{name}/test_modeling_{name}.py" for name in names]


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
    source = package / "src"
    env = {
        **os.environ, "PYTHONPATH": f"{root}{os.pathsep}{source}", "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"),
        "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    report = root / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "peer_plugin", "-q", "--tb=line", "-o", "addopts=", "-o",
               "filterwarnings=default", f"--junitxml={report}", *arguments]  # fmt: skip
    result = subprocess.run(command, cwd=package, env=env, capture_output=True, text=True)
    if not report.is_file():
        print(result.stdout[-3000:], result.stderr[-3000:], file=sys.stderr)
        return False
    outcomes: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        model = next((peer for peer in PEERS if f".{peer}." in case.get("classname", "")), "tnllm")
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        test = case.get("name", "").replace(f"{root}/", "")
        # A test of subtests is there once for each that fails or is skipped.
        seen = outcomes.setdefault(model, {})
        seen[test] = min(outcome, seen.get(test, "skipped"))
    unexplained = []
    for test in (test for test, outcome in outcomes.get("tnllm", {}).items() if outcome == "failed"):
        explained = any(part in test for part in EXPLAINED[name])
        unexplained += [] if explained else [test]
        passes = [peer for peer in PEERS if outcomes.get(peer, {}).get(test) == "passed"]
        print(f"  {'explained' if explained else 'FAILS':<10} {test}", *(f"(passes for {peer})" for peer in passes))
    about = source / name / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"', about.read_text(), re.M) if about.is_file() else None
    for model, tests in outcomes.items():
        count = ", ".join(
            f"{list(tests.values()).count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped")
        )
        print(f"{name} {found[1] if found else importlib.metadata.version(name)}: {model:<8} {count}")
    print(result.stdout.strip().splitlines()[-1], flush=True)
    return bool(outcomes) and not unexplained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", choices=["transformers", "peft", []], help="which (both)")
    parser.add_argument("-k", dest="keyword", help="pytest's -k")
    parser.add_argument("--checkout", type=Path, help="a git checkout of transformers: src, tests and utils")
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
