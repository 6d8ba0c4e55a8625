"""The report of a run as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from . import plots
from .document import (
    Document,
    checkpoint_labels,
    coefficient_note,
    deciding_interval,
    examples,
    folder_name,
    leading_candidates,
    loss_columns,
    metric,
    metric_columns,
    metric_decimals,
    metric_of,
    table_decimals,
    written_name,
)
from .errors import OutputError
from .numerals import cell, is_finite, span
from .shared_rows import shown_coefficients
from .short_names import shortened
from .wording import statistics_notes, verdict

_MOST_CANDIDATES = 24
_LABEL_WIDTHS = (36, 44)
_SPLITS = ("fit", "guard", "test")

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f7f9; --ink: #1c2330; --quiet: #5b6575;
  --faint: #d5dae2; --blue: #1f6fd0; --orange: #d9661b; --green: #16794a; }
@media (prefers-color-scheme: dark) { :root { --page: #12161d; --card: #1a2029; --ink: #e4e8ef;
  --quiet: #98a3b5; --faint: #36404f; --blue: #5aa2f5; --orange: #f08a45; --green: #4cc38a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .3rem; }
p, h1, dd { overflow-wrap: anywhere; }
p { margin: .3rem 0; } .quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.verdict { border-left: 4px solid var(--green); background: var(--card); padding: .8rem 1rem;
  margin: 1.2rem 0; border-radius: 0 8px 8px 0; }
.verdict.unsure { border-color: var(--orange); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0; }
dl div { background: var(--card); border-radius: 8px; padding: .6rem .8rem; }
dt { color: var(--quiet); font-size: .8rem; } dd { margin: 0; font-weight: 600; }
figure { margin: .8rem 0 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 30rem; height: auto; }
figure svg text { font-family: inherit !important; }
figure svg image { image-rendering: pixelated; }
figcaption { margin-bottom: .5rem; position: sticky; left: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--faint);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal;
  min-width: 8rem; overflow-wrap: anywhere; }
th { color: var(--quiet); font-weight: 600; } tr.chosen td { font-weight: 700; }
tr.chosen td:first-child { color: var(--green); }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--quiet); }
"""


