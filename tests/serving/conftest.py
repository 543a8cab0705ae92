"""The same small tokenizer and model as the tests of generation."""

from tests.generation.conftest import model, tokenizer

__all__ = ["model", "tokenizer"]
