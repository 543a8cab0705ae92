"""A recipe's data as loaders: text is tokenized once into a cache, token shards are read as they are."""

from pathlib import Path

from tnllm import assets
from tnllm.data.encode import Options
from tnllm.data.loader import Loader, Source
from tnllm.data.progress import progress_on_stderr
from tnllm.data.shards import TokenStream, is_shard_folder
from tnllm.data.tokenize import SAMPLE, prepare
from tnllm.errors import UserError
from tnllm.tokenizer import Tokenizer
from tnllm.training.config import DataSource, RunConfig

DEFAULT_SOURCES = (DataSource(path=SAMPLE, weight=None),)


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The recipe's tokenizer; where it names none, that of its first shard folder, or the packaged one.

    Raises UserError where it has more pieces than the model has rows.
    """
    sources = config.data.path or DEFAULT_SOURCES
    first = Path(sources[0].path)
    if config.tokenizer.path is not None:
        tokenizer = Tokenizer.load(config.tokenizer.path)
    elif is_shard_folder(first):
        tokenizer = Tokenizer.load(first)
    else:
        tokenizer = Tokenizer.load(assets.tokenizer_model())
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, more than model.vocab_size "
            f"{config.model.vocab_size}; raise model.vocab_size or use a smaller tokenizer"
        )
    return tokenizer


def open_loaders(
    config: RunConfig, tokenizer: Tokenizer, rank: int = 0, world_size: int = 1
) -> tuple[Loader, Loader | None]:
    """The shuffled training loader, and the validation loader in order (None where nothing is held out).

    `rank` of `world_size` says which rows of a step are this process's.
    """
    data = config.data
    options = Options(field=data.field, val_fraction=data.val_fraction)
    train, held_out = [], []
    for source in data.path or DEFAULT_SOURCES:
        with progress_on_stderr(f"tokenizing {source.path}") as report:
            folder = prepare(source.path, tokenizer, options=options, report=report)
        train.append(Source(TokenStream.open(folder, "train"), source.weight))
        stream = TokenStream.open(folder, "val")
        if stream.num_tokens > 1:
            held_out.append(Source(stream))
    rows = config.global_batch_rows
    loader = Loader(train, data.seq_len, rows, config.train.seed, rank, world_size, packing=data.packing)
    if not held_out:
        return loader, None
    return loader, Loader(
        held_out, data.seq_len, world_size, rank=rank, world_size=world_size, packing=data.packing, shuffle=False
    )
