"""Repair of single texts: encodings, HTML remnants, punctuation, boilerplate lines, personal data. Pure functions.

repair("schÃ¶n &amp; gut!!!!")                # "schön & gut!"
remove_boilerplate(text)                      # (text without "Accept cookies" lines and the like, characters removed)
mask_personal_data("mail bob@example.com")    # ("mail <email>", 1)

Order and exceptions follow the paper's list (arXiv 2307.14995, appendix D): tags and URLs, garbled strings, repeated
punctuation, special characters, number forms. Markdown and LaTeX structure is kept.
"""

import html
import ipaddress
import re
from collections.abc import Iterable

_TAGS = "a abbr article aside b blockquote body br button center code div em font footer form h1 h2 h3 h4 h5 h6 head"
_TAGS += " header hr html i iframe img input label li link main meta nav object ol option p pre script section select"
_TAGS += " small span strong style sub sup table tbody td th thead title tr u ul video"
_TAG = re.compile(rf"</?(?:{'|'.join(_TAGS.split())})(?:\s[^<>]{{0,2000}})?/?>", re.IGNORECASE)
_BREAK = re.compile(r"<(?:br|/p|/div|/li|/tr|/h[1-6])\s{0,9}/?>\n?", re.IGNORECASE)
_CODE = re.compile(r"<(script|style)\b[^<>]{0,2000}>|<!--", re.IGNORECASE)
_CODE_ENDS = {
    "script": re.compile(r"</script\s{0,9}>", re.IGNORECASE),
    "style": re.compile(r"</style\s{0,9}>", re.IGNORECASE),
    None: re.compile("-->"),
}
_ENTITY = re.compile(r"&(?:[a-zA-Z]{2,8}|#\d{1,6}|#x[0-9a-fA-F]{1,5});")
_URL = re.compile(r" ?(?:https?://|www\.)[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")
# Dots, dashes, stars, hashes, bars, dollars and backslashes are Markdown and LaTeX syntax, so they are not collapsed.
_REPEATED = re.compile(r"([!?,;~！？，。、；～])\1+")
# Zero-width, bidirectional and other invisible characters, private use, byte order marks; not the joiners of emoji.
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ue000-\uf8ff\xad]")
_WIDE = re.compile("[\xa0\u2000-\u200a０-９]")
# Text that ftfy leaves as it is: printable ASCII, CJK and the quotes, dashes and dots of prose.
NEVER_BROKEN = re.compile(r"[\n\t -~\u3001-\u9fff\uff01-\uff60‘’“”–—…·]*+")
# Lines, and parts of long ones: up to a space, else up to a character that begins a broken one, else anywhere.
_PARTS = re.compile(r"[^\n]{0,999}(?:[ \n]|\Z)|[^\n]{1,999}(?=[Â-ô])|[^\n]{1,1000}")
# Only at the start of a run: a search that tries every blank of a long run takes quadratic time.
_BLANKS = re.compile(r"(?<![ \t])(?:[ \t]++$|(?<=\S)[ \t]{3,}+(?=\S))", re.MULTILINE)

# Each with words that a text must hold for it to match: looking for those is several times faster.
_ANYWHERE = [
    (words.split("|"), re.compile(pattern, re.IGNORECASE))
    for words, pattern in {
        "cookie": r"\b(?:uses?|using|accept(?: all)?|about|our|these) cookies\b"
        r"|\bcookie (?:policy|settings|consent|notice)\b",
        "privacy policy|terms ": r"\bprivacy policy\b|\bterms (?:of use|of service|and conditions|& conditions)\b",
        "all rights reserved": r"\ball rights reserved\b",
        "javascript": r"\b(?:enable|turn on|requires?|activate) javascript\b"
        r"|\bjavascript (?:is|must be|has been) (?:disabled|enabled)\b",
        "sign up|subscribe": r"\b(?:sign up|subscribe)\b.{0,40}\b(?:newsletter|mailing list|updates)\b",
        "click here": r"\bclick here (?:to|for)\b",
        "所有|未经|转载|icp备|安备": "版权所有|版權所有|未经(?:许可|授权).{0,20}(?:转载|复制)|转载请注明|ICP备|京公网安备",
        "扫|公众号": "扫(?:一扫|码|描二维码).{0,12}(?:关注|下载|二维码)|关注(?:我们的?)?(?:微信)?公众号|微信公众号[：:]",
    }.items()
]
_WHOLE_LINE = re.compile(
    r"\s*(?:"
    + "|".join(
        (
            r"(?:copyright )?(?:©|\(c\)) ?\d{4}",
            r"(?:read|learn|load|show) more\W*$",
            r"(?:see also|skip to (?:main )?content)\W*$",
            r"(?:share|tweet|pin it|like this|share this|share on|follow us)\b.{0,60}(?:facebook|twitter|$)",
            r"(?:log ?in|sign ?in|register|home|contact us|about us|no comments:?|post a comment|leave a reply)\W*$",
            # Possessive: blanks could be given to either side of each item, which takes exponential time.
            r"(?:home|about|products|news|contact|blog|shop|login|menu|search)"
            r"(?:\s*+[|>»·/]\s*+(?:\w[\w ]{1,19}+|(?<=\s)\w|(?<=\s\s))){2,}+\s*$",
            "(?:上一篇|下一篇|上一页|下一页|返回(?:首页|顶部|列表)|当前位置|您(?:现在)?的位置)",
            "(?:点击(?:查看|下载|进入|这里)|阅读全文|查看更多|更多精彩|相关(?:推荐|阅读|文章)|热门(?:推荐|搜索)|责任编辑)",
            "(?:分享到|登录|注册|收藏本站|设为首页|联系我们|关于我们|免责声明|友情链接)",
            "首页(?:\\s*[|>»·/]\\s*\\w{2,12}){1,}\\s*$",
        )
    )
    + ")",
    re.IGNORECASE,
)
# A longer line is probably prose that mentions such words.
_MAX_BOILERPLATE_CHARS = 200

_MAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z])"
)
_IP = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_PHONE = re.compile(
    "|".join(
        (
            r"(?<![\d+])(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?!\d)",
            r"(?<!\d)(?:\(0\d{2,3}\) ?|0\d{2,3}-)\d{7,8}(?!\d)",
            r"(?<![\d+.])(?:\+?1[ .-])?(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4}(?![\d-])",
            r"(?<![\d+])\+(?:[2-9]\d{0,2})(?:[ .-]?\(?\d{1,4}\)?){2,5}(?!\d)",
        )
    )
)
# What a phone number and the characters that decide about it are made of: searching only there is several times faster.
_NUMERIC = re.compile(r"[\d ().+-]{7,}")
PERSONAL = ("email", "ip", "phone")


def repair(text: str, urls: bool = True, collapse: bool = True) -> str:
    """Undo broken encodings (ftfy); drop tags, comments, invisible characters and (`urls`) URLs; `collapse` repeated marks.

    Full-width digits and special spaces become plain ones; three or more line ends become two. Quotes, ligatures and
    full-width punctuation carry meaning and stay.
    """
    text = _unbreak(text)
    if "<" in text:
        text = _TAG.sub("", _BREAK.sub("\n", _without_code(text)))
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    if urls:
        text = _URL.sub("", text)
    if collapse:
        text = _REPEATED.sub(r"\1", text)
    text = _WIDE.sub(lambda match: str(int(match[0])) if match[0].isdigit() else " ", _INVISIBLE.sub("", text))
    text = _BLANKS.sub(lambda match: "" if match.end() == len(text) or text[match.end()] == "\n" else " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n ")


def _without_code(text: str) -> str:
    """Drop scripts, style sheets and comments that have an end; in linear time, however many have none."""
    kept, start, endless = [], 0, set()
    for opening in _CODE.finditer(text):
        if opening.start() < start:
            continue
        kind = opening[1] and opening[1].lower()
        end = None if kind in endless else _CODE_ENDS[kind].search(text, opening.end())
        if end is None:
            endless.add(kind)
        else:
            kept.append(text[start : opening.start()])
            start = end.end()
    return "".join([*kept, text[start:]])


def _unbreak(text: str) -> str:
    """ftfy's repair, line by line, of the parts of `text` that it could change.

    ftfy repeats its work until nothing changes, which takes time quadratic in the length of what it is given.
    """
    if NEVER_BROKEN.fullmatch(text):
        return text
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        # Half-width punctuation is wrong in Chinese and Japanese.
        fix_character_width=False,
        uncurl_quotes=False,
        normalization=None,
        explain=False,
    )
    parts = _PARTS.findall(text.replace("\r\n", "\n"))
    return "".join(part if NEVER_BROKEN.fullmatch(part) else ftfy.fix_text(part, config) for part in parts)


def remove_boilerplate(text: str) -> tuple[str, int]:
    """Drop short lines of navigation, cookie notices, copyright and the like; also the number of characters removed."""
    low = text.lower()
    patterns = [pattern for words, pattern in _ANYWHERE if any(word in low for word in words)]
    kept = [
        line
        for line in text.split("\n")
        if len(line) > _MAX_BOILERPLATE_CHARS
        or not (_WHOLE_LINE.match(line) or any(pattern.search(line) for pattern in patterns))
    ]
    result = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
    return result, len(text.strip("\n")) - len(result)


def mask_personal_data(text: str, kinds: Iterable[str] = PERSONAL) -> tuple[str, int]:
    """Replace mail addresses, public IP addresses and phone numbers by `<email>`, `<ip>`, `<phone>`; also the count."""
    count = 0

    def masked(mark: str) -> str:
        nonlocal count
        count += 1
        return mark

    kinds = tuple(kinds)
    if "email" in kinds and "@" in text:
        text = _MAIL.sub(lambda match: masked("<email>"), text)
    if "ip" in kinds:
        text = _IP.sub(lambda match: masked("<ip>") if _is_public_ip(match[0]) else match[0], text)
    if "phone" in kinds:
        text = _NUMERIC.sub(lambda run: _PHONE.sub(lambda match: masked("<phone>"), run[0]), text)
    return text, count


def _is_public_ip(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False
