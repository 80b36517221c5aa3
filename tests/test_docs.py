"""What the pages say runs, runs."""

import re
import subprocess
import sys
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


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_run_and_are_exact(script):
    said = subprocess.run([sys.executable, "-P", ROOT / "examples" / script], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    differences = [float(d) for d in re.findall(r"largest difference.* ([\d.]+e-\d+|0.0)", said.stdout)]
    assert differences and max(differences) < 1e-5


def test_no_page_is_half_merged():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    assert len(pages) > 5
    assert [p.name for p in pages if re.search(r"^(<<<<<<<|>>>>>>>) ", p.read_text(), re.M)] == []
