"""The code that travels in a Hugging Face folder; `tnllm.convert.hub` copies it there with its imports made relative."""
