"""The README.md of a merged model: what was merged, how, and how to do it again."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence

from .document import (
    GLOBAL,
    Document,
    checkpoint_labels,
    coefficient_note,
    deciding_interval,
    examples,
    guard_metric,
    leading_candidates,
    loss_columns,
    metric,
    metric_decimals,
    table_decimals,
)
from .numerals import cell, span
from .shared_rows import shown_coefficients
from .wording import statistics_notes, statistics_source, verdict

_PROJECT = "twa-merge"
_MOST_CANDIDATES = 20
_MARKDOWN = frozenset("\\`*_[]|~$#")
# Wider tables cannot be read, and twa_merge.json has the numbers.
_MOST_BLOCKS, _MOST_CHECKPOINTS = 64, 32


def model_card(document: Document) -> str:
    """A model card in the Hugging Face form: YAML front matter, then Markdown.

    It names checkpoints and the folders that they lie in, but no path of the machine that it was
    made on.
    """
    sections = [
        f"---\ntags:\n- merge\n- {_PROJECT}\n---\n",
        _introduction(document),
        _candidates(document),
        _coefficients(document),
        _again(document),
    ]
    return "\n".join(section for section in sections if section)


def _introduction(document: Document) -> str:
    checkpoints = document["checkpoints"]
    labels = checkpoint_labels(checkpoints)
    steps = [c["step"] for c in checkpoints if c.get("step") is not None]
    span = f", steps {min(steps)} to {max(steps)}" if steps else ""
    lines = [
        "# Merged model\n",
        f"Weighted average of {len(checkpoints)} checkpoints{span}, made with "
        f"{_PROJECT} {_text(document.get('version', ''))}.\n",
        f"- checkpoints: {_text(labels[0])} to {_text(labels[-1])}",
    ]
    if document.get("chosen"):
        lines.append(f"- winner: {_text(document['chosen'])}")
    if document.get("weights"):
        lines.append(f"- weights: {_text(document['weights'])}")
    data = document.get("data") or {}
    if data:
        lines.append(
            f"- data: {examples(document, 'fit')} examples to fit, "
            f"{examples(document, 'guard')} to choose the winner, "
            f"{data.get('test_examples') or 'none'} to test"
        )
    if document.get("candidates"):
        lines += ["", *(_text(sentence) for sentence in verdict(document))]
    return "\n".join(lines) + "\n"


def _candidates(document: Document) -> str:
    rows = leading_candidates(document, _MOST_CANDIDATES)
    if not rows:
        return ""
    keys = loss_columns(document)
    places, selected = table_decimals(rows, keys), metric(document)
    metric_places = metric_decimals(rows, ("", "guard_metrics", str(selected)))
    decided = f"{_text(selected or 'loss')} on the guard data"
    if "selection_loss" in keys and not selected:
        decided = "its loss on the guard data and on held-out fit examples: the selection loss"
    table = [
        [
            "candidate",
            *([f"guard {_text(selected)}"] if selected else []),
            *(key.replace("_", " ") for key in keys),
            f"guard {_text(selected or 'loss')}, 95 % interval",
        ]
    ]
    for row in rows:
        chosen = row["name"] == document.get("chosen")
        name = _text(row["name"])
        table.append(
            [
                f"**{name}**" if chosen else name,
                *([cell(guard_metric(row, selected), metric_places)] if selected else []),
                *(cell(row.get(key), places) for key in keys),
                span(deciding_interval(row, selected), metric_places if selected else places),
            ]
        )
    return (
        f"## Candidates\n\nLoss, lower is better; the winner was picked by {decided}.\n\n"
        + _table(table)
        + "".join(f"\n{_text(note)}\n" for note in statistics_notes(document))
    )


def _coefficients(document: Document) -> str:
    blocks = shown_coefficients(document)
    if not blocks:
        return ""
    checkpoints = document["checkpoints"]
    labels = [_text(label) for label in checkpoint_labels(checkpoints)]
    note = coefficient_note(document)
    head = f"## Coefficients\n\nOf the checkpoints; they may be negative and {note}.\n\n"
    if len(blocks) > _MOST_BLOCKS or (len(blocks) > 1 and len(labels) > _MOST_CHECKPOINTS):
        return head + f"{len(blocks)} blocks × {len(labels)} checkpoints, in `twa_merge.json`.\n"
    if set(blocks) == {GLOBAL}:
        rows = [["checkpoint", "step", "coefficient"]]
        for label, checkpoint, value in zip(labels, checkpoints, blocks[GLOBAL], strict=True):
            step = checkpoint.get("step")
            rows.append([label, "" if step is None else str(step), f"{value:+.6f}"])
        return head + _table(rows)
    rows = [["block", *labels]]
    rows += [[_text(name), *(f"{v:+.4f}" for v in row)] for name, row in blocks.items()]
    return head + _table(rows)


def _again(document: Document) -> str:
    """The command that makes the same weights from the same checkpoints, without any data."""
    checkpoints = document["checkpoints"]
    steps = [c["step"] for c in checkpoints if c.get("step") is not None]
    command = ["twa-merge", "average"]
    # Of files that were listed one by one, a range of steps would take in what lies between.
    if document.get("run") and len(steps) == len(checkpoints):
        every = ((document.get("options") or {}).get("selection") or {}).get("every")
        command += [_argument(document["run"]), "--to-step", str(max(steps))]
        command += ["--every", str(every)] if every else []
        command += ["--last", str(len(checkpoints))]
    else:
        command += map(_argument, checkpoint_labels(checkpoints, least=2))
    command += ["--weights", "@twa_merge.json", "-o", "merged-again"]
    dtype = (document.get("options") or {}).get("dtype")
    command += ["--dtype", str(dtype)] if dtype else []
    line = _without_control(shlex.join(command))
    fence = "`" * max(3, _longest_run(line) + 1)
    but = (
        "\nRunning statistics of batch norm come out averaged that way.\n"
        if statistics_source(document)
        else ""
    )
    paths = f"{_text(document['run'])} lies in" if document.get("run") else "these paths start from"
    where = f"From the folder that {paths}, with `twa_merge.json` of this folder copied there:"
    return f"## The same again\n\n{where}\n\n{fence}sh\n{line}\n{fence}\n{but}"


def _argument(path: str) -> str:
    """A path that the command line does not take for an option."""
    return f"./{path}" if path.startswith("-") else path


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(value: object) -> str:
    """``value`` as one line of Markdown that means nothing but itself."""
    line = _without_control(str(value))
    # HTML first, so that no tag survives; then everything that Markdown would act upon.
    escaped = html.escape(line, quote=False)
    return "".join(f"\\{c}" if c in _MARKDOWN else c for c in escaped)


def _without_control(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _longest_run(text: str) -> int:
    return max(
        (len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0
    )
