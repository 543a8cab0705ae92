"""The tokenizer and the data loaders of a run.

    tokenizer = open_tokenizer(config.tokenizer.path, config.data, config.init_folder, config.model.vocab_size)
    train, validation = open_loaders(config.data, tokenizer, config.global_batch_rows, seed=0)
    config = planned(config)                           # without opening any: train.max_epochs as steps

Text is tokenized once into a cache, token shards are read as they are, conversations are tokenized and packed in memory.
"""

import hashlib
from itertools import chain
from pathlib import Path

from tnllm import assets
from tnllm.chat_template import split_template
from tnllm.data.corpus import find_files
from tnllm.data.encode import Options
from tnllm.data.instruct import find_instruction_files, read_conversations
from tnllm.data.instruct_loader import InstructLoader, pack
from tnllm.data.loader import Loader, Source
from tnllm.data.remote import is_remote, local_path
from tnllm.data.shards import TokenStream, is_shard_folder, read_manifest
from tnllm.data.stream import ChunkStream
from tnllm.data.tokenize import SAMPLE, prepare
from tnllm.errors import UserError
from tnllm.files import format_count
from tnllm.progress import corpus_progress, log
from tnllm.tokenizer import Tokenizer
from tnllm.training.config import RunConfig
from tnllm.training.run_model import chat_template
from tnllm.training.sections import DataSection, DataSource

DEFAULT_SOURCES = (DataSource(path=SAMPLE, weight=None),)


