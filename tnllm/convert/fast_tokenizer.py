"""Hugging Face's fast tokenizer for a SentencePiece BPE model or a tiktoken vocabulary, compared with the original.

    files, notes = tokenizer_files(Tokenizer.load(folder), generation)     # file name → text

The two must give the same ids on texts in several scripts and languages. If they do not (a Unigram model, or one that
normalizes its input), no tokenizer.json is written: wrong ids would be worse than a missing file.
"""

import json
from itertools import pairwise
from typing import Any

from tnllm.chat_template import BOUNDARY, BREAK, DEFAULT, split_template, to_jinja
from tnllm.errors import optional_import
from tnllm.tokenizer import TIKTOKEN_PATTERN, TIKTOKEN_SPECIAL_TOKENS, TiktokenModel, Tokenizer

CHECK_TEXTS = (
    "Once upon a time there was a king; he had 3 sons, and 1,024 sheep.",
    "  two spaces,\ttab\nnewline\r\n\n   end ",
    "def f(x: int) -> str:\n    return f'{x:>08.3f}' if x != 0 else \"zero\"\n",
    "从前有一个国王，他有三个儿子。春眠不覺曉，處處聞啼鳥。",
    "Ünïcödé naïve Straße Ελληνικά кириллица العربية עברית हिन्दी ไทย 日本語 한국어",
    "👩‍👩‍👧‍👦 𠀀 １２３ ﬁ e\u0301 \ufeff\u200b",
    "It's we'll I'd THEY'RE 2024-01-31T12:00:00Z http://example.org/a?b=c&d=%20",
    "x" * 40 + " " * 17 + "1234567890" * 3,
    '<b>&amp;</b> {"k": [1, 2.5e-3, null]} \\frac{a}{b}',
)
_SPACE = "\u2581"


def tokenizer_files(
    tokenizer: Tokenizer, generation: dict[str, Any], own_code: bool = False
) -> tuple[dict[str, str], list[str]]:
    """Return file name → text, and notes for people. `generation` is generation_config.json; `own_code`: the folder has it.

    Raises MissingExtra without the tokenizers library.
    """
    with optional_import("hf", "tokenizers"):
        import tokenizers  # noqa: F401
    add_bos = bool(generation.get("add_bos_token", False))
    template = generation.get("chat_template", DEFAULT)
    boundary = _needs_boundary(tokenizer, split_template(template)[1])
    fast = _build(tokenizer, add_bos, boundary)
    differing = [
        text for text in CHECK_TEXTS if fast.encode(text, add_special_tokens=False).ids != tokenizer.encode(text)
    ]
    if differing:
        return {}, [
            f"no tokenizer.json: the fast form of {tokenizer.path.name} reads {len(differing)} of {len(CHECK_TEXTS)} check "
            f"texts differently, first {differing[0][:20]!r}; use {tokenizer.path.name} with its own library"
        ]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # The same, with trust_remote_code: it saves the original file too.
        **({"auto_map": {"AutoTokenizer": [None, "tokenization_tnllm.TnllmTokenizer"]}} if own_code else {}),
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "unk_token": tokenizer.piece(tokenizer.unk_id),
        "pad_token": tokenizer.piece(tokenizer.pad_id),
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        # Generation continues from a batch's last column.
        "padding_side": "left",
        "chat_template": to_jinja(
            template,
            control_tokens=_control_tokens(tokenizer),
            bos=tokenizer.piece(tokenizer.bos_id) if add_bos else "",
            boundary=boundary,
            answer_prefix=" " if _adds_space(tokenizer) else "",
        ),
    }
    return {
        "tokenizer.json": fast.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }, []


def _control_tokens(tokenizer: Tokenizer) -> list[str]:
    """Names that the fast tokenizer reads as one token anywhere in a text; ids without a name are gaps."""
    ids = [id for id, data in enumerate(tokenizer.token_bytes) if not data or id == tokenizer.unk_id]
    return [name for name in map(tokenizer.piece, ids) if name]


def _adds_space(tokenizer: Tokenizer) -> bool:
    return tokenizer.token_bytes[tokenizer.encode("a")[0]].startswith(b" ")


