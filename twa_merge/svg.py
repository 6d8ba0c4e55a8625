"""A matplotlib figure as an ``<svg>`` element that follows the colours of the page around it."""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

# Matplotlib knows no CSS variables: figures are drawn in these colours, which nothing else uses,
# and the page's own are put in afterwards.
INK, FAINT = "#010203", "#010204"
BLUE, ORANGE, GREEN = "#010205", "#010206", "#010207"
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
}
_WIDTH = 7.2
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "twa-merge",
    # Names come from files: a dollar sign is a dollar sign.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def can_draw() -> bool:
    """Whether matplotlib is installed, without importing it."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(name: str, height: float, paint: Callable[[Any], None]) -> str:
    """One figure as an ``<svg>`` element; matplotlib's global state is left as it was.

    Args:
        name: prefix of its ids, unique on the page.
        height: inches.
        paint: draws into a matplotlib ``Figure``.
    """
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Whatever a user's matplotlibrc says, the report looks the same.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        # A name in a script that the font lacks is drawn by the browser all the same.
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        paint(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """From a file to an element of a page: no prolog, no metadata, no ids in common."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)

    def tag(match: re.Match[str]) -> str:
        text = match.group()
        text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
        text = re.sub(r'(\sid=")', rf"\g<1>{name}-", text)
        text = re.sub(r'((?:url\(|href=")#)', rf"\g<1>{name}-", text)
        for colour, variable in _VARIABLES.items():
            text = text.replace(colour, variable)
        return text

    # Inside of tags alone: between them stand the names.
    svg = re.sub(r"<[^>]*>", tag, svg)
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1
    )
