"""What a run makes of its config's sections, for tests that need one part of it."""

import torch

from tnllm.modeling.model import LanguageModel
from tnllm.tokenizer import Tokenizer
from tnllm.training.config import RunConfig
from tnllm.training.estimate import Memory, estimate_memory
from tnllm.training.loaders import AnyLoader, open_loaders, open_tokenizer
from tnllm.training.run_model import make_model


def tokenizer_of(config: RunConfig) -> Tokenizer:
    return open_tokenizer(config.tokenizer.path, config.data, config.init_folder, config.model.vocab_size)


def loaders_of(config: RunConfig) -> tuple[AnyLoader, AnyLoader | None]:
    """For training and for validation."""
    rows, seed = config.global_batch_rows, config.train.seed
    return open_loaders(config.data, tokenizer_of(config), rows, seed, config.init_folder)


def memory_of(config: RunConfig, low_precision: bool | None = None) -> Memory:
    sections = config.model, config.lora, config.train, config.parallel, config.data.seq_len
    return estimate_memory(*sections, low_precision=low_precision)


def model_of(config: RunConfig, low: bool = False) -> LanguageModel:
    return make_model(config.model, config.lora, config.train, config.init_folder, torch.device("cpu"), low)
