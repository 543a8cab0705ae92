"""tnllm: train, evaluate and serve TransNormerLLM, the linear-attention large language model."""

__version__ = "0.1.0"
