"""Figures as inline SVG: curves over steps, scores over iterations, histograms.

Colours and fonts are the page's (`page.css`), by class: `s0` and `s1` are the two series of a figure. A figure carries
its scales in `data-x` and `data-y`, from which `page.js` reads values at the cursor.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 420, 230  # of the view box, in which text has 12 px; a page has three of them side by side
LEFT, RIGHT, TOP, BOTTOM = 52, 410, 22, 190  # of the area with the curves
POINTS = 350  # of a curve: there is no more than one pixel for each
BINS = 40  # of a histogram, at most


class Series(NamedTuple):
    """One curve.

    Attributes:
        label: what it is, for the cursor.
        parts: (x, y) of each iteration; NaN is a gap.
        points: (x, y, standard error or None), drawn as marks.
    """

    label: str
    parts: Sequence[tuple[np.ndarray, np.ndarray]]
    points: Sequence[tuple[float, float, float | None]] = ()


class Range(NamedTuple):
    """What an axis shows."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Range":
        """From the least to the largest that is finite, with some room where that is nothing."""
        finite = np.asarray(values, float)
        finite = finite[np.isfinite(finite)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        room = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
        return cls(low - room, high + room)

    def __or__(self, other: "Range") -> "Range":
        return Range(min(self.low, other.low), max(self.high, other.high))


class _Scale(NamedTuple):
    """Values to coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def __str__(self) -> str:
        return " ".join(f"{number:.10g}" for number in self)


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers between the ends; `whole` ones alone, where steps are counted."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough)
    step = max(1.0, round(step)) if whole else step
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def curves(
    series: Sequence[Series],
    x: Range,
    y: Range,
    bounds: Mapping[str, tuple[float, float]],
    rules: Sequence[tuple[float, float, float, str]] = (),
) -> Markup:
    """Curves over optimizer steps: pale what was logged, dark its running mean, marks beside.

    Args:
        bounds: name of an iteration -> its first and last step; a line is drawn at each first one.
        rules: (from x, to x, y, what it is), dotted.
    """
    across, up = _Scale(x.low, x.high, LEFT, RIGHT), _Scale(y.low, y.high, BOTTOM, TOP)
    parts = _grid(across, up, [(tick, _number(tick)) for tick in ticks(x.low, x.high, 5, whole=True)])
    wide = (RIGHT - LEFT) / max(1, len(bounds)) > 70
    for name, (first, last) in bounds.items():
        parts.append(_line("bound", across(first), TOP - 14, across(first), BOTTOM))
        shown = name if wide else name.split()[-1]
        parts.append(_text(across((first + last) / 2), TOP - 6, shown, "middle"))
    for start, end, level, what in rules:
        parts.append(_line("rule", across(start), up(level), across(end), up(level), what))
    for number, one in enumerate(series):
        for steps, values in one.parts:
            means = running_mean(values)
            if len(values) >= 40:
                parts.append(_path(f"raw s{number}", across, up, *_extremes(steps, values)))
            keep = _every(len(steps))
            parts.append(_path(f"mean s{number}", across, up, steps[keep], means[keep], one.label))
            if len(values) < 40:
                parts += [
                    _dot(f"dot s{number}", across(at), up(value)) for at, value in zip(steps, values, strict=True)
                ]
        parts += itertools.chain.from_iterable(_mark(number, one.label, across, up, *point) for point in one.points)
    return _svg(parts, across, up)


def scores(series: Sequence[Series], names: Mapping[float, str], y: Range) -> Markup:
    """Points joined by lines, over iterations; `names` are those of the places along x."""
    places = list(names)
    across, up = _Scale(min(places) - 0.4, max(places) + 0.4, LEFT, RIGHT), _Scale(y.low, y.high, BOTTOM, TOP)
    parts = _grid(across, up, list(names.items()))
    for number, one in enumerate(series):
        at, values = (np.array([point[i] for point in one.points], float) for i in (0, 1))
        parts.append(_path(f"mean s{number}", across, up, at, values, one.label))
        parts += itertools.chain.from_iterable(_mark(number, one.label, across, up, *point) for point in one.points)
    return _svg(parts, across, up)


def histogram(values: Mapping[str, np.ndarray], x: Range, whole: bool, rule: float | None = None) -> Markup:
    """The share of values in each bin, outlined; `whole` numbers are not cut between two of them."""
    width = (x.high - x.low) / BINS
    low, width = (math.floor(x.low) - 0.5, max(1, math.ceil(width))) if whole else (x.low, width)
    edges = low + width * np.arange(math.ceil((x.high - low) / width) + 1)
    shares = {name: np.histogram(own, edges)[0] / max(1, len(own)) for name, own in values.items()}
    top = max((float(share.max()) for share in shares.values()), default=1.0) or 1.0
    across, up = _Scale(edges[0], edges[-1], LEFT, RIGHT), _Scale(0.0, 1.05 * top, BOTTOM, TOP)
    parts = _grid(across, up, [(tick, _number(tick)) for tick in ticks(*across[:2], 5, whole)])
    if rule is not None and across.low < rule < across.high:
        parts.append(_line("rule", across(rule), TOP, across(rule), BOTTOM))
    for number, (name, share) in enumerate(shares.items()):
        outline = np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(share, 2), [0.0]])
        parts.append(_path(f"area s{number}", across, up, *outline, name))
    return _svg(parts, across, up)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a twentieth of the values, over those there are near the ends and beside a NaN."""
    window = np.ones(2 * (len(values) // 40) + 1)
    present = np.isfinite(values)
    counts = np.convolve(present, window, mode="same")
    with np.errstate(invalid="ignore"):
        means = np.convolve(np.where(present, values, 0.0), window, mode="same") / counts
    return np.where(present, means, np.nan)


def _every(count: int) -> np.ndarray:
    """Places of at most POINTS of so many, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int))


def _extremes(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of more than POINTS values the least and the largest of each bin, so that no peak is lost."""
    if len(values) <= POINTS:
        return steps, values
    keep = set()
    for part in np.array_split(np.arange(len(values)), POINTS // 2):
        if np.isfinite(values[part]).any():
            keep |= {part[np.nanargmin(values[part])], part[np.nanargmax(values[part])]}
    places = sorted(keep)
    return steps[places], values[places]


# ---- pieces


def _number(value: float) -> str:
    """Of a tick."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _svg(parts: Sequence[Markup], across: _Scale, up: _Scale) -> Markup:
    start = Markup('<svg viewBox="0 0 {} {}" tabindex="0" role="img" data-x="{}" data-y="{}">')
    return Markup("").join([start.format(WIDTH, HEIGHT, across, up), *parts, Markup("</svg>")])


def _grid(across: _Scale, up: _Scale, names: Sequence[tuple[float, str]]) -> list[Markup]:
    parts = []
    for tick in ticks(up.low, up.high, 5):
        parts.append(_line("grid", LEFT, up(tick), RIGHT, up(tick)))
        parts.append(_text(LEFT - 6, up(tick) + 4, _number(tick), "end"))
    for tick, name in names:
        parts.append(_line("tick", across(tick), BOTTOM, across(tick), BOTTOM + 4))
        parts.append(_text(across(tick), BOTTOM + 18, name, "middle"))
    return [*parts, _line("axis", LEFT, BOTTOM, RIGHT, BOTTOM)]


def _path(kind: str, across: _Scale, up: _Scale, xs: np.ndarray, ys: np.ndarray, label: str | None = None) -> Markup:
    words, pen_is_up = [], True
    for at, value in zip(xs, ys, strict=True):
        if np.isfinite(value):
            words.append(f"{'M' if pen_is_up else 'L'}{across(at):.1f},{up(value):.1f}")
        pen_is_up = not np.isfinite(value)
    named = Markup("") if label is None else Markup(' data-label="{}"').format(label)
    return Markup('<path class="{}" d="{}"{}/>').format(kind, "".join(words), named)


def _mark(
    number: int, label: str, across: _Scale, up: _Scale, at: float, value: float, error: float | None
) -> list[Markup]:
    if not math.isfinite(value):
        return []
    x, y = across(at), up(value)
    spread = ""
    bar = []
    if error is not None and math.isfinite(error):
        spread = f" ± {error:.4g}"
        bar = [_line(f"error s{number}", x, up(value - error), x, up(value + error))]
    shape = '<path class="mark s{}" d="M{:.1f},{:.1f}l5,5l-5,5l-5,-5z"><title>{}</title></path>'
    return [*bar, Markup(shape).format(number, x, y - 5, f"{label}: {value:.4g}{spread}")]


def _dot(kind: str, x: float, y: float) -> Markup:
    return (
        Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2"/>').format(kind, x, y)
        if math.isfinite(y)
        else Markup()
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float, what: str = "") -> Markup:
    line = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"')
    end = Markup("><title>{}</title></line>").format(what) if what else Markup("/>")
    return line.format(kind, x1, y1, x2, y2) + end


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)
