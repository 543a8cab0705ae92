"""vLLM's entry point: every vLLM process in an environment with this package calls `register`, whatever it serves.

So it imports no model, no kernel and no tokenizer, and whatever goes wrong in it is one warning: vLLM serves other models
as if this package were not installed. What can only be known of a model is checked when vLLM has its configuration.
"""

import logging
from typing import Any

ARCHITECTURE, HYBRID = "TnllmForCausalLM", "TnllmHybridForCausalLM"
TESTED = "0.32"

_log = logging.getLogger(__name__)


def register() -> None:
    """Make TransNormerLLM known to vLLM; calling it again changes nothing."""
    try:
        _register()
    except Exception as error:
        _log.warning(
            "tnllm: TransNormerLLM is not available in this vLLM (tested with %s): %s: %s",
            TESTED, type(error).__name__, error,
        )  # fmt: skip


def _register() -> None:
    import vllm
    from transformers import AutoConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig

    from tnllm.engines.vllm_config import TnllmConfig

    class Checks(MambaModelConfig):
        """What vLLM asks of a model before it allocates anything."""

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            if not vllm.__version__.startswith(f"{TESTED}."):
                _log.warning("tnllm: tested with vLLM %s, this is %s", TESTED, vllm.__version__)
            refuse(vllm_config)
            super().verify_and_update_config(vllm_config)
            use_decode_graphs(vllm_config)

    AutoConfig.register(TnllmConfig.model_type, TnllmConfig, exist_ok=True)
    for name in (ARCHITECTURE, HYBRID):
        MODELS_CONFIG_MAP[name] = Checks
        # A name, so that vLLM imports the model in the processes that serve it.
        vllm.ModelRegistry.register_model(name, f"tnllm.engines.vllm_model:{name}")


def refuse(vllm_config: Any) -> None:
    """Raise ValueError for what the model does not do in vLLM; each line says what to use instead."""
    model, parallel, tensor = vllm_config.model_config, vllm_config.parallel_config, "--tensor-parallel-size"
    config = model.hf_config
    longest = config.max_position if config.position == "ape" else None
    size = parallel.tensor_parallel_size
    undivided = [key for key in ("num_heads", "glu_dim", "vocab_size") if getattr(config, key) % size]
    reasons = {
        "pipeline parallelism: use " + tensor: parallel.pipeline_parallel_size > 1,
        "speculative decoding: a recurrent state cannot be rolled back": vllm_config.speculative_config is not None,
        "LoRA: merge the adapter with tnllm convert": vllm_config.lora_config is not None,
        f"quantization ({model.quantization}): serve float32 or bfloat16 weights": model.quantization is not None,
        f"{tensor} {size}, which does not divide {', '.join(undivided)}": undivided,
        f"--max-model-len above {longest}, the learned positions": longest and model.max_model_len > longest,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"TransNormerLLM in vLLM does not support {reason}")


def use_decode_graphs(vllm_config: Any) -> None:
    """CUDA graphs of whole decoding steps and no torch.compile: the kernels are fused already, prefill is not captured."""
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = vllm_config.compilation_config
    compilation.mode = CompilationMode.NONE
    if compilation.cudagraph_mode != CUDAGraphMode.NONE:
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
