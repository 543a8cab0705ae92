"""Conversion between the released checkpoints, tnllm weights, training checkpoints and Hugging Face folders.

from tnllm.convert.run import Options, convert
report = convert(Path("TransNormerLLM-385M"), Path("385m-hf"), Options(to="hf"), log=print, progress=lambda *_: None)
"""