def open_tokenizer(given: str | None, data: DataSection, init: Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer `given` (tokenizer.path); without it that of the weights `init`, of the first shard folder, or ours.

    Raises UserError if it has more than `vocab_size` pieces, the rows of the model's embedding.
    """
    first = Path((data.path or DEFAULT_SOURCES)[0].path)
    if given not in (None, *assets.TOKENIZERS):
        tokenizer = Tokenizer.load(assets.tokenizer_model(given))
    elif init is not None:
        # Weights and shards must be read with the tokenizer they were made with; a packaged one is for text.
        tokenizer = Tokenizer.load(init)
    elif is_shard_folder(first):
        tokenizer = Tokenizer.load(first)
    else:
        tokenizer = Tokenizer.load(assets.tokenizer_model(given))
    advice = f"set model.vocab_size={tokenizer.vocab_size} or use a smaller tokenizer"
    tokenizer.check_vocabulary(vocab_size, advice)
    return tokenizer


AnyLoader = Loader | InstructLoader


def open_loaders(
    data: DataSection,
    tokenizer: Tokenizer,
    rows: int,
    seed: int,
    init: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    cache: Path | None = None,
) -> tuple[AnyLoader, AnyLoader | None]:
    """The training loader, shuffled, and the validation loader, in order (None if nothing is held out).

    `rows` of a step over all ranks, in the order of `seed`; `rank` of `world_size`: which of them this process reads.
    `init`: the weights that a run starts from, which may bring a chat template. `cache`: a folder of this run alone, for
    data.stream_gb; after use, close the training loader.
    """
    if data.format == "chat":
        return _open_conversations(data, tokenizer, rows, seed, init, rank, world_size)
    options = Options(field=data.field, val_fraction=0 if data.val_path else data.val_fraction)

    def streams(path: str) -> tuple[TokenStream, TokenStream]:
        with corpus_progress(f"tokenizing {path}") as report:
            folder = prepare(path, tokenizer, options=options, report=report)
        return TokenStream.open(folder, "train"), TokenStream.open(folder, "val")

    def chunked(path: str) -> tuple[TokenStream | ChunkStream, TokenStream]:
        if is_shard_folder(Path(path)):
            return streams(path)
        if cache is None:
            raise UserError("data.stream_gb is for tnllm train; set data.stream_gb=null here")
        disk_bytes = (data.stream_gb or 0) * 1e9
        stream = ChunkStream(path, cache, tokenizer, options, data.seq_len, disk_bytes, seed)
        return stream, stream.validation()

    sources = data.path or DEFAULT_SOURCES
    for path in (*(source.path for source in sources), *(data.val_path or ())):
        if not is_remote(path) and not assets.named(local_path(path)).exists():
            raise UserError(f"no such file or folder: {path} ({assets.SHIPPED})")
    train, held_out = [], []
    for source in sources:
        learned, kept = chunked(source.path) if data.stream_gb else streams(source.path)
        train.append(Source(learned, source.weight))
        held_out.append(kept)
    if data.val_path:
        held_out = [stream for path in data.val_path for stream in streams(path)]
    validated = [Source(stream) for stream in held_out if stream.num_tokens > 1]
    loader = Loader(train, data.seq_len, rows, seed, rank, world_size, packing=data.packing)
    if not validated:
        return loader, None
    return loader, Loader(
        validated, data.seq_len, world_size, rank=rank, world_size=world_size, packing=data.packing, shuffle=False
    )


def describe(loader: AnyLoader, samples: int) -> str:
    """How much data `samples` samples are, for people."""
    chunked = isinstance(loader, Loader) and loader.chunked
    what = "chunks of data that is tokenized while it is read" if chunked else "passes over the data"
    return f"{samples / loader.num_rows:.2f} {what}"


def planned(config: RunConfig) -> RunConfig:
    """`config` with the steps of train.max_epochs; where text is not tokenized yet, they are estimated from its size.

    Raises UserError if they are the only end of the run and the data is remote.
    """
    tokens = 0.0 if config.train.max_epochs is None else corpus_tokens(config.data)
    if tokens == 0 and config.train.max_steps is None and config.train.max_tokens is None:
        raise UserError(
            f"train.max_epochs is {config.train.max_epochs:g}, and the size of the data is unknown before it is "
            "tokenized; do that first (tnllm data tokenize), or set train.max_steps or train.max_tokens"
        )
    return config.with_epochs(tokens / config.data.seq_len) if tokens else config


def corpus_tokens(data: DataSection) -> float:
    """Tokens of the training data (0: unknown, some is remote), counted in shards; of text by size, four bytes a token."""
    default = assets.sample_corpus() if data.format == "text" else assets.sample_instructions()
    total = 0.0
    for path in [str(default)] if data.path is None else [source.path for source in data.path]:
        if is_remote(path):
            return 0.0
        place = assets.named(local_path(path))
        if is_shard_folder(place):
            total += read_manifest(place).total("tokens", "train")
            continue
        files = find_instruction_files(place) if data.format == "chat" else find_files([path])
        # Compressed text is about a quarter of its size.
        total += sum(
            file.stat().st_size / (1 if file.suffix in (".gz", ".zst", ".xz", ".bz2") else 4) for file in files
        )
    return total


def fingerprint(loader: AnyLoader) -> str:
    """A digest of what a loader reads: the content of its files and how that became tokens."""
    digest = hashlib.sha256()
    if isinstance(loader, Loader):
        for source in loader.sources:
            manifest = source.stream.manifest
            sums = [file.get("sha256") or (file["file"], file["version"], file["bytes"]) for file in manifest.inputs]
            digest.update(repr((sums, sorted(manifest.options.items()), source.stream.num_tokens)).encode())
    else:
        for ids in chain.from_iterable(source.ids for source in loader.sources):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return digest.hexdigest()


def _open_conversations(
    data: DataSection, tokenizer: Tokenizer, rows: int, seed: int, init: Path | None, rank: int, world_size: int
) -> tuple[InstructLoader, InstructLoader | None]:
    template = chat_template(data.chat_template, init)
    split_template(template)
    sources = data.path or (DataSource(path=str(assets.sample_instructions()), weight=None),)
    files = [find_instruction_files(source.path) for source in sources]
    weights = [source.weight for source in sources]
    if weights == [None] * len(weights):
        # Without weights all share the same rows, which leaves less padding.
        files, weights = [list(chain.from_iterable(files))], [None]
    packed = [pack(read_conversations(names), tokenizer, template, data.seq_len) for names in files]
    parts = [source.split(0 if data.val_path else data.val_fraction) for source in packed]
    train = [(part, weight) for (part, _), weight in zip(parts, weights, strict=True)]
    held_out = [(part, None) for _, part in parts if part.ids]
    if data.val_path:
        names = list(chain.from_iterable(find_instruction_files(path) for path in data.val_path))
        held_out = [(pack(read_conversations(names), tokenizer, template, data.seq_len), None)]
    loader = InstructLoader(train, rows, seed, rank, world_size)
    count, cut, dropped = (
        sum(numbers) for numbers in zip(*((len(p.ids), p.cut, p.dropped) for p in packed), strict=True)
    )
    log(
        f"{count} conversations ({cut} cut to data.seq_len, {dropped} more without an answer): "
        f"{sum(len(part.ids) for part, _ in train)} to learn from, {format_count(loader.num_labels)} answer tokens in "
        f"{loader.num_rows} rows; {sum(len(part.ids) for part, _ in held_out)} for validation"
    )
    if not held_out:
        return loader, None
    return loader, InstructLoader(held_out, world_size, rank=rank, world_size=world_size, shuffle=False)
