"""The code that travels in a Hugging Face folder; `tnllm.convert.hf_folder` writes it there, with the layers of modeling.

The files are read as text. Inside this package the layers use registered operators, which know no padding.
"""
