"""The report of a step model as one page of HTML: what streams, what is kept, and where the frames wait.

The page holds all that it needs (no scripts, nothing from elsewhere). Text comes from the user's model: it is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from .output_info import OutputInfo
from .stages import Stage

if TYPE_CHECKING:
    from .report import Report

MOST_ROWS = 250  # of the table; deeper modules are drawn together until there are no more
ROW, LANE = 22, 9  # pixels: a row of the table, the distance of two arcs
MOST_FRAMES = 72  # of the picture in time that are drawn one by one

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --dim: #68737d; --line: #d9dee3; --paper: #fff; --stream: #2f7d62;
  --clip: #c2571a; --static: #9aa4ad; --state: #3b6fb6; --soft: #f3f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --dim: #97a2ad; --line: #39424b; --paper: #171b20;
  --stream: #55b894; --clip: #ee8b52; --static: #69747f; --state: #76a5e6; --soft: #20262d; } }
.cofx { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px;
  margin: auto; padding: 24px; }
.cofx h1 { font-size: 22px; margin: 0 0 4px; } .cofx h2 { font-size: 15px; margin: 28px 0 8px; }
.cofx p { margin: 4px 0; color: var(--dim); } .cofx code { font: 12px ui-monospace, monospace; }
.cofx .facts { display: flex; flex-wrap: wrap; gap: 8px; margin: 12px 0; }
.cofx .fact { background: var(--soft); border-radius: 8px; padding: 8px 14px; }
.cofx .fact b { display: block; font-size: 18px; } .cofx .fact span { color: var(--dim); font-size: 12px; }
.cofx table { border-collapse: collapse; width: 100%; font-size: 12px; }
.cofx th { text-align: left; color: var(--dim); font-weight: 500; border-bottom: 1px solid var(--line); }
.cofx th, .cofx td { padding: 0 10px 0 0; height: 22px; white-space: nowrap; }
.cofx td.n, .cofx th.n { text-align: right; }
.cofx .map { display: flex; align-items: flex-start; overflow-x: auto; } .cofx svg { display: block; flex: none; }
.cofx .bar { display: inline-block; height: 9px; border-radius: 2px; vertical-align: middle; min-width: 1px; }
.cofx .key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 4px 0 12px; }
.cofx ul { margin: 4px 0; padding-left: 18px; }
"""


def page(report: Report, name: str) -> str:
    """A page of HTML.

    Args:
        report: of a step model.
        name: of the model, for its title.
    """
    title = escape(name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: cofx report</title>'
        f'</head><body style="margin:0">{section(report, name)}</body></html>\n'
    )


def section(report: Report, name: str) -> str:
    """The same without a frame around it, as a notebook shows it."""
    first = report.outputs[0] if report.outputs else None
    parts = [
        f"<style>{STYLE}</style>",
        f'<div class="cofx"><h1>{escape(name)}</h1>',
        f"<p>{escape(_promise(first))}</p>" if first else "",
        _facts(report, first),
        "<h2>In time</h2>" + _in_time(first) if first else "",
        _outputs(report.outputs) if len(report.outputs) > 1 else "",
        "<h2>From input to output</h2>" + _map(report),
        _list("Recomputed over whole clips", report.recomputed),
        _list("Approximated, as asked", report.approximated),
        "</div>",
    ]
    return "".join(parts)


def _promise(output: OutputInfo) -> str:
    return {
        "stream": "All outputs put together, flush included, equal the model on the whole stream.",
        "clip": "At every step the output equals the model on the last clip.",
        "prefix": "At every step the output equals the model on all frames so far.",
        "first-clip": "Equals the model on one clip and a flush; later it looks on the last frames of the stream.",
        "approximate": "Equals the step model's reference_module, not the original.",
    }.get(output.equivalence, "")


