"""The figures of the report. Matplotlib (extra ``report``) is imported by ``svg.draw``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .document import Document
from .labels import place_labels, touching
from .numerals import decimals, is_finite, sortable
from .numerals import figure as written
from .svg import BLUE, GREEN, INK, ORANGE, draw

# The same two hues for heat maps, which are images: opaque at the largest magnitude, transparent
# at zero, so that they suit a light and a dark page.
_POSITIVE, _NEGATIVE = (0.16, 0.47, 0.84), (0.88, 0.42, 0.13)

# A loss that lies so many times as far from the least one as the median does is left out.
_FAR = 12.0


def losses(stages: Sequence[tuple[str, Sequence[tuple[int, float]]]], label: str) -> str:
    """What the fit lowers over evaluations, one panel a stage, each value and the best so far."""

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(stages), squeeze=False)[0]
        for axes, (title, trace) in zip(panels, stages, strict=True):
            x, y = [k for k, _ in trace], [value for _, value in trace]
            best = [min(y[: i + 1]) for i in range(len(y))]
            # A line search may look at points far away; they would flatten everything else.
            low, high = min(y), max(best)
            room = 0.08 * ((high - low) or abs(high) * 0.01 or 1.0)
            top = high + room
            inside = [(a, b) for a, b in trace if b <= top]
            axes.step(x, best, where="post", color=BLUE, linewidth=1.8, label="best so far")
            axes.plot(*_columns(inside), "o", color=ORANGE, markersize=4, label="evaluation")
            beyond = [a for a, b in trace if b > top]
            if beyond:
                axes.plot(beyond, [top] * len(beyond), "^", color=ORANGE, markersize=5,
                          clip_on=False, label="above the frame")  # fmt: skip
            axes.set_ylim(low - room, top)
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_xlabel("evaluation")
            _whole_numbers(axes.xaxis)
        panels[0].set_ylabel(label)
        marks: dict[str, Any] = {}
        for axes in panels:
            handles, names = axes.get_legend_handles_labels()
            marks |= dict(zip(names, handles, strict=True))
        figure.legend(marks.values(), marks, loc="outside upper center", ncols=3, fontsize=9)

    return draw("losses", 2.9, paint)


def coefficient_bars(labels: Sequence[str], values: Sequence[float]) -> str:
    """One bar a checkpoint, oldest at the left."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        colours = [BLUE if value >= 0 else ORANGE for value in values]
        axes.bar(range(len(values)), values, color=colours, width=0.72)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.axhline(1 / len(values), color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate("uniform", (1, 1 / len(values)), xycoords=("axes fraction", "data"),
                      ha="right", va="bottom", fontsize=8, xytext=(0, 1),
                      textcoords="offset points")  # fmt: skip
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("coefficient")
        _label_ticks(axes.xaxis, labels, most=26)
        axes.tick_params(axis="x", rotation=50 if max(map(len, labels)) > 3 else 0)
        for text in axes.get_xticklabels():
            text.set(ha="right" if text.get_rotation() else "center", rotation_mode="anchor")

    return draw("coefficients", 2.6 + _slanted(labels), paint)


def coefficient_map(
    blocks: Sequence[str], labels: Sequence[str], rows: Sequence[Sequence[float]]
) -> str:
    """Blocks by checkpoints, blue where positive, orange where negative."""
    top = max((abs(v) for row in rows for v in row), default=0.0) or 1.0

    def paint(figure: Any) -> None:
        from matplotlib.transforms import ScaledTranslation

        axes = figure.subplots()
        axes.imshow([[_shade(v / top) for v in row] for row in rows], aspect="auto",
                    interpolation="none")  # fmt: skip
        axes.grid(visible=False)
        _label_ticks(axes.xaxis, labels, most=26)
        _label_ticks(axes.yaxis, blocks, most=60)
        axes.tick_params(axis="x", rotation=50)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
        # In inches from the upper left corner: the layout reckons with as much, however few rows.
        above = figure.dpi_scale_trans + ScaledTranslation(0, 1, axes.transAxes)
        scale = axes.inset_axes((0.0, 0.08, 1.8, 0.14), transform=above)
        scale.imshow([[_shade(i / 50 - 1) for i in range(101)]], aspect="auto",
                     extent=(-top, top, 0, 1), interpolation="none")  # fmt: skip
        scale.set(yticks=[], xticks=[-top, 0, top])
        scale.set_xticklabels([f"−{top:.2g}", "0", f"+{top:.2g}"], fontsize=8)
        scale.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
        scale.grid(visible=False)

    return draw("coefficients", min(14.0, 1.1 + 0.2 * len(rows) + _slanted(labels)), paint)


def candidates(rows: Sequence[Document], chosen: str, measure: str) -> str:
    """What decided of each candidate on the guard and the test split, the best at the top.

    Args:
        rows: ``name``, ``guard`` with its 95 % interval ``ci95``, and ``test``; None where unknown.
        measure: the loss, or the name of a metric.
    """

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        both = any(is_finite(row["test"]) for row in rows)
        # Only losses explode.
        left, right = _frame(rows) if measure == "loss" else (-math.inf, math.inf)
        for y, row in enumerate(rows):
            if row["ci95"]:
                axes.plot(row["ci95"], [y - 0.14 * both] * 2, color=BLUE, linewidth=1.6, alpha=0.55)
        for key, offset, colour, marker in (
            ("guard", -0.14 * both, BLUE, "o"),
            ("test", 0.14, ORANGE, "D"),
        ):
            known = [(y, r) for y, r in enumerate(rows) if is_finite(r[key])]
            if not known:
                continue
            axes.plot([r[key] for _, r in known], [y + offset for y, _ in known],
                      marker, color=colour, markersize=5, label=f"{key} {measure}")  # fmt: skip
            beyond = [y + offset for y, row in known if row[key] > right]
            axes.plot([right] * len(beyond), beyond, ">", color=colour, markersize=6, clip_on=False)
        if right < math.inf:
            axes.set_xlim(left, right)
            axes.annotate("> beyond the frame", (1, 0), xycoords="axes fraction", ha="right",
                          va="bottom", fontsize=8, xytext=(-8, 3),
                          textcoords="offset points")  # fmt: skip
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        for text, row in zip(axes.get_yticklabels(), rows, strict=True):
            if row["name"] == chosen:
                text.set(fontweight="bold", color=GREEN)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(measure)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)

    return draw("candidates", min(12.0, 1.1 + 0.3 * len(rows)), paint)


