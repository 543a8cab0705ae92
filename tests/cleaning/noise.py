"""Noise of known kinds added to clean text: makes the dirty sample in the package, and inputs for tests.

    python -m tests.cleaning.noise sample OUT [JAPANESE.txt]   # tnllm/assets/dirty, byte for byte
    python -m tests.cleaning.noise mix CORPUS OUT [DOCUMENTS]  # excerpts of a corpus, a fifth of them with noise
    python -m tests.cleaning.noise mix CORPUS OUT whole        # the same of all its text, not of each document's start
    python -m tests.cleaning.noise thin NOISY OUT KEPT         # of NOISY, as many bytes as KEPT has, drawn at random
    python -m tests.cleaning.noise clean NOISY OUT             # of NOISY, what has no noise

Run it in a checkout. Text comes from the sample corpus that ships (public domain and MIT; see tnllm/assets/NOTICE), the
Japanese from the second argument (of the sample that ships: wagahaiwa_nekodearu.txt of google/sentencepiece). Everything
else is made here, from a fixed seed. The field `noise` of each record names what was done to it ("none" for most), so
that a cleaning run can count what it removed of each kind.
"""

import json
import lzma
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tnllm import assets
from tnllm.cleaning.hashing import token_hashes
from tnllm.cleaning.records import RecordWriter, read_records
from tnllm.data.corpus import find_files
from tnllm.data.remote import read_documents
from tnllm.files import write_bytes_atomic

SEED = 20261124
CHARS_EN, CHARS_ZH = 800, 260
COUNTS = {"en": 340, "zh": 340}
HELD_OUT = 60
# Kind → how many of each. Cleaning should repair and keep the first group, and remove the second.
REPAIRED = {"tags": 24, "broken encoding": 24, "personal data": 24, "boilerplate lines": 24}
REMOVED = {
    "shuffled": 60,
    "gibberish": 40,
    "lost encoding": 30,
    "boilerplate page": 30,
    "keywords": 30,
    "repetition": 30,
    "foreign": 40,
    "fragment": 30,
    "exact copy": 40,
    "near copy": 40,
    "evaluation text": 12,
}

_FOREIGN = (
    "Commandez maintenant et recevez votre cadeau sans frais de port. Nos conseillers vous rappellent dans la journée.",
    "Les meilleurs hôtels de la région vous attendent. Profitez de nos offres spéciales pour les vacances d'été.",
    "Bestellen Sie jetzt und sparen Sie die Versandkosten. Unsere Berater rufen Sie noch heute gerne zurück.",
    "Die besten Angebote für Ihren Urlaub finden Sie bei uns. Wir freuen uns auf Ihren Besuch in unserem Geschäft.",
    "Compre ahora y reciba su regalo sin gastos de envío. Nuestros asesores le llaman durante el mismo día.",
    "Los mejores precios para sus vacaciones están aquí. Descubra todas las ofertas de nuestra tienda esta semana.",
    "Закажите сейчас и получите подарок без оплаты доставки. Наши консультанты перезвонят вам в течение дня.",
    "Лучшие предложения для вашего отпуска. Приходите в наш магазин и узнайте обо всех скидках этой недели.",
)
_LINES_EN = (
    "Home | About | Products | News | Contact",
    "We use cookies to give you the best experience. Accept all cookies",
    "Read our privacy policy and terms of use",
    "Copyright © 2019 All rights reserved.",
    "Sign up for our newsletter",
    "Share this on Facebook",
    "Please enable JavaScript to view this page",
    "Click here to read more",
)
_LINES_ZH = (
    "首页 > 新闻 > 正文",
    "版权所有，未经许可不得转载",
    "扫一扫关注微信公众号",
    "上一篇：没有了",
    "下一篇：没有了",
    "点击查看更多精彩内容",
    "京ICP备00000000号",
    "责任编辑：小王",
)
_KEYWORDS_EN = (
    "cheap best buy discount online shoes watches hotel flights insurance loans credit free download mp3 games"
)
_KEYWORDS_ZH = "批发 代理 厂家 价格 图片 品牌 招商 加盟 热线 优惠 促销 团购 包邮 正品 折扣 货源 供应 出售 求购 二手"
_EVALUATION = (
    "A farmer fills three barrels with rain water every second day of a dry month; how many barrels are full at its end?",
    "Which of the four instruments in the captain's cabin would tell a sailor that a storm is coming before the sky does?",
    "If every lamp in the long corridor is lit by the one before it, which lamp must be lit by hand and why that one?",
    "Name the river that the old map of the province draws twice, and say which of the two beds the water left behind.",
    "某县有三座粮仓，每座每月发放同样多的粮食，若其中一座在第五个月关闭，其余两座应各自增加多少才能保持总数不变？",
    "下列四种乐器之中，哪一种在古代的军队里既用来传达进攻的命令，又用来在夜间报告更次，为什么选择它而不是别的乐器？",
)


