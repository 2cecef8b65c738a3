"""Plots as the content of PNG files: a sweep in the form of the paper's figures 5, 7 and 9, curves.

The one place that needs matplotlib, which is imported when something is drawn.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mae_jax import UserError

OURS, PAPER = "tab:blue", "tab:gray"


class Point(NamedTuple):
    """One member: accuracies in %, None where there is none; `x`: None where it has no order."""

    name: str
    x: float | None
    mean: float | None
    spread: float
    paper: float | None


def sweep_plot(panels: Mapping[str, Sequence[Point]], axis: str, scale: str = "") -> bytes:
    """Ours against the left axis, the paper's against the right one, of each panel by its title.

    Lines over `x`, with `scale` log or, side by side, even; bars where a member has no `x`.
    """
    figure, places = _figure(len(panels))
    for place, (title, points) in zip(places, panels.items(), strict=True):
        line = all(point.x is not None for point in points)
        even = not line or scale == "even"
        at = [number if even else point.x for number, point in enumerate(points)]
        ours = [
            (x, p.mean, p.spread) for x, p in zip(at, points, strict=True) if p.mean is not None
        ]
        paper = [(x, p.paper) for x, p in zip(at, points, strict=True) if p.paper is not None]
        if line and scale == "log":
            place.set_xscale("log")
        if ours:
            x, means, spreads = zip(*ours, strict=True)
            _accuracies(place, x, means, spreads, line, -0.2, OURS, "ours", "o-")
        if paper:
            x, values = zip(*paper, strict=True)
            right = place.twinx() if ours else place
            _accuracies(right, x, values, None, line, 0.2, PAPER, "the paper", "s--")
        labels = [
            p.name if p.x in (None, _number(p.name)) else f"{p.x:g}\n({p.name})" for p in points
        ]
        place.set_xticks(at, labels, fontsize=8)
        place.minorticks_off()
        place.set_title(title)
        place.set_xlabel(axis)
        place.grid(alpha=0.3)
    return _png(figure)


def curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float | None]]]], axis: str = "step"
) -> bytes:
    """Curves of (x, value) by their label, of each panel by its title; None interrupts a curve."""
    figure, places = _figure(len(panels))
    for place, (title, lines) in zip(places, panels.items(), strict=True):
        for label, points in lines.items():
            x, values = zip(*points, strict=True)
            values = [float("nan") if value is None else value for value in values]
            place.plot(x, values, "." * (len(x) < 2) + "-", label=label, linewidth=1)
        place.set_title(title)
        place.set_xlabel(axis)
        place.grid(alpha=0.3)
        if any(lines):
            place.legend(fontsize=8)
    return _png(figure)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels, two in a row."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "plots need one more package: pip install 'mae_jax[report]' (matplotlib)"
        raise UserError(message) from error
    columns, rows = min(2, panels), (panels + 1) // 2
    figure = Figure(figsize=(5.5 * columns, 3.6 * rows), dpi=110, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for place in places[panels:]:
        place.set_axis_off()
    return figure, list(places[:panels])


def _accuracies(
    place: Any,
    x: Sequence[float],
    values: Sequence[float],
    spreads: Sequence[float] | None,
    line: bool,
    shift: float,
    color: str,
    label: str,
    style: str,
) -> None:
    """One series, its values written beside it, on an axis of its colour.

    Of two lines ours have the upper half and the paper's the lower, so that shapes can be compared.
    """
    above = shift < 0
    if line:
        place.errorbar(x, values, spreads, fmt=style, color=color, capsize=3, markersize=4)
    else:
        x = [position + shift for position in x]
        place.bar(x, values, 0.38, yerr=spreads, color=color, ecolor="black", capsize=3)
    half = spreads or [0.0] * len(values)
    low = min(value - error for value, error in zip(values, half, strict=True))
    high = max(value + error for value, error in zip(values, half, strict=True))
    span = high - low or 1.0
    apart = 1.3 * span if line else 0.25 * span
    place.set_ylim(
        low - (apart if above else 0.25 * span), high + (apart if not above else 0.2 * span)
    )
    for position, value, error in zip(x, values, half, strict=True):
        place.annotate(
            f"{value:.1f}",
            (position, value + error * (above or not line)),
            (0, 4 if above or not line else -11),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=color,
        )
    place.set_ylabel(f"top-1 %, {label}", color=color)
    place.tick_params(axis="y", colors=color)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