def _frame(rows: Sequence[Document]) -> tuple[float, float]:
    """Ends of the axis of losses; infinity where all fit, as they do unless some exploded."""
    found = [row[key] for row in rows for key in ("guard", "test")]
    known = sorted(float(v) for v in found if v is not None and is_finite(v))
    low, middle = known[0], known[len(known) // 2]
    near = low + _FAR * (middle - low)
    # Whatever lies inside the interval of one that is shown is no further off than that.
    ends = [row["ci95"][1] for row in rows if row["ci95"] and sortable(row["guard"]) <= near]
    kept = [v for v in known if v <= max([near, *ends])]
    if len(kept) == len(known):
        return -math.inf, math.inf
    room = 0.5 * ((kept[-1] - low) or abs(low) or 1.0)
    return low - room, kept[-1] + room


def landscape(found: Mapping[str, Any], labels: Sequence[str]) -> str:
    """The checkpoints in the plane of the first two axes, loss contours, the path of the fit."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        _contours(axes, found)
        points = found["points"]
        axes.plot(*_columns(points), "-", color=INK, linewidth=0.7, alpha=0.5)
        axes.plot(*_columns(points), "o", color=INK, markersize=4, label="checkpoints")
        if found.get("path"):
            axes.plot(*_columns(found["path"]), ".-", color=ORANGE, linewidth=1.6, markersize=6,
                      label="path of the fit")  # fmt: skip
        for point in (found.get("candidates") or {}).values():
            axes.plot(*point, "*", color=GREEN, markersize=11)
        axes.grid(visible=False)
        axes.set_xlabel("axis 1, standard deviations of the checkpoints")
        axes.set_ylabel("axis 2")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)
        _name_points(figure, axes, found, labels)

    return draw("landscape", 5.0, paint)


def _contours(axes: Any, found: Mapping[str, Any]) -> None:
    values = [[v if is_finite(v) else math.nan for v in row] for row in found["loss"]]
    known = sorted(v for row in values for v in row if not math.isnan(v))
    if len(known) < 4 or known[0] == known[-1]:
        return
    # Levels at quantiles: the bowl around the minimum matters, not the walls.
    levels = sorted({known[round(q * (len(known) - 1) / 12)] for q in range(12)})
    if len(levels) < 2:
        return
    opacity = [(*_POSITIVE, 0.5 * (1 - i / len(levels))) for i in range(len(levels) - 1)]
    axes.contourf(found["grid_x"], found["grid_y"], values, levels=levels, colors=opacity)
    lines = axes.contour(found["grid_x"], found["grid_y"], values, levels=levels, colors=[BLUE],
                         linewidths=0.5, alpha=0.7)  # fmt: skip
    places = decimals(known)
    axes.clabel(lines, levels[1::3], fmt=lambda v: written(v, places), fontsize=8, colors=[INK])
    axes.set_xlim(min(found["grid_x"]), max(found["grid_x"]))
    axes.set_ylim(min(found["grid_y"]), max(found["grid_y"]))


def _name_points(figure: Any, axes: Any, found: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Names the candidates, and the first and the last checkpoint where no candidate is there."""
    named, points = dict(found.get("candidates") or {}), found["points"]
    # The frame has its size only now.
    figure.draw_without_rendering()
    frame, inch = axes.get_window_extent(), figure.dpi / 72
    levels = [text.get_position() for text in axes.texts]
    marked = [*named.values(), *points, *(found.get("path") or []), *levels]
    places = [
        ((x - frame.x0) / inch, (y - frame.y0) / inch)
        for x, y in axes.transData.transform(marked).tolist()
    ]
    names, stars = list(named), touching(places[: len(named)])
    texts = {group[0]: ", ".join(names[i] for i in group) for group in stars}
    for i in sorted({0, len(points) - 1}):
        if not any(math.dist(points[i], point) < 1e-6 for point in named.values()):
            texts[len(named) + i] = labels[i]
    for label in place_labels(texts, places, frame.width / inch, frame.height / inch):
        text = axes.annotate(
            label.text,
            marked[label.point],
            xytext=label.offset,
            textcoords="offset points",
            ha={1: "left", 0: "center", -1: "right"}[label.side],
            va="center",
            fontsize=9,
            fontweight="bold" if label.point < len(named) else "normal",
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkA": 0}
            if label.far
            else None,
        )
        text.set_in_layout(False)


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [p[0] for p in points], [p[1] for p in points]


def _shade(share: float) -> tuple[float, float, float, float]:
    colour = _POSITIVE if share >= 0 else _NEGATIVE
    return (*colour, min(1.0, abs(share)))


def _slanted(labels: Sequence[str]) -> float:
    """Inches that labels of 8 points take below an axis, turned by 50 degrees."""
    return 0.045 * max(map(len, labels))


def _label_ticks(axis: Any, labels: Sequence[str], most: int) -> None:
    """Every label where there is room, else every second, third, ..., the last one included."""
    step = max(1, math.ceil(len(labels) / most))
    shown = list(range((len(labels) - 1) % step, len(labels), step))
    axis.set_ticks(shown, [labels[i] for i in shown], fontsize=8)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=7))
