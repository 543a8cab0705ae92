"""Which tensors the result holds, under which names, and how each is made from the source.

plan = make_plan(source, "hf", torch.bfloat16, quantize=None)
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tnllm.convert.llama import check_llama, llama_outputs
from tnllm.convert.official import to_official_config
from tnllm.convert.quantize import Int8Quantizer, RowQuantizer
from tnllm.convert.source import Source
from tnllm.convert.tensors import Tensors
from tnllm.convert.writer import Output
from tnllm.errors import RunError, UserError
from tnllm.modeling.hf_names import HEAD, to_official


@dataclass(frozen=True)
class Plan:
    """The tensors of the result. `by_name` maps tnllm's parameter names to the tensors written for them."""

    to: str
    dtype: torch.dtype
    rounds: bool  # whether the cast to `dtype` loses precision
    by_name: dict[str, list[Output]]
    quantizer: Int8Quantizer | RowQuantizer | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def outputs(self) -> list[Output]:
        """All tensors, in the source's order."""
        return [output for outputs in self.by_name.values() for output in outputs]

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)

    def reader(self, tensors: Tensors) -> Callable[[str], Tensor]:
        """Return a function that reads the written result by tnllm's names: int8 matrices dequantized, cut ones joined."""

        def read(name: str) -> Tensor:
            parts = {output.name: tensors.read(output.name) for output in self.by_name[name]}
            if self.quantizer is None or not self.quantizer.covers(name):
                return torch.cat(list(parts.values()))
            return self.quantizer.restore(to_official(name), parts, self.metadata)

        return read


def make_plan(source: Source, to: str, dtype: torch.dtype | None, quantize: str | None) -> Plan:
    """Plan names, shapes and dtypes of the result. Raises UserError for what the target format cannot hold."""
    config = source.config
    own_int8 = quantize is not None and to == "tnllm"
    if own_int8 and dtype is not None:
        raise UserError("--quantize int8 with --to tnllm keeps float32 beside the int8 matrices; leave out --dtype")
    target = torch.float32 if own_int8 else dtype or source.dtype
    if to == "official":
        if quantize:
            raise UserError("--quantize is for --to tnllm, hf, onnx and web, not --to official")
        to_official_config(config, {}, target)
    rounds = any(torch.promote_types(each, target) != target for each in source.dtypes())
    if to == "hf" and config.kind == "transformer":
        check_llama(config)
        if quantize:
            raise UserError("--quantize is for TransNormerLLM; quantize the baseline's folder with transformers")
        outputs = llama_outputs(source, target, lambda name: _maker(source, name, target))
        return Plan(to, target, rounds, outputs, None, {"format": "pt"})
    quantizer = None if not quantize else RowQuantizer() if own_int8 else Int8Quantizer()
    by_name: dict[str, list[Output]] = {}
    metadata = {"format": "pt"}
    for name, shape in source.expected.items():
        written = _theta_dtype(source, name, to, target) if name.endswith("lrpe.theta") else target
        key = name if to == "tnllm" else to_official(name)
        output = Output(key, shape, written, _maker(source, name, written))
        by_name[name] = [output]
        if quantizer is not None and quantizer.covers(name):
            by_name[name], part_metadata = quantizer.outputs(output)
            metadata.update(part_metadata)
        elif isinstance(quantizer, Int8Quantizer):
            metadata[key] = quantizer.PLAIN
        if to == "official" and name == "embed_tokens.weight" and HEAD not in source.expected:
            by_name[name].append(Output(HEAD, shape, written, output.make))
    if isinstance(quantizer, Int8Quantizer):
        metadata["tensor_names"] = json.dumps([key for key in metadata if key != "format"])
    return Plan(to, target, rounds, by_name, quantizer, metadata)


def _theta_dtype(source: Source, name: str, to: str, target: torch.dtype) -> torch.dtype:
    """LRPE's frequencies stay fp32; a released file stores them in `target` where that loses nothing."""
    if to != "official" or source.keys[name] not in source.tensors.infos:
        return torch.float32
    value = source.read(name)
    return target if torch.equal(value.to(target).double(), value.double()) else torch.float32


def _maker(source: Source, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def make() -> Tensor:
        value = source.read(name).to(dtype)
        if not torch.isfinite(value).all():
            raise RunError(f"{name} overflows {str(dtype).removeprefix('torch.')}; convert to bfloat16 or float32")
        return value

    return make
