"""The report of a cleaning run as one HTML file: tables and bars, no script, nothing fetched."""

from html import escape
from typing import Any

from tnllm.files import format_bytes

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
td:first-child,th:first-child{text-align:left}td.text{text-align:left;white-space:normal;color:#555}
td.bar{width:30%;text-align:left}.bar i{display:inline-block;height:.8em;background:#0072b2;vertical-align:middle}
.bar i.lost{background:#d55e00}.plot{display:flex;align-items:flex-end;height:9rem;gap:1px;border-bottom:1px solid #999}
.plot i{flex:1;background:#0072b2;min-height:0}.axis{display:flex;justify-content:space-between;color:#555;font-size:.85em}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}td,th{border-color:#444}td.text,.axis{color:#aaa}}
"""


def page(report: dict[str, Any]) -> str:
    """The whole file."""
    parts = [
        f"<h1>{report['documents_in']:,} documents in, {report['documents_out']:,} out</h1>",
        f"<p>{escape(report['out'])}: {format_bytes(report['bytes_out'])} of text kept. "
        "Blue is what a step passes on, orange what it takes away.</p>",
        "<h2>Steps</h2>",
        _steps(report["steps"]),
    ]
    if report["languages"]:
        parts += ["<h2>Languages, as read</h2>", _bars(report["languages"])]
    if report["duplicate_groups"]:
        groups = {f"groups of {size}": n for size, n in sorted(report["duplicate_groups"].items())}
        parts += ["<h2>Duplicates</h2>", _bars(groups)]
    if report["tally"]:
        parts += ["<h2>By kind</h2>", _tally(report["tally"])]
    if report["self_clean"]:
        parts += ["<h2>Self-cleaning</h2>", *_rounds(report["self_clean"])]
    if report["unreadable"]:
        places = "".join(f"<li>{escape(place)}</li>" for place in report["unreadable"])
        parts += ["<h2>Not read</h2>", f"<ul>{places}</ul>"]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Cleaning report</title><style>{_STYLE}</style>"
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _table(head: list[str], rows: list[str]) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><tr>{cells}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _steps(steps: list[dict[str, Any]]) -> str:
    most = max((step["documents_in"] for step in steps), default=0) or 1
    rows = []
    for step in steps:
        kept = 100 * step["documents_out"] / most
        lost = 100 * (step["documents_in"] - step["documents_out"]) / most
        rate = step.get("documents_per_s_per_core")
        reasons = ", ".join(f"{escape(why)} {count:,}" for why, count in step["reasons"].items() if count)
        rows.append(
            f"<td>{escape(step['step'])}</td><td>{step['documents_in']:,}</td><td>{step['documents_out']:,}</td>"
            f"<td>{format_bytes(step['bytes_in'])}</td><td>{format_bytes(step['bytes_out'])}</td>"
            f"<td>{f'{rate:,}' if rate else ''}</td>"
            f'<td class=bar><i style="width:{kept:.1f}%"></i><i class=lost style="width:{lost:.1f}%"></i></td></tr>'
            f"<tr><td></td><td class=text colspan=6>{reasons}</td>"
        )
    return _table(["step", "in", "out", "bytes in", "bytes out", "documents/s a core", ""], rows)


def _bars(values: dict[str, int]) -> str:
    most = max(values.values(), default=0) or 1
    rows = [
        f'<td>{escape(name)}</td><td>{count:,}</td><td class=bar><i style="width:{100 * count / most:.1f}%"></i></td>'
        for name, count in values.items()
    ]
    return _table(["", "documents", ""], rows)


def _tally(tally: dict[str, Any]) -> str:
    rows = []
    for value, entry in tally.items():
        by = ", ".join(f"{escape(step)} {count:,}" for step, count in entry["rejected"].items() if count)
        share = 1 - entry["out"] / entry["in"] if entry["in"] else 0
        rows.append(
            f"<td>{escape(value)}</td><td>{entry['in']:,}</td><td>{entry['out']:,}</td><td>{share:.1%}</td>"
            f"<td class=text>{by}</td>"
        )
    return _table(["kind", "in", "out", "removed", "by"], rows)


def _rounds(found: dict[str, Any]) -> list[str]:
    losses = [(f"what round {row['round']} began with", row["held_out"]) for row in found["rounds"]]
    losses.append(("what is left", found["after"]))
    if "random_subset" in found:
        losses.append(("a random subset of that size", found["random_subset"]))
    rows = [f"<td>{name}</td><td>{loss['bits_per_byte']:.4f}</td><td>{loss['loss']:.4f}</td>" for name, loss in losses]
    parts = [_table(["trained on", "held-out bits per byte", "nats a token"], rows)]
    for row in found["rounds"]:
        counts, top = row["histogram"]["counts"], row["histogram"]["to"]
        most = max(counts) or 1
        bars = "".join(f'<i style="height:{100 * n / most:.1f}%" title="{n}"></i>' for n in counts)
        parts.append(
            f"<h3>Bits per byte of documents, round {row['round']}: {row['documents_out']:,} of {row['documents_in']:,} "
            f"stay</h3><div class=plot>{bars}</div><div class=axis><span>0</span><span>{top / 2:g}</span>"
            f"<span>{top:g} and more</span></div>"
        )
    return parts
