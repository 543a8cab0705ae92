"""Int8 weight-only quantization with a scale per row: in torchao's file format, which transformers loads, and in tnllm's.

quantizer = Int8Quantizer()                              # MissingExtra without torchao
outputs, metadata = quantizer.outputs(output)            # the parts of one quantized matrix
"""

import json
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tnllm.convert.writer import Output
from tnllm.errors import UserError, optional_import
from tnllm.modeling.hf_names import HEAD
from tnllm.modeling.int8 import quantize


def _is_projection(name: str) -> bool:
    return name.endswith("_proj.weight") or "channel_mixer" in name or "output_gate" in name


class RowQuantizer:
    """Every matrix, embedding and head included, as `weight` in int8 and `scale` (`tnllm.modeling.int8`)."""

    def covers(self, name: str) -> bool:
        """Whether the parameter with this tnllm name is quantized."""
        return _is_projection(name) or name in ("embed_tokens.weight", HEAD)

    def outputs(self, output: Output) -> tuple[list[Output], dict[str, str]]:
        """Return the tensors written for one matrix, and what they add to the file's metadata."""
        scale = f"{output.name.removesuffix('weight')}scale"
        parts = [
            Output(output.name, output.shape, torch.int8, lambda: quantize(output.make())[0]),
            Output(scale, output.shape[:1], torch.float32, lambda: quantize(output.make())[1]),
        ]
        return parts, {}

    def restore(self, name: str, parts: dict[str, Tensor], metadata: dict[str, str]) -> Tensor:
        """Return the dequantized matrix; `parts` are named as in the file."""
        weight, scale = parts.values()
        return weight * scale[:, None]


def quiet_import() -> None:
    """Silence torchao, which transformers imports too: it warns about every CUDA extension it cannot load."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Int8Quantizer:
    """Quantizes one tensor at a time, in torchao's int8 weight-only format; embedding and head stay as they are."""

    PLAIN = json.dumps({"_type": "Tensor"})  # metadata of a tensor that is not quantized

    def __init__(self) -> None:
        """Raises MissingExtra without torchao."""
        quiet_import()
        with optional_import("quantize", "torchao"):
            from torchao.prototype.safetensors import safetensors_support
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        self._config, self._quantize = Int8WeightOnlyConfig(version=2), quantize_
        self._support = safetensors_support
        self._known: dict[tuple[tuple[int, ...], torch.dtype], tuple[dict[str, Tensor], str]] = {}

    def covers(self, name: str) -> bool:
        return _is_projection(name)

    def config_values(self) -> dict[str, Any]:
        from transformers import TorchAoConfig

        return TorchAoConfig(self._config, modules_to_not_convert=["lm_head", "embed_tokens"]).to_dict()

    def outputs(self, output: Output) -> tuple[list[Output], dict[str, str]]:
        """Return the tensors written for one matrix, and its entry in the file's metadata."""
        module, _, leaf = output.name.rpartition(".")
        assert leaf == "weight"
        if output.shape[0] % 4:
            raise UserError(f"{output.name} has {output.shape[0]} rows; int8 needs a multiple of 4")
        form = (output.shape, output.dtype)
        if form not in self._known:
            parts, metadata = self._flatten(torch.zeros(output.shape, dtype=output.dtype))
            self._known[form] = {name: part[:1].clone() for name, part in parts.items()}, metadata
        examples, metadata = self._known[form]
        # The parts of a matrix are written one after another, so it is quantized once for all of them.
        made: dict[str, Tensor] = {}

        def make(part: str) -> Callable[[], Tensor]:
            def take() -> Tensor:
                if part not in made:
                    made.update(self._flatten(output.make())[0])
                return made.pop(part)

            return take

        rows = output.shape[0]
        split = [
            Output(f"{module}._weight_{part}", (rows, *example.shape[1:]), example.dtype, make(part))
            for part, example in sorted(examples.items(), key=lambda item: -item[1].itemsize)
        ]
        return split, {output.name: metadata}

    def _flatten(self, weight: Tensor) -> tuple[dict[str, Tensor], str]:
        linear = nn.Linear(1, 1, bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        self._quantize(linear, self._config)
        parts, metadata = self._support.flatten_tensor_state_dict({"m.weight": linear.weight})
        prefix = "m._weight_"
        return {name.removeprefix(prefix): part for name, part in parts.items()}, metadata["m.weight"]

    def restore(self, name: str, parts: dict[str, Tensor], metadata: dict[str, str]) -> Tensor:
        wanted = {name: metadata[name], "tensor_names": json.dumps([name])}
        values, _ = self._support.unflatten_tensor_state_dict(parts, wanted)
        return values[name].dequantize()
