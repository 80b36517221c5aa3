"""Places in memory for what a step computes in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .operators import TYPES
from .statements import Lines
from .views import Buffer


def bytes_of(b: Buffer) -> int:
    """What it takes, up to where the next may begin."""
    return -(-b.size * b.dtype.itemsize // 64) * 64


def places_of(buffers: Sequence[Buffer], named: Sequence[set[str]], first: int) -> tuple[dict[Buffer, int], int]:
    """Places of buffers, from a byte on, and where they end. Those that are never in use together may share theirs."""
    found: dict[Buffer, int] = {}
    live: list[tuple[int, int, int]] = []  # where one begins, where it ends, the last statement that uses it
    most = first
    spans = {b: [i for i, names in enumerate(named) if b.name in names] for b in buffers}
    for b in sorted((b for b in buffers if spans[b]), key=lambda b: spans[b][0]):
        live = sorted(x for x in live if x[2] >= spans[b][0])
        size, at = bytes_of(b), first
        gaps = []
        for begin, end, _ in live:
            if begin - at >= size:
                gaps.append((begin - at, at))
            at = max(at, end)
        at = min(gaps)[1] if gaps else at
        found[b] = at
        live.append((at, at + size, spans[b][-1]))
        most = max(most, at + size)
    return found, most


def scoped(
    statements: Sequence[Lines], named: Sequence[set[str]], places: Mapping[Buffer, int], ahead: Sequence[str]
) -> Iterator[str]:
    """The lines of a function, in which each statement declares the buffers that it uses: these may share places."""
    by_name = {b.name: b for b in places}
    for statement, names, fetched in zip(statements, named, ahead, strict=True):
        *first, last = statement.text
        lines = [*first, last.replace("{ahead}", fetched)]
        mine = sorted(names & by_name.keys(), key=lambda name: int(name[1:]))
        if not mine:
            yield from lines
            continue
        comments = 1 if lines[0].startswith("/*") else 0
        yield from lines[:comments]
        yield "{"
        for name in mine:
            b = by_name[name]
            yield f"  {TYPES[b.dtype]} *restrict {name} = (void *)((char *)p[2] + {places[b]});"
        yield from ("  " + x for x in lines[comments:])
        yield "}"
