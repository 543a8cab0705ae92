"""What every vLLM process of an environment with this package runs, and what it must never do: fail, or cost time."""

import json
import logging
import pickle
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tnllm.engines.vllm_plugin import ARCHITECTURE, HYBRID, refuse, register
from tnllm.modeling.config import get_preset
from tnllm.modeling.hf_names import to_hf_config

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
# The parts of vLLM that registration touches.
STUB = """
import sys
from types import ModuleType

def stub(**parts):
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models", "vllm.model_executor.models.config"):
        sys.modules[name] = ModuleType(name)
    registered = {}
    registry = type("ModelRegistry", (), {"register_model": staticmethod(registered.__setitem__)})
    checks = type("MambaModelConfig", (), {"verify_and_update_config": classmethod(lambda cls, config: None)})
    sys.modules["vllm"].__dict__.update({"ModelRegistry": registry, "__version__": "0.32.0", **parts})
    sys.modules["vllm.model_executor.models.config"].__dict__.update(MODELS_CONFIG_MAP={}, MambaModelConfig=checks)
    return registered
"""


@pytest.fixture
def stub(monkeypatch):
    from transformers import CONFIG_MAPPING

    # Registration is for the process, so it is undone for the tests that follow in this one.
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    names = ("vllm", "vllm.model_executor", "vllm.model_executor.models", "vllm.model_executor.models.config")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # undone at the end
    scope: dict = {}
    exec(STUB, scope)
    return scope["stub"]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_entry_point_is_this_function():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [target] = settings["project"]["entry-points"]["vllm.general_plugins"].values()
    module, _, name = target.partition(":")
    assert getattr(import_module(module), name) is register


def test_registration_names_the_model_and_repeats(stub, caplog):
    registered = stub()
    register()
    register()
    assert list(registered) == [ARCHITECTURE, HYBRID]
    assert list(sys.modules["vllm.model_executor.models.config"].MODELS_CONFIG_MAP) == [ARCHITECTURE, HYBRID]
    # vLLM imports them later; here it is enough that the file has the classes.
    for architecture, target in registered.items():
        module, _, name = target.partition(":")
        assert name == architecture
        assert f"\nclass {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert not warnings_of(caplog)


def test_without_vllm_it_is_one_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    [line] = warnings_of(caplog)
    assert line.startswith(
        "tnllm: TransNormerLLM is not available in this vLLM (tested with 0.32): ModuleNotFoundError"
    )


@pytest.mark.parametrize("broken", ["registry", "map", "raises"])
def test_a_foreign_vllm_is_one_warning(broken, stub, caplog):
    def fail(*_):
        raise RuntimeError("interfaces moved")

    if broken == "raises":
        stub(ModelRegistry=SimpleNamespace(register_model=fail))
    else:
        stub()
        module = "vllm" if broken == "registry" else "vllm.model_executor.models.config"
        vars(sys.modules[module]).pop("ModelRegistry" if broken == "registry" else "MODELS_CONFIG_MAP")
    register()
    assert len(warnings_of(caplog)) == 1


def test_registration_loads_nothing_heavy(tmp_path):
    script = tmp_path / "process.py"
    # vLLM itself has loaded torch and transformers by then.
    script.write_text(
        f"{STUB}\nimport torch, json, transformers, pydantic\nstub()\nbefore = set(sys.modules)\n"
        "from tnllm.engines.vllm_plugin import register\nregister()\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=ROOT,
                         env={"PYTHONPATH": str(ROOT), "PATH": ""})  # fmt: skip
    added = json.loads(run.stdout.splitlines()[-1])
    own = {name for name in added if name.split(".")[0] == "tnllm"}
    assert own <= {
        "tnllm", "tnllm.errors", "tnllm.engines", "tnllm.engines.vllm_config", "tnllm.engines.vllm_plugin",
        "tnllm.modeling", "tnllm.modeling.config", "tnllm.modeling.hf_names", "tnllm.convert", "tnllm.convert.hf_code",
        "tnllm.convert.hf_code.configuration_tnllm",
    }  # fmt: skip
    assert not {name.split(".")[0] for name in added} & {"triton", "sentencepiece", "lm_eval", "fastapi", "datasets"}


def test_a_folders_own_code_loads_beside_the_registered_configuration(stub, tmp_path):
    from transformers import AutoModelForCausalLM

    from tests.small_models import small_model
    from tnllm.convert.run import Options, convert
    from tnllm.modeling.weights import save_model

    save_model(small_model(), tmp_path / "weights")
    convert(tmp_path / "weights", tmp_path / "hf", Options("hf", verify=False), print, lambda *args: None)
    stub()
    register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert type(model).__name__ == "TnllmForCausalLM"


def test_a_hybrid_has_a_class_of_its_own():
    from tnllm.engines.vllm_config import TnllmConfig

    def read(**choices):
        values = to_hf_config(get_preset("demo", **choices))
        return pickle.loads(pickle.dumps(TnllmConfig(architectures=[ARCHITECTURE], **values)))

    assert read().architectures == [ARCHITECTURE]
    assert not hasattr(read(), "layer_types")
    hybrid = read(softmax_every=3)
    assert hybrid.architectures == [HYBRID]
    every_third = ["full_attention" if layer % 3 == 2 else "linear_attention" for layer in range(hybrid.num_layers)]
    assert hybrid.layer_types == every_third


def configuration(model=None, **changes):
    """What vLLM hands to the check, of what it reads."""
    hf = SimpleNamespace(**to_hf_config(get_preset("demo", **(model or {}))))
    settings = {"pipeline": 1, "tensor": 1, "quantization": None, "length": 2048, "lora": None, "draft": None} | changes
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=hf, quantization=settings["quantization"], max_model_len=settings["length"]
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=settings["pipeline"], tensor_parallel_size=settings["tensor"]
        ),
        speculative_config=settings["draft"],
        lora_config=settings["lora"],
    )


def test_what_is_served_passes():
    refuse(configuration())
    refuse(configuration(tensor=4, length=10**6))
    refuse(configuration({"softmax_every": 2, "norm_position": "output"}, tensor=2))
    refuse(configuration({"position": "ape", "max_position": 4096}, length=4096))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pipeline": 2}, "pipeline parallelism: use --tensor-parallel-size"),
        ({"draft": object()}, "speculative decoding: a recurrent state cannot be rolled back"),
        ({"lora": object()}, "LoRA: merge the adapter with tnllm convert"),
        ({"quantization": "torchao"}, r"quantization \(torchao\): serve float32 or bfloat16 weights"),
        ({"tensor": 3}, "--tensor-parallel-size 3, which does not divide num_heads, glu_dim, vocab_size"),
        (
            {"model": {"position": "ape", "max_position": 512}, "length": 513},
            "--max-model-len above 512, the learned positions",
        ),
    ],
)
def test_what_is_not_served_is_named(changes, reason):
    with pytest.raises(ValueError, match=f"^TransNormerLLM in vLLM does not support {reason}$"):
        refuse(configuration(**changes))
