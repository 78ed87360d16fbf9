"""The search as one HTML file that opens from disk and can be mailed: no script, no network, a few dozen kilobytes.

The picture is SVG written by hand: accuracy over latency, one mark a candidate, the budget as a line, the front as
steps. Details show when the pointer rests on a mark.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from html import escape

from attnsurgery.search.record import Record, Timing

WIDTH, HEIGHT = 860, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 20, 50

_STATES = {
    "trained": "trained",
    "over_budget": "over budget, not trained",
    "too_many_blocks": "too many blocks, not built",
    "duplicate": "seen before, not trained again",
    "failed": "failed",
    "interrupted": "interrupted, asked for again",
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --faint: #8a93a3; --line: #dfe3ea; --paper: #ffffff;
        --mark: #3b6fb6; --best: #c2410c; --base: #111827; --over: #b8bfca; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --faint: #939cab; --line: #343b47; --paper: #171a21; --mark: #7aa7e8; --best: #fb923c;
          --base: #f3f4f6; --over: #5b6472; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 900px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
tr.best td { font-weight: 600; color: var(--best); }
code, pre { font: 13px/1.4 ui-monospace, monospace; overflow-x: auto; }
.verdict { font-size: 1.1rem; border-left: 4px solid var(--best); padding-left: .8rem; }
.faint, svg text { color: var(--faint); fill: var(--faint); }
svg { width: 100%; height: auto; } svg text { font-size: 12px; }
.grid { stroke: var(--line); } .budget { stroke: var(--best); stroke-dasharray: 5 4; }
.front { fill: none; stroke: var(--mark); stroke-width: 1.5; }
.trained { fill: var(--mark); } .over_budget { fill: none; stroke: var(--over); stroke-width: 1.5; }
.base { fill: var(--base); } .best { fill: var(--best); }
.error { stroke: var(--mark); opacity: .45; }
"""


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    title: str
    budgets: str
    """All of them, in words."""
    budget_ms: float | None
    wanted: int
    conditions: str
    data: str
    candidates: int
    base: Record
    records: list[Record]
    best: Record | None
    front: list[Record]
    verdict: str | None
    confirmed: Timing | None
    interrupted: bool
    command: str
    versions: dict[str, str]


def render(report: Report) -> str:
    """The whole page."""
    counts: Counter[str] = Counter(record.state for record in report.records)
    tally = ", ".join(f"{counts[state]} {words}" for state, words in _STATES.items() if counts[state])
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>attnsurgery: {escape(report.title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(report.title)}</h1>",
            *_summary(report),
            "<h2>Accuracy and latency</h2>",
            picture(report),
            "<h2>Trials</h2>",
            f"<p>{escape(tally or 'none yet')}; the space has {report.candidates:,} candidates.</p>",
            _table(report),
            "<h2>Conditions</h2>",
            _conditions(report),
            "</body></html>\n",
        ]
    )


def _summary(report: Report) -> list[str]:
    lines = []
    if report.interrupted:
        lines.append('<p class="verdict">Interrupted: the same command goes on from here.</p>')
    if report.verdict:
        lines.append(f'<p class="verdict">{escape(report.verdict)}</p>')
    best = report.best
    if best is None or best.timing is None:
        lines.append(f"<p>No candidate was trained within {report.budgets} so far.</p>")
        return lines
    name = str(best.recipe["name"]) if best.recipe else ""
    lines.append(
        f"<p>Best on validation: <b>{escape(best.what())}</b> (trial {best.number}, <code>{escape(name)}</code>), "
        f"{_percent(best.top1)} at {_ms(best.timing)}; the base trained equally long: {_percent(report.base.top1)}"
        f"{f' at {report.base.timing.ms:.3g} ms' if report.base.timing else ''}.</p>"
    )
    if report.confirmed:
        words = ""
        if report.budget_ms is not None:
            over = report.confirmed.ms > report.budget_ms
            words = f", which is over the budget of {report.budget_ms:g} ms" if over else ", within the budget"
        lines.append(f"<p>Measured again after the search: {_ms(report.confirmed)}{words}.</p>")
    return lines


def picture(report: Report) -> str:
    """The Pareto picture as SVG."""
    shown = [record for record in report.records if record.timing and record.state in {"trained", "over_budget"}]
    times = [record.timing.ms for record in [report.base, *shown] if record.timing]
    scores = [record.top1 for record in [report.base, *shown] if record.top1 is not None]
    budget = report.budget_ms
    near = [*times, *([] if budget is None or budget >= 3 * max(times, default=1.0) else [budget])]
    x = _Axis(min(near, default=0.0), max(near, default=1.0), _LEFT, WIDTH - _RIGHT)
    y = _Axis(min(scores, default=0.0), max(scores, default=1.0), HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="validation accuracy against latency">',
        *_grid(x, y),
        *([] if budget is None else _budget_line(budget, x)),
        _front_line(report.front, x, y),
        *(_mark(record, x, y, record.state) for record in shown),
        _mark(report.base, x, y, "base"),
    ]
    if report.best:
        parts.append(_mark(report.best, x, y, "best"))
    return "\n".join([*parts, "</svg>", _legend(report)])