def counts_characters(text: str) -> bool:
    """Whether a text is Chinese, Japanese or Korean."""
    return not text.isascii() and token_hashes(text)[1]


def shuffle(text: str, rng: random.Random) -> str:
    """The same words (Chinese: characters) in random order; punctuation stays in position."""
    if counts_characters(text):
        letters = [character for character in text if character.isalnum()]
        rng.shuffle(letters)
        return "".join(letters.pop() if character.isalnum() else character for character in text)
    words = re.findall(r"[^\W\d_]+", text)
    rng.shuffle(words)
    return re.sub(r"[^\W\d_]+", lambda match: words.pop(), text)


def gibberish(text: str, rng: random.Random) -> str:
    """Words of random letters, or random common characters, as long as `text`."""
    if counts_characters(text):
        return re.sub(r"\w", lambda match: chr(rng.randrange(0x4E00, 0x9FA5)), text)
    return re.sub(r"[A-Za-z]", lambda match: rng.choice("abcdefghijklmnopqrstuvwxyz"), text)


def lose_encoding(text: str, rng: random.Random) -> str:
    """Decoded in the wrong encoding with bytes lost: cannot be repaired."""
    data = text.encode("utf-8" if not counts_characters(text) else "gb18030")
    if not counts_characters(text):
        data = bytes(byte ^ (0x80 if rng.random() < 0.3 else 0) for byte in data)
    return data.decode("latin-1" if counts_characters(text) else "utf-8", "replace")


def break_encoding(text: str, rng: random.Random) -> str:
    """UTF-8 decoded as Latin-1, which ftfy undoes."""
    return (text.replace("'", "’").replace('"', "”")).encode().decode("latin-1")