def _needs_boundary(tokenizer: Tokenizer, closing: str) -> bool:
    """Whether the end of a prompt could merge with the start of its answer into one token.

    A newline cannot if no piece of the vocabulary contains a newline and another character.
    """
    joins = any(b"\n" in piece and piece != b"\n" for piece in tokenizer.token_bytes)
    return joins or not closing.endswith("\n") or _adds_space(tokenizer)


def _build(tokenizer: Tokenizer, add_bos: bool, boundary: bool) -> Any:
    from tokenizers import normalizers, pre_tokenizers, processors

    model = tokenizer.backend
    fast = (
        _from_tiktoken(model)
        if isinstance(model, TiktokenModel)
        else _from_sentencepiece(model, _adds_space(tokenizer))
    )
    # The marks of `to_jinja`: see there.
    breaks = sorted({name[0] for name in _control_tokens(tokenizer)})
    steps = [normalizers.Replace(first + BREAK, first) for first in breaks]
    fast.normalizer = normalizers.Sequence([*steps, fast.normalizer] if fast.normalizer else steps)
    if boundary:
        split = pre_tokenizers.Split(BOUNDARY, behavior="removed")
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, fast.pre_tokenizer]) if fast.pre_tokenizer else split
    if add_bos:
        bos = tokenizer.piece(tokenizer.bos_id)
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)]
        )
    return fast


def _from_sentencepiece(model: Any, adds_space: bool) -> Any:
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Fast

    ids = range(model.vocab_size())
    pieces = [model.id_to_piece(id) for id in ids]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    special = [id for id in ids if model.is_control(id) or model.is_unknown(id)]
    # User-defined symbols are matched before any merge. SentencePiece does not tell them from learned pieces, but those
    # that `tnllm tokenizer train` defines are newline and tab, which are never learned.
    fixed = [id for id in ids if pieces[id] in ("\n", "\t")]
    skipped = {*special, *fixed, *(id for id in ids if model.is_byte(id))}
    learned = {piece for id, piece in enumerate(pieces) if id not in skipped}
    merges = []
    for id in ids:
        if id in skipped or len(pieces[id]) < 2:
            continue
        piece = pieces[id]
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(vocab[a], vocab[b], a, b) for a, b in halves if a in learned and b in learned]
        merges += [(-model.get_score(id), id, *pair) for pair in sorted(pairs)]
    merges.sort(key=lambda merge: merge[:4])
    fast = Fast(
        models.BPE(
            vocab=vocab,
            merges=[(a, b) for *_, a, b in merges],
            unk_token=pieces[model.unk_id()],
            byte_fallback=all(f"<0x{byte:02X}>" in vocab for byte in range(256)),
            fuse_unk=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if adds_space else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if adds_space else steps)
    fast.add_special_tokens([AddedToken(pieces[id], normalized=False, special=True) for id in special])
    fast.add_tokens([AddedToken(pieces[id], normalized=False, special=False) for id in fixed])
    return fast


def _from_tiktoken(model: TiktokenModel) -> Any:
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    characters = _byte_characters()

    def spell(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in model.ranks.items()}
    merges = [_parts(token, rank, model.ranks) for token, rank in sorted(model.ranks.items(), key=lambda item: item[1])]
    # Ids must be contiguous, so the gaps between ranks and control tokens get placeholder tokens.
    names = {id: name for name, id in TIKTOKEN_SPECIAL_TOKENS.items()}
    taken = set(vocab.values())
    extra = {id: names.get(id, f"<|unused_{id}|>") for id in range(model.vocab_size()) if id not in taken}
    vocab.update({name: id for id, name in extra.items()})
    pairs = [(spell(parts[0]), spell(parts[1])) for parts in merges if parts]
    fast = Fast(models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(TIKTOKEN_PATTERN), behavior="isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in TIKTOKEN_SPECIAL_TOKENS])
    return fast


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that merge into `token`: what is left after all merges of lower rank. Empty for a single byte."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merges = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts))]
        lowest, at = min(merges)
        if lowest >= rank:
            return []  # not reachable by merges; `ignore_merges` still matches the complete token
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts if len(parts) == 2 else []


def _byte_characters() -> list[str]:
    """GPT-2's printable character of each byte in byte-level vocabularies: its own, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]