@dataclass(frozen=True)
class _Axis:
    """Values to pixels, with a margin around what is shown."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        margin = (self.high - self.low or abs(self.high) * 0.1 or 1.0) * 0.08
        low, high = self.low - margin, self.high + margin
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        span = self.high - self.low or abs(self.high) * 0.1 or 1.0
        step = 10.0 ** math.floor(math.log10(span / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
        first = math.ceil((self.low - 0.05 * span) / step)
        return [index * step for index in range(first, math.floor((self.high + 0.05 * span) / step) + 1)]


def _grid(x: _Axis, y: _Axis) -> list[str]:
    lines = []
    for value in y.ticks():
        at = y.at(value)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{100 * value:.4g} %</text>')
    for value in x.ticks():
        at, foot = x.at(value), HEIGHT - _BOTTOM
        lines.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{foot}"/>')
        lines.append(f'<text x="{at:.1f}" y="{foot + 18}" text-anchor="middle">{value:.4g}</text>')
    middle = (WIDTH + _LEFT - _RIGHT) / 2
    lines.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">latency, ms; up is validation top-1</text>')
    return lines


def _budget_line(budget_ms: float, x: _Axis) -> list[str]:
    at = x.at(budget_ms)
    if not _LEFT <= at <= WIDTH - _RIGHT:
        return []
    return [
        f'<line class="budget" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>',
        f'<text x="{at - 6:.1f}" y="{_TOP + 12}" text-anchor="end">budget {budget_ms:g} ms</text>',
    ]


def _front_line(front: list[Record], x: _Axis, y: _Axis) -> str:
    points: list[str] = []
    before: float | None = None
    for record in front:
        if record.timing is None or record.top1 is None:
            continue
        across = x.at(record.timing.ms)
        if before is not None:
            points.append(f"{across:.1f},{before:.1f}")
        before = y.at(record.top1)
        points.append(f"{across:.1f},{before:.1f}")
    return f'<polyline class="front" points="{" ".join(points)}"/>'


def _mark(record: Record, x: _Axis, y: _Axis, kind: str) -> str:
    if record.timing is None:
        return ""
    across = x.at(record.timing.ms)
    up = HEIGHT - _BOTTOM - 6.0 if record.top1 is None else y.at(record.top1)
    title = f"<title>{escape(_hover(record))}</title>"
    low, high = x.at(record.timing.low_ms), x.at(record.timing.high_ms)
    error = f'<line class="error" x1="{low:.1f}" x2="{high:.1f}" y1="{up:.1f}" y2="{up:.1f}"/>'
    if kind == "base":
        return f'{error}<rect class="base" x="{across - 5:.1f}" y="{up - 5:.1f}" width="10" height="10">{title}</rect>'
    radius = 6 if kind == "best" else 4.5
    return f'{error}<circle class="{kind}" cx="{across:.1f}" cy="{up:.1f}" r="{radius}">{title}</circle>'


def _hover(record: Record) -> str:
    who = "the base" if record.number < 0 else f"trial {record.number}: {record.what()}"
    score = "not trained" if record.top1 is None else f"{_percent(record.top1)} on validation"
    return f"{who}\n{_ms(record.timing)}\n{score}"


def _legend(report: Report) -> str:
    usual = report.base.timing.ms if report.base.timing else 1.0
    far = ""
    if report.budget_ms is not None and report.budget_ms > 3 * usual:
        far = f" The budget of {report.budget_ms:g} ms lies to the right of the picture."
    return (
        '<p class="faint">■ base ● trained candidate ○ over budget, measured only; orange is the best, the line is '
        f"the front. Horizontal bars are 95 % intervals of the latency.{far}</p>"
    )


def _table(report: Report) -> str:
    head = (
        '<tr><th class="n">trial</th><th>blocks</th><th class="n">latency, ms</th><th class="n">val top-1</th>'
        '<th class="n">parameters</th><th>outcome</th></tr>'
    )
    rows = [_row(report.base, "base", "")]
    for record in report.records:
        if record.state == "too_many_blocks":
            continue  # nothing was built: the tally above is all there is to say
        best = report.best is not None and record.number == report.best.number
        rows.append(_row(record, str(record.number), ' class="best"' if best else ""))
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _row(record: Record, number: str, attributes: str) -> str:
    outcome = "reference" if record.number < 0 else _STATES[record.state]
    if record.duplicate_of is not None:
        outcome += f" (as {'the base' if record.duplicate_of < 0 else f'trial {record.duplicate_of}'})"
    if record.reason:
        outcome += f": {record.reason}"
    parameters = f"{record.parameters:,}" if record.parameters else ""
    return (
        f'<tr{attributes}><td class="n">{number}</td><td>{escape(record.what())}</td>'
        f'<td class="n">{_ms(record.timing, unit="")}</td><td class="n">{_percent(record.top1)}</td>'
        f'<td class="n">{parameters}</td><td>{escape(outcome)}</td></tr>'
    )


def _conditions(report: Report) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.items())
    return (
        f"<p>Latency: {escape(report.conditions)}; measured alternately with the base and put on the base's scale. "
        f"<br>{escape(versions)}<br>Data: {escape(report.data)}; candidates are chosen by validation images, the "
        f"verdict is on test images. Wanted: {report.wanted} trained candidates within {escape(report.budgets)}.</p>"
        f"<p>The command that does this:</p><pre>{escape(report.command or '(run from Python)')}</pre>"
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _ms(timing: Timing | None, unit: str = " ms") -> str:
    if timing is None:
        return ""
    half = (timing.high_ms - timing.low_ms) / 2
    return f"{timing.ms:.3f} ± {half:.3f}{unit}"