def edit(text: str, rng: random.Random) -> str:
    """A near copy: one word (Chinese: one character) in a hundred replaced by another of the text."""
    parts = list(text) if counts_characters(text) else re.split(r"( )", text)
    indices = [index for index, part in enumerate(parts) if part.strip()]
    for index in rng.sample(indices, max(1, len(indices) // 100)):
        parts[index] = parts[rng.choice(indices)]
    return "".join(parts)


def add_tags(text: str, rng: random.Random) -> str:
    """Like a page from a careless scraper."""
    paragraphs = "".join(f'<p class="c{rng.randrange(9)}">{part}</p>\n' for part in text.split("\n") if part.strip())
    return f"<div id=main><!-- begin -->{paragraphs}&nbsp;<script>var a = 1;</script></div>"


def add_personal(text: str, rng: random.Random) -> str:
    """A line with invented addresses and numbers."""
    mail = f"{rng.choice(['li.wei', 'j.smith', 'office'])}{rng.randrange(99)}@example.org"
    if counts_characters(text):
        return f"{text}\n联系人邮箱{mail}，电话139{rng.randrange(10**7, 10**8)}，服务器8.8.{rng.randrange(9)}.8。"
    number = f"(555) {rng.randrange(200, 999)}-{rng.randrange(1000, 9999)}"
    return f"{text}\nWrite to {mail} or call {number}; the server is 8.8.{rng.randrange(9)}.8."


def add_lines(text: str, rng: random.Random) -> str:
    """Two lines of navigation and notices around the text."""
    lines = _LINES_ZH if counts_characters(text) else _LINES_EN
    return f"{rng.choice(lines)}\n{text}\n{rng.choice(lines)}"


def _page(text: str, rng: random.Random) -> str:
    lines = _LINES_ZH if counts_characters(text) else _LINES_EN
    return "\n".join(rng.choice(lines) for _ in range(rng.randrange(8, 20)))


def _keywords(text: str, rng: random.Random) -> str:
    words = (_KEYWORDS_ZH if counts_characters(text) else _KEYWORDS_EN).split()
    return " ".join(rng.choice(words) for _ in range(rng.randrange(80, 200)))


def _repetition(text: str, rng: random.Random) -> str:
    line = next((part for part in re.split(r"(?<=[.。！？!?])", text) if len(part) > 15), text[:40]).strip()
    return "\n".join([line] * rng.randrange(10, 30))


def _foreign(text: str, rng: random.Random) -> str:
    start = rng.randrange(0, len(_FOREIGN), 2)
    return " ".join(rng.choice(_FOREIGN[start : start + 2]) for _ in range(rng.randrange(4, 9)))


def _fragment(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(10, 40)].strip()


def _contaminate(text: str, rng: random.Random) -> str:
    chosen = _EVALUATION[4:] if counts_characters(text) else _EVALUATION[:4]
    middle = text.find("\n", len(text) // 2)
    return f"{text[:middle]}\n{rng.choice(chosen)}\n{text[middle:].strip()}"


_MAKERS: dict[str, Callable[[str, random.Random], str]] = {
    "tags": add_tags,
    "broken encoding": break_encoding,
    "personal data": add_personal,
    "boilerplate lines": add_lines,
    "shuffled": shuffle,
    "gibberish": gibberish,
    "lost encoding": lose_encoding,
    "boilerplate page": _page,
    "keywords": _keywords,
    "repetition": _repetition,
    "foreign": _foreign,
    "fragment": _fragment,
    "exact copy": lambda text, rng: text,
    "near copy": edit,
    "evaluation text": _contaminate,
}


def sample_excerpts(rng: random.Random) -> dict[str, list[tuple[str, str]]]:
    """Language → (source, text) pieces of the sample corpus, cut at line ends, in random order."""
    excerpts: dict[str, list[tuple[str, str]]] = {"en": [], "zh": []}
    for document in read_documents([assets.sample_corpus()]):
        language, size = document.record["lang"], 0
        limit = CHARS_EN if language == "en" else CHARS_ZH
        part: list[str] = []
        for line in document.text.split("\n"):
            part.append(line)
            size += len(line)
            if size >= limit:
                text = "\n".join(part).strip("\n")
                if size < 3 * limit:
                    excerpts[language].append((document.record["source"].split("/")[0], text))
                part, size = [], 0
    for pieces in excerpts.values():
        rng.shuffle(pieces)
    return excerpts


def dirty_records(japanese: str, seed: int = SEED) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pages, in random order, and the clean held-out records."""
    rng = random.Random(seed)
    pieces = sample_excerpts(rng)
    held_out = [{"text": text, "source": source} for language in COUNTS for source, text in pieces[language][:HELD_OUT]]
    fresh = {language: iter(pieces[language][HELD_OUT:]) for language in COUNTS}
    records: list[dict[str, Any]] = []
    for language, count in COUNTS.items():
        for _ in range(count):
            source, text = next(fresh[language])
            records.append({"text": text, "source": source, "noise": "none"})
    clean = list(records)
    for kind, count in {**REPAIRED, **REMOVED}.items():
        for number in range(count):
            copied = kind in ("exact copy", "near copy")
            original = clean[number * 7 % len(clean)] if copied else {}
            source, text = (
                (original["source"], original["text"]) if copied else next(fresh["zh" if number % 2 else "en"])
            )
            records.append({"text": _MAKERS[kind](text, rng), "source": source, "noise": kind})
    for start in range(0, 8 * 400, 400):
        records.append({"text": japanese[20_000 + start : 20_400 + start], "source": "novels", "noise": "foreign"})
    rng.shuffle(records)
    return records, held_out


def write_sample(out: Path, japanese: str) -> None:
    """Four compressed files of pages, the held-out text, and the invented evaluation set."""
    records, held_out = dirty_records(japanese)
    (out / "pages").mkdir(parents=True, exist_ok=True)
    for part in range(4):
        lines = list(_json_lines(records[part::4], f"page-{part}"))
        if part == 3:
            # Unreadable records: half a record, bytes that are not UTF-8, no text field.
            lines[40:40] = [b'{"text": "half a rec\n', b'{"text": "caf\xe9 au lait"}\n', b'{"body": "no text here"}\n']
        write_bytes_atomic(out / "pages" / f"page-{part}.jsonl.xz", lzma.compress(b"".join(lines), preset=9))
    write_bytes_atomic(out / "held-out.jsonl.xz", lzma.compress(b"".join(_json_lines(held_out, "held")), preset=9))
    questions = "".join(json.dumps({"question": text}, ensure_ascii=False) + "\n" for text in _EVALUATION)
    write_bytes_atomic(out / "evaluation.jsonl", questions.encode())


def _json_lines(records: list[dict[str, Any]], name: str) -> Iterator[bytes]:
    for number, record in enumerate(records):
        line = json.dumps({"id": f"{name}-{number:04d}", **record}, ensure_ascii=False)
        yield line.encode("utf-8", "replace") + b"\n"


def mix(corpus: Path, out: Path, documents: int, seed: int = SEED, whole: bool = False) -> None:
    """OUT/noisy.jsonl.gz: excerpts of `corpus`, 4 % of each kind that shows in the text alone; OUT/held-out.jsonl.gz.

    An excerpt has at most 1,200 characters (Chinese: 400). Each document gives its first, so none repeats another; if
    `whole`, all of them. No document is in both files.
    """
    rng = random.Random(seed)
    pieces = []
    for document in read_documents(find_files([corpus])):
        limit = 400 if counts_characters(document.text[:400]) else 1200
        end = len(document.text) if whole else limit
        texts = [document.text[start : start + limit].strip() for start in range(0, end, limit)]
        if kept := [text for text in texts if len(text) > limit // 3]:
            pieces.append((str(document.record.get("source", corpus.stem)), kept))
    rng.shuffle(pieces)
    pieces = pieces[:documents]
    share = len(pieces) // 25
    with RecordWriter(out / "held-out.jsonl.gz") as writer:
        for source, texts in pieces[:share]:
            for text in texts:
                writer.write({"text": text, "source": source})
    kinds = ("shuffled", "gibberish", "lost encoding", "keywords", "foreign")
    excerpts = ((source, text) for source, texts in pieces[share:] for text in texts)
    with RecordWriter(out / "noisy.jsonl.gz") as writer:
        for number, (source, text) in enumerate(excerpts):
            kind = kinds[number % 25] if number % 25 < len(kinds) else "none"
            made = text if kind == "none" else _MAKERS[kind](text, rng)
            writer.write({"text": made, "id": f"{number:06d}", "source": source, "noise": kind})


def thin(noisy: Path, out: Path, kept: Path, seed: int = SEED) -> None:
    """OUT: records of `noisy`, drawn at random, with as many bytes of text as the corpus `kept`; in their order."""
    records = list(read_records(noisy))
    left = sum(len(document.text.encode()) for document in read_documents(find_files([kept])))
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    chosen = set()
    for number in order:
        if left <= 0:
            break
        chosen.add(number)
        left -= len(str(records[number]["text"]).encode())
    with RecordWriter(out) as writer:
        for number in sorted(chosen):
            writer.write(records[number])


def without_noise(noisy: Path, out: Path) -> None:
    """OUT: the records of `noisy` that are as they were, which no cleaning can better."""
    with RecordWriter(out) as writer:
        for record in read_records(noisy):
            if record["noise"] == "none":
                writer.write(record)


def main(command: str, *arguments: str) -> None:
    """Run one of the commands above."""
    paths = [Path(argument) for argument in arguments]
    if command == "mix":
        whole = arguments[2:] == ("whole",)
        mix(*paths[:2], 1 << 60 if whole or len(paths) < 3 else int(arguments[2]), whole=whole)
    elif command == "thin":
        thin(*paths)
    elif command == "clean":
        without_noise(*paths)
    else:
        write_sample(paths[0], paths[1].read_text("utf-8") if len(paths) > 1 else "")


if __name__ == "__main__":
    main(*sys.argv[1:])
