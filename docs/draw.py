"""Draws the picture of the front page, docs/images/unrolled.svg.

    python docs/draw.py

An LSTM over four steps. Dots show what moves: the input into a step, the memory and the
output on to the next. One set of keyframes serves all steps, each of which begins a
fifth of the time after the one before. Who asks for reduced motion sees no dots.
"""

from __future__ import annotations

from pathlib import Path

STEPS = 4
CELL, GAP, LEFT = 112, 40, 76  # widths
MEMORY, GATES, BUS, INPUT, OUTPUT = 95, 140, 170, 236, 40  # heights
PLACES = {"f": 20, "i": 44, "g": 68, "o": 92}
COLOURS = {"f": "#ee6677", "i": "#4477aa", "g": "#228833", "o": "#aa3377"}
SECONDS = 7.5
TIMES = "\N{MULTIPLICATION SIGN}"

STYLE = f"""
.unrolled {{ --ink: var(--pst-color-text-base, #222832);
  --line: var(--pst-color-text-muted, #48566b);
  --box: var(--pst-color-surface, #f3f4f5);
  --ground: var(--pst-color-background, #fff);
  font-family: var(--pst-font-family-base, system-ui, sans-serif);
  max-width: 100%; height: auto; }}
@media (prefers-color-scheme: dark) {{
  .unrolled {{ --ink: var(--pst-color-text-base, #ced6dd);
    --line: var(--pst-color-text-muted, #9ca4af);
    --box: var(--pst-color-surface, #29313d);
    --ground: var(--pst-color-background, #14181e); }} }}
.unrolled text {{ fill: var(--ink); font-size: 17px; text-anchor: middle;
  dominant-baseline: central; }}
.unrolled .letter {{ fill: #fff; font-size: 13px; font-weight: 600; }}
.unrolled .sign {{ font-size: 15px; }}
.unrolled .sub {{ font-size: 12px; }}
.unrolled .wire {{ fill: none; stroke: var(--line); stroke-width: 1.5; }}
.unrolled .box {{ fill: var(--box); stroke: var(--line);
  stroke-width: 1.5; }}
.unrolled .node {{ fill: var(--ground); stroke: var(--line);
  stroke-width: 1.5; }}
.unrolled .dot {{ opacity: 0; stroke: var(--ground);
  stroke-width: 1.5; }}
.unrolled .in {{ fill: #ccbb44; }}
.unrolled .memory {{ fill: #ee6677; }}
.unrolled .out {{ fill: #4477aa; }}
@media (prefers-reduced-motion: no-preference) {{
  .unrolled .dot, .unrolled .gate {{ animation: {SECONDS}s linear infinite both;
    animation-delay: calc(var(--t) * {SECONDS / 5}s); }}
  .unrolled .in {{ animation-name: unrolled-in; }}
  .unrolled .memory {{ animation-name: unrolled-memory; }}
  .unrolled .out.on {{ animation-name: unrolled-on; }}
  .unrolled .out.up {{ animation-name: unrolled-up; }}
  .unrolled .gate {{ animation-name: unrolled-gate; transform-box: fill-box;
    transform-origin: center; }}
}}
@keyframes unrolled-in {{ 0% {{ opacity: 0; }} 1% {{ opacity: 1; }}
  7% {{ opacity: 1; transform: translateY({BUS - INPUT + 18}px); }}
  8%, 100% {{ opacity: 0; transform: translateY({BUS - INPUT + 18}px); }} }}
@keyframes unrolled-gate {{ 0%, 6% {{ transform: none; }}
  9% {{ transform: scale(1.14); }} 13%, 100% {{ transform: none; }} }}
@keyframes unrolled-memory {{ 0%, 10% {{ opacity: 0; transform: none; }}
  11% {{ opacity: 1; transform: none; }}
  20% {{ opacity: 1; transform: translateX({GAP + PLACES["f"] + 12}px); }}
  21%, 100% {{ opacity: 0; }} }}
@keyframes unrolled-on {{ 0%, 10% {{ opacity: 0; transform: none; }}
  11% {{ opacity: 1; transform: none; }}
  20% {{ opacity: 1; transform: translateX({GAP + PLACES["f"] + 8}px); }}
  21%, 100% {{ opacity: 0; }} }}
@keyframes unrolled-up {{ 0%, 10% {{ opacity: 0; transform: none; }}
  11% {{ opacity: 1; transform: none; }}
  19% {{ opacity: 1; transform: translateY({OUTPUT - BUS + 18}px); }}
  24% {{ opacity: 1; transform: translateY({OUTPUT - BUS + 18}px); }}
  27%, 100% {{ opacity: 0; transform: translateY({OUTPUT - BUS + 18}px); }} }}
"""


