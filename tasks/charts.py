"""Charts: points in a plane as an SVG picture.

In: points with their names and intervals, and what the axes say. Out: SVG text, in the reader's light or dark colours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BELOW, EDGE = 640, 420, 62, 48, 18
LINE = 15
"""Height of a line of text."""
STYLE = """
svg { font: 12px system-ui, sans-serif; fill: #222; stroke: none; background: #fff }
.axis { stroke: #999 } .guide { stroke: #bbb; stroke-dasharray: 4 4 } .bar { stroke: #4269d0 }
.point { fill: #4269d0 } .chosen { fill: #d0421b; font-weight: 600 }
@media (prefers-color-scheme: dark) { svg { fill: #ddd; background: #16181c } .axis { stroke: #666 } }
"""


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    name: str = ""
    lower: float | None = None
    """Of y."""
    upper: float | None = None
    chosen: bool = False
    """Drawn in the other colour."""


@dataclass(frozen=True)
class Axis:
    title: str
    low: float
    high: float
    percent: bool = False

    def ticks(self) -> list[float]:
        """Four to nine round values."""
        step = 10 ** math.floor(math.log10(self.high - self.low))
        step = next(s for s in (step / 5, step / 4, step / 2, step, 2 * step) if (self.high - self.low) / s <= 8)
        return [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]

    def text(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:.3g}"


def chart(title: str, x: Axis, y: Axis, points: Sequence[Point], diagonal: bool = False) -> str:
    """Points with their names beside them; `diagonal` draws the line on which both axes have the same value."""

    def across(value: float) -> float:
        return round(LEFT + (value - x.low) / (x.high - x.low) * (WIDTH - LEFT - EDGE), 1)

    def down(value: float) -> float:
        return round(HEIGHT - BELOW - (value - y.low) / (y.high - y.low) * (HEIGHT - BELOW - 2 * EDGE), 1)

    bottom, right = down(y.low), across(x.high)
    parts = [f'<text x="{LEFT}" y="{EDGE}" font-weight="600">{escape(title)}</text>']
    parts += [f'<path class="axis" fill="none" d="M{LEFT} {down(y.high)} V{bottom} H{right}"/>']
    for value in x.ticks():
        parts.append(f'<text x="{across(value)}" y="{bottom + LINE}" text-anchor="middle">{x.text(value)}</text>')
    for value in y.ticks():
        parts.append(f'<text x="{LEFT - 6}" y="{down(value) + 4}" text-anchor="end">{y.text(value)}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.title)}</text>')
    turned = f"translate(14 {(bottom + down(y.high)) / 2}) rotate(-90)"
    parts.append(f'<text text-anchor="middle" transform="{turned}">{escape(y.title)}</text>')
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        parts.append(f'<path class="guide" d="M{across(low)} {down(low)} L{across(high)} {down(high)}"/>')
    taken = [(across(p.x) - 5, across(p.x) + 5, down(p.y), 9) for p in points]

    def near(p: Point) -> int:
        return sum(abs(across(p.x) - across(q.x)) < 60 and abs(down(p.y) - down(q.y)) < 30 for q in points)

    for p in sorted(points, key=lambda p: (near(p), -p.y)):  # who stands alone gets the place beside it
        place, height, kind = across(p.x), down(p.y), "chosen" if p.chosen else "point"
        if p.lower is not None and p.upper is not None:
            parts.append(f'<path class="bar" d="M{place} {down(p.lower)} V{down(p.upper)}"/>')
        parts.append(f'<circle class="{kind}" cx="{place}" cy="{height}" r="4"/>')
        if p.name:
            parts.append(_name(p, place, height, right, taken))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


def grid(charts: Sequence[str]) -> str:
    """Charts side by side, two in a row."""
    rows = -(-len(charts) // 2)
    size = f'viewBox="0 0 {2 * WIDTH} {rows * HEIGHT}" width="{2 * WIDTH}" height="{rows * HEIGHT}"'
    places = [f'<svg x="{i % 2 * WIDTH}" y="{i // 2 * HEIGHT}" ' for i in range(len(charts))]
    inner = [c.replace("<svg ", place, 1) for c, place in zip(charts, places, strict=True)]
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *inner, "</svg>"]) + "\n"


def _name(point: Point, place: float, height: float, right: float, taken: list[tuple[float, float, float, int]]) -> str:
    """The point's name behind it, or else before it, or else lower: where no point and no other name is. `taken` has
    left, right and middle of those, and how far a line of text must stay away from it."""
    width = 7 * len(point.name)
    for shift in range(0, HEIGHT, 2):
        for anchor, start in (("start", place + 7), ("end", place - 7 - width)):
            line = height + shift
            met = any(start < b and a < start + width and abs(line - y) < gap for a, b, y, gap in taken)
            if not met and start + width < right:
                taken.append((start, start + width, line, LINE - 2))
                x = start if anchor == "start" else start + width
                kind = ' class="chosen"' if point.chosen else ""
                return f'<text{kind} x="{x}" y="{line + 4}" text-anchor="{anchor}">{escape(point.name)}</text>'
    return ""
