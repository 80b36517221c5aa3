"""Put the benchmarks' numbers into README.md: the lines between ``<!-- numbers -->`` and ``<!-- /numbers -->``.

::

    python benchmarks/readme.py            # after run.py or flops.py
    python benchmarks/readme.py --check    # say whether README.md has them
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BACKENDS = ("eager", "onnxruntime", "c", "inductor")


def numbers() -> str:
    """What README.md says of multiply-adds and of time."""
    flops = {r["model"]: r["ratio"] for r in _results("flops")}
    rows = [r for r in _results("run")["rows"] if r.get("batch", 1) == 1 and "over continual" in r]
    found = {r["workload"]: best(r) for r in rows}
    least, most = (pick(found, key=found.__getitem__) for pick in (min, max))
    mean = statistics.geometric_mean(found.values())
    text = (
        f"Per step X3D-M takes {flops['X3D-M']}x fewer multiply-adds than per clip, Slow-R50 {flops['Slow-R50']}x, "
        f"A-GCN {flops['A-GCN']}x ([all](benchmarks/results/flops.md), beside what that library publishes). In time, a "
        f"step of the fastest backend is {found[least]:.1f}x ({least[3:]}) to {found[most]:.0f}x ({most[3:]}) faster "
        f"than a step of continual-inference, {mean:.1f}x in the geometric mean of {len(found)} nets "
        "([all](benchmarks/results/run.md))."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def best(row: dict[str, Any], time: str = "us") -> float:
    """How many times faster than continual-inference the fastest backend is in a row of run.json."""
    return max(float(row["continual"][time] / row[n][time]) for n in BACKENDS if n in row)


def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def written(readme: str) -> str:
    """A README with the numbers of now."""
    return re.sub(
        r"(<!-- numbers -->\n).*?(\n<!-- /numbers -->)", lambda m: m[1] + numbers() + m[2], readme, flags=re.S
    )


def main() -> None:
    """The command line."""
    path = ROOT / "README.md"
    before = path.read_text()
    after = written(before)
    if "--check" in sys.argv:
        sys.exit(0 if after == before else "README.md has other numbers: run python benchmarks/readme.py")
    path.write_text(after)


if __name__ == "__main__":
    main()