def html_report(document: Document, landscape: Mapping[str, Any] | None = None) -> str:
    """One self-contained page about a run.

    Args:
        document: as in ``twa_merge.json``.
        landscape: the plane of the first two axes, or None: ``points`` (n, 2) one a checkpoint,
            ``path`` (k, 2) of the fit, ``grid_x`` (a,), ``grid_y`` (b,), ``loss`` (b, a) and
            ``candidates`` name → (2,), all in coordinates z.

    Raises:
        OutputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OutputError(
            "The report is drawn with matplotlib, which is not installed.",
            remedy='pip install "twa-merge[report]"',
        ) from error
    title = f"twa-merge: {written_name(document)}"
    sections = [
        _head(document),
        _candidates(document),
        _coefficients(document),
        _losses(document),
        _landscape(document, landscape),
        _tables(document),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # The page asks for nothing, and this makes sure of it.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(document: Document) -> str:
    sentences = verdict(document) if document.get("candidates") else []
    unsure = any("within noise" in s or s.startswith("No candidate") for s in sentences)
    said = "".join(f"<p>{_text(sentence)}</p>" for sentence in sentences)
    box = f'<div class="verdict{" unsure" if unsure else ""}">{said}</div>\n' if said else ""
    title = f"{written_name(document)} from {len(document['checkpoints'])} checkpoints"
    return (
        f"<h1>{_text(title)}</h1>\n"
        f'<p class="quiet">{_text(_subtitle(document))}</p>\n{box}{_facts(document)}'
    )


def _subtitle(document: Document) -> str:
    labels = checkpoint_labels(document["checkpoints"])
    return f"{labels[0]} to {labels[-1]}, twa-merge {document.get('version', '')}"


def _facts(document: Document) -> str:
    data, subspace = document.get("data") or {}, document.get("subspace") or {}
    optimizer, timings = document.get("optimizer") or {}, document.get("timings") or {}
    used = " / ".join(examples(document, split) for split in _SPLITS)
    facts = {
        "examples: fit/guard/test": used if data else None,
        "rank of the subspace": subspace.get("rank"),
        "passes over the fit data": f"{optimizer['evaluations']:g} ({optimizer.get('name')})"
        if is_finite(optimizer.get("evaluations"))
        else None,
        "time": f"{sum(timings.values()):.0f} s" if timings else None,
        "processes and device": f"{document['world_size']} × {document.get('device', 'cpu')}"
        if document.get("world_size")
        else None,
    }
    rows = (
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
        for name, value in facts.items()
        if value is not None
    )
    return f"<dl>{''.join(rows)}</dl>"


def _candidates(document: Document) -> str:
    selected = metric(document)
    rows = [_drawn(row, selected) for row in leading_candidates(document, _MOST_CANDIDATES)]
    rows = [row for row in rows if is_finite(row["guard"])]
    if not rows:
        return ""
    measure = _short(selected or "loss")
    caption = f"The test {measure} decides nothing."
    caption += " Larger is better." if selected else ""
    if any(row["ci95"] for row in rows):
        caption += (
            " Bars are 95 % intervals of each mean by itself. Candidates see the same examples, so "
            "that differences are known far better than these bars suggest: see the sentence at "
            "the top."
        )
    svg = plots.candidates(rows, _short(written_name(document)), measure)
    return _figure("Candidates", caption, svg)


def _drawn(row: Document, selected: str | None) -> Document:
    """What the chart shows of a candidate: the loss, or the metric that decided."""
    if selected is None:
        guard, test = row.get("guard_loss"), row.get("test_loss")
    else:
        guard, test = (metric_of(row, ("", f"{s}_metrics", selected)) for s in ("guard", "test"))
    ends = deciding_interval(row, selected)
    return {"name": _short(str(row["name"])), "guard": guard, "test": test, "ci95": ends}


def _coefficients(document: Document) -> str:
    blocks = shown_coefficients(document)
    if not blocks:
        return ""
    labels = _all_short(checkpoint_labels(document["checkpoints"]))
    note = coefficient_note(document)
    if len(blocks) == 1:
        svg = plots.coefficient_bars(labels, next(iter(blocks.values())))
        caption = f"Weight of each checkpoint in the written model; they {note}."
    else:
        names = _all_short(list(blocks))
        svg = plots.coefficient_map(names, labels, list(blocks.values()))
        caption = f"Weight of each checkpoint in each block of the model; in a row they {note}."
    return _figure("Coefficients", caption, svg)


def _losses(document: Document) -> str:
    optimizer = document.get("optimizer") or {}
    stages = optimizer.get("stages") or [{"name": "fit", "trace": optimizer.get("trace")}]
    traces = [
        (_short(str(stage.get("name", ""))), known)
        for stage in stages
        if (known := [(k, v) for k, v in stage.get("trace") or [] if is_finite(v)])
    ]
    if not traces:
        return ""
    pulled = any(stage.get("ridge") for stage in stages)
    plus = " plus ridge/2 · |z|²" if pulled else ""
    caption = f"Loss on the fit data{plus} at each evaluation."
    label = "fit loss + ridge" if pulled else "fit loss"
    return _figure("The fit", caption, plots.losses(traces, label))


def _landscape(document: Document, landscape: Mapping[str, Any] | None) -> str:
    if landscape is None:
        return ""
    labels = _all_short(checkpoint_labels(document["checkpoints"]))
    named = {_short(str(k)): v for k, v in (landscape.get("candidates") or {}).items()}
    caption = (
        f"Loss on {landscape['examples']} of the fit examples, in the plane of the two axes along "
        "which the checkpoints differ most. Whatever lies off this plane is drawn at its "
        "projection, so that its loss is not the one shown there."
    )
    return _figure(
        "The plane of the checkpoints",
        caption,
        plots.landscape({**landscape, "candidates": named}, labels),
    )


def _tables(document: Document) -> str:
    rows = document.get("candidates") or []
    keys = loss_columns(document)
    places = table_decimals(rows, keys)
    metrics = metric_columns(rows, "guard_metrics", "test_metrics")
    metric_places = [metric_decimals(rows, column) for column in metrics]
    chosen, selected = written_name(document), metric(document)
    measure = f"guard {selected}" if selected else "guard loss"
    interval_places = metric_decimals(rows, ("", "guard_metrics", selected)) if selected else places
    body = []
    for row in leading_candidates(document, len(rows)):
        cells = [str(row["name"]), *(cell(row.get(key), places) for key in keys)]
        cells += [span(deciding_interval(row, selected), interval_places)]
        cells += [cell(metric_of(row, c), d) for c, d in zip(metrics, metric_places, strict=True)]
        cells += [f"{row['cost']:g}" if is_finite(row.get("cost")) else ""]
        body.append((row["name"] == chosen, cells))
    head = ["candidate", *(k.replace("_", " ") for k in keys), f"{measure}, 95 %"]
    head += [*(heading for heading, _, _ in metrics), "cost, passes over the fit data"]
    others = [
        (False, [str(row["name"]), cell(row.get("guard_loss"), places)])
        for row in document.get("other_candidates") or []
    ]
    parts = [f"<h2>Numbers</h2>\n{_table(head, body)}"] if body else []
    parts += [f'<p class="quiet">{_text(note)}</p>' for note in statistics_notes(document)]
    if others:
        parts.append(_folded("Other candidates", _table(["candidate", "guard loss"], others)))
    checkpoints = [
        (
            False,
            [
                folder_name(c["path"]),
                "" if c.get("step") is None else str(c["step"]),
                str(c.get("format", "")),
            ],
        )
        for c in document["checkpoints"]
    ]
    parts.append(_folded("Checkpoints", _table(["checkpoint", "step", "format"], checkpoints)))
    return "\n".join(parts)


def _figure(title: str, caption: str, svg: str) -> str:
    return (
        f'<section>\n<h2>{_text(title)}</h2>\n<figure role="group" aria-label="{_text(title)}">\n'
        f"<figcaption>{_text(caption)}</figcaption>\n{svg}</figure>\n</section>"
    )


def _folded(title: str, content: str) -> str:
    return f"<details>\n<summary>{_text(title)}</summary>\n{content}\n</details>"


def _table(head: Sequence[str], body: Sequence[tuple[bool, Sequence[str]]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    rows = ""
    for chosen, cells in body:
        row = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        rows += f'<tr class="chosen">{row}</tr>\n' if chosen else f"<tr>{row}</tr>\n"
    return f'<div class="scroll"><table>\n<tr>{top}</tr>\n{rows}</table></div>'


def _short(name: str) -> str:
    return _all_short([name])[0]


def _all_short(names: Sequence[str]) -> list[str]:
    """Labels that fit an axis, without control codes."""
    return shortened([_visible(name) for name in names], _LABEL_WIDTHS)


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _text(value: object) -> str:
    return html.escape(_visible(str(value)))
