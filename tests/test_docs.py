"""What the pages say runs, runs."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_first_block_of_python_runs(page, capsys):
    """And prints what the next block says, where it is one."""
    text = (ROOT / page).read_text()
    block, printed = re.search(r"```python\n(.*?)```\s*(?:```\n(.*?)```)?", text, re.S).groups()
    with torch.random.fork_rng():
        before = torch.is_grad_enabled()
        try:
            exec(compile(block, page, "exec"), {})
        finally:
            torch.set_grad_enabled(before)
    said = capsys.readouterr().out
    if printed:
        plain = [re.sub(r"[\d.]+e-\d+", "small", t).strip() for t in (said, printed)]
        assert plain[0] == plain[1]


def test_no_page_is_half_merged():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    assert len(pages) > 5
    assert [p.name for p in pages if re.search(r"^(<<<<<<<|>>>>>>>) ", p.read_text(), re.M)] == []