def _facts(report: Report, first: OutputInfo | None) -> str:
    facts: list[tuple[str, str]] = []
    if first is not None:
        facts += [
            (first.equivalence, "equivalence"),
            (str(first.delay), "delay"),
            ("∞" if first.receptive_field == math.inf else str(first.receptive_field), "receptive field"),
            (str(first.stride), "stride"),
        ]
    facts.append((_short(report.macs_per_step), "multiply-adds per step"))
    if report.macs_per_step:
        facts.append(
            (f"{report.macs_per_clip / report.macs_per_step:.1f}x", f"fewer than a clip of {report.clip_frames}")
        )
    facts += [(f"{report.streamed:.0%}", "of the work streamed"), (_bytes(report.state_bytes), "of state")]
    return (
        '<div class="facts">'
        + "".join(f'<div class="fact"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in facts)
        + "</div>"
    )


# -- the picture in time -----------------------------------------------------------------------------------------------


def _in_time(output: OutputInfo) -> str:
    """Which frames one output frame is made from, and when it comes."""
    infinite, follows = output.receptive_field == math.inf, output.equivalence in ("stream", "approximate")
    after = math.ceil(output.delay)  # frames behind the one that the output stands for
    before = max(math.ceil(output.padding), 0)  # frames in front of it, memory left out
    number = before + 1 + after
    each = 14 if number <= MOST_FRAMES else 14 * MOST_FRAMES / number
    left = 70 if infinite else 20
    end, marked = left + number * each, left + before * each
    if number <= MOST_FRAMES:
        frames = "".join(_frame(left + i * each, each - 2, "stream") for i in range(number))
    else:
        frames = _frame(left, number * each, "stream")
    if infinite:
        frames += f'<text x="{left - 8}" y="45" text-anchor="end">all before</text>'
    if not follows:
        told = "one output frame is made from these, and comes with the last one"
        return _drawing(end + 20, 56, f'<text x="{left}" y="22">{told}</text>{frames}')
    frames += _frame(marked, max(each - 2, 3), "state")
    told = "one output frame is made from these; it stands for the marked one and comes with the last one"
    frames += f'<text x="{left}" y="22">{told}</text>'
    if not after:
        return _drawing(end + 20, 56, frames)
    frames += (
        f'<path d="M{marked + each / 2:.0f} 54 V66 H{end - each / 2:.0f} V54" fill="none" stroke="var(--dim)"/>'
        f'<text x="{(marked + end) / 2:.0f}" y="80" text-anchor="middle">delay {output.delay}</text>'
    )
    return _drawing(end + 20, 88, frames)


def _drawing(width: float, height: int, inside: str) -> str:
    return f'<svg width="{max(width, 620):.0f}" height="{height}" font-size="12" fill="var(--dim)">{inside}</svg>'


def _frame(x: float, width: float, kind: str) -> str:
    return f'<rect x="{x:.1f}" y="34" width="{width:.1f}" height="12" rx="2" fill="var(--{kind})"/>'


# -- the map -----------------------------------------------------------------------------------------------------------


def _map(report: Report) -> str:
    """A row for each stage, arcs on the left where frames go further than to the next row."""
    stages = fold(report.stages, MOST_ROWS)
    if not stages:
        return ""
    work, kept = max(s.macs for s in stages) or 1, max(s.state_bytes for s in stages) or 1
    total = sum(s.macs for s in stages) or 1
    arcs = _arcs(stages)
    rows = []
    for s in stages:
        colour = f"var(--{s.fact})"
        share = "" if not s.macs else f"{s.macs / total:.1%}" if s.macs >= total / 1000 else "< 0.1%"
        cells = (
            f'<td><code style="color:{colour}">{escape(s.module or "·")}</code></td>',
            f"<td>{escape(_some(s.ops))}</td>",
            *(f'<td class="n">{_frames(number)}</td>' for number in (s.delay, s.receptive_field, s.stride)),
            f"<td>{_bar(s.macs / work, colour)} {escape(share)}</td>",
            f"<td>{_bar(s.state_bytes / kept, 'var(--state)')} {_bytes(s.state_bytes) if s.state_bytes else ''}</td>",
        )
        rows.append(f'<tr title="{escape(s.at, quote=True)}">{"".join(cells)}</tr>')
    keys = "".join(
        f'<span class="key" style="background:var(--{kind})"></span>{text}'
        for kind, text in (
            ("stream", "once per frame"),
            ("clip", "again for each clip"),
            ("state", "kept between steps"),
        )
    )
    return (
        f'<p>{keys}</p><div class="map">{arcs}<table><tr><th>module</th><th>ops</th><th class="n">delay</th>'
        '<th class="n">receptive field</th><th class="n">stride</th><th>multiply-adds</th><th>state</th></tr>'
        f"{''.join(rows)}</table></div>"
    )


def fold(stages: Sequence[Stage], most: int) -> list[Stage]:
    """No more than so many stages: those of one module, at the greatest depth at which that is enough."""
    depth = max((s.module.count(".") + 1 for s in stages), default=1)
    folded = list(stages)
    while len(folded) > most and depth > 1:
        depth -= 1
        folded = _joined(stages, [".".join(s.module.split(".")[:depth]) for s in stages])
    return folded


def _joined(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """Neighbours of one name as one stage."""
    group: list[int] = []
    for i, name in enumerate(names):
        group.append(0 if i == 0 else group[-1] + (name != names[i - 1]))
    joined: list[Stage] = []
    for g in range(group[-1] + 1 if group else 0):
        members = [s for s, n in zip(stages, group, strict=True) if n == g]
        facts = {s.fact for s in members}
        joined.append(
            Stage(
                module=names[group.index(g)],
                ops=tuple(dict.fromkeys(op for s in members for op in s.ops)),
                at=members[0].at,
                fact="clip" if "clip" in facts else "stream" if "stream" in facts else "static",
                delay=members[-1].delay,
                receptive_field=members[-1].receptive_field,
                stride=members[-1].stride,
                macs=sum(s.macs for s in members),
                state_bytes=sum(s.state_bytes for s in members),
                reads=tuple(sorted({group[r] for s in members for r in s.reads} - {g})),
            )
        )
    return joined


def _arcs(stages: Sequence[Stage]) -> str:
    """What is read from further up than the row before, each in the first free column."""
    spans = sorted({(r, i) for i, s in enumerate(stages) for r in s.reads if i - r > 1}, key=lambda x: (x[0], -x[1]))
    free: list[int] = []  # for each column the row at which it is free again
    drawn: list[tuple[int, int, int]] = []
    for start, stop in sorted(spans, key=lambda x: x[1] - x[0]):
        column = next(
            (c for c in range(len(free)) if all(b <= start or a >= stop for a, b, d in drawn if d == c)), None
        )
        if column is None:
            column = len(free)
            free.append(0)
        drawn.append((start, stop, column))
    width = LANE * (len(free) + 1) + 6
    middle = [ROW + 1 + i * ROW + ROW / 2 for i in range(len(stages))]
    lines = [
        f'<path d="M{width} {middle[a]} H{width - LANE * (c + 1)} V{middle[b]} H{width}" fill="none" '
        'stroke="var(--static)" stroke-opacity="0.8"/>'
        for a, b, c in drawn
    ]
    dots = [
        f'<circle cx="{width - 1}" cy="{y}" r="2" fill="var(--{s.fact})"/>' for y, s in zip(middle, stages, strict=True)
    ]
    height = ROW * (len(stages) + 1) + 4
    return f'<svg width="{width + 8}" height="{height}">{"".join(lines)}{"".join(dots)}</svg>'


# -- small parts -------------------------------------------------------------------------------------------------------


def _outputs(outputs: Sequence[OutputInfo]) -> str:
    rows = "".join(
        f"<tr><td>{i}</td><td>{escape(o.equivalence)}</td><td>{o.delay}</td><td>{_frames(o.receptive_field)}</td>"
        f"<td>{o.stride}</td></tr>"
        for i, o in enumerate(outputs)
    )
    return (
        "<h2>Outputs</h2><table><tr><th>output</th><th>equivalence</th><th>delay</th><th>receptive field</th>"
        f"<th>stride</th></tr>{rows}</table>"
    )


def _list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li><code>{escape(line)}</code></li>" for line in lines)
    return f"<h2>{title}</h2><ul>{items}</ul>" if lines else ""


def _bar(share: float, colour: str) -> str:
    return f'<span class="bar" style="width:{60 * share:.1f}px;background:{colour}"></span>' if share else ""


def _frames(number: object) -> str:
    return "" if number is None else "∞" if number == math.inf else str(number)


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def _bytes(number: float) -> str:
    for size, unit in ((1 << 20, "MB"), (1 << 10, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"