def wire(*points: tuple[float, float]) -> str:
    """A line through points."""
    path = " L".join(f"{x:g},{y:g}" for x, y in points)
    return f'<path class="wire" d="M{path}"/>'


def node(x: float, y: float, sign: str) -> str:
    """An operation on a wire."""
    return (
        f'<circle class="node" cx="{x:g}" cy="{y:g}" r="8.5"/>'
        f'<text class="sign" x="{x:g}" y="{y + 0.5:g}">{sign}</text>'
    )


def variable(x: float, y: float, name: str, t: int) -> str:
    """The name of an input or output."""
    return (
        f'<circle class="node" cx="{x:g}" cy="{y:g}" r="18"/>'
        f'<text x="{x:g}" y="{y:g}">{name}<tspan class="sub" dy="5">{t}</tspan></text>'
    )


def step(t: int) -> str:
    """One step, drawn at the origin of its cell."""
    f, i, g, o = PLACES.values()
    side, middle = o + 12, (i + g) / 2
    parts = [
        f'<rect class="box" x="0" y="70" width="{CELL}" height="120" rx="12"/>',
        wire((-GAP, MEMORY), (CELL, MEMORY)),
        wire((-GAP, BUS), (o, BUS)),
        wire((f, INPUT - 18), (f, BUS)),
        wire((f, BUS), (f, MEMORY)),
        wire((i, BUS), (i, GATES), (middle, 118), (middle, MEMORY)),
        wire((g, BUS), (g, GATES), (middle, 118)),
        wire((o, BUS), (o, MEMORY)),
        wire((o, 118), (side, 118), (side, BUS), (CELL, BUS)),
        wire((side, 118), (side, OUTPUT + 18)),
        node(f, MEMORY, TIMES),
        node(middle, MEMORY, "+"),
        node(middle, 118, TIMES),
        node(o, 118, TIMES),
        variable(f, INPUT, "x", t + 1),
        variable(side, OUTPUT, "h", t + 1),
    ]
    for letter, x in PLACES.items():
        parts.append(
            f'<g class="gate"><circle cx="{x}" cy="{GATES}" r="10.5" '
            f'fill="{COLOURS[letter]}"/>'
            f'<text class="letter" x="{x}" y="{GATES}">{letter}</text></g>'
        )
    parts += [
        f'<circle class="dot in" cx="{f}" cy="{INPUT - 18}" r="6"/>',
        f'<circle class="dot memory" cx="{CELL - 12}" cy="{MEMORY}" r="6"/>',
        f'<circle class="dot out on" cx="{CELL - 8}" cy="{BUS}" r="6"/>',
        f'<circle class="dot out up" cx="{side}" cy="{BUS}" r="6"/>',
    ]
    left = LEFT + t * (CELL + GAP)
    inside = "\n  ".join(parts)
    return f'<g style="--t: {t}" transform="translate({left} 0)">\n  {inside}\n</g>'


def picture() -> str:
    """The whole file."""
    width = LEFT + STEPS * (CELL + GAP)
    end = LEFT + STEPS * (CELL + GAP) - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="unrolled" role="img" '
        f'viewBox="0 0 {width} 262" aria-labelledby="unrolled-title">',
        '<title id="unrolled-title">An LSTM over four steps: each takes an input, and '
        "hands its memory c and its output h to the next</title>",
        f"<style>{STYLE}</style>",
        f'<text x="18" y="{MEMORY}">c<tspan class="sub" dy="5">0</tspan></text>',
        f'<text x="18" y="{BUS}">h<tspan class="sub" dy="5">0</tspan></text>',
        wire((end, MEMORY), (width - 4, MEMORY)),
        wire((end, BUS), (width - 4, BUS)),
        *(step(t) for t in range(STEPS)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    path = Path(__file__).parent / "images" / "unrolled.svg"
    path.write_text(picture(), encoding="utf-8")
