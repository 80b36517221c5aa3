"""The report: its numbers add up stage by stage, and its page is sound HTML."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import cofx
from cofx.report_page import fold, page
from cofx.stages import Stage
from contract import compile_case
from models import spread

VOID = {"meta", "br", "rect", "path", "circle"}


class Tags(HTMLParser):
    """Collects the text of a page; every tag has to be closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.filterwarnings("ignore:.*first-clip")
@pytest.mark.parametrize("sample", spread(24))
def test_stages_add_up(sample):
    step = compile_case(sample).step
    report = step.report()
    assert sum(s.macs for s in report.stages) == report.macs_per_clip
    assert sum(s.state_bytes for s in report.stages) == report.state_bytes
    assert all(r < i for i, s in enumerate(report.stages) for r in s.reads)
    assert report.outputs == tuple(step.outputs)
    Tags(page(report, "net"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        return x[:, :1] + self.gru(self.conv(x).transpose(1, 2))[0].transpose(1, 2)


@pytest.fixture
def report():
    return cofx.compile(Net().eval(), torch.randn(1, 2, 20)).report()


def test_stages(report):
    found = {s.module: s for s in report.stages}
    assert [s.module for s in report.stages] == ["input", "", "conv", "", "gru", ""]
    assert found["conv"].delay == 1 and found["conv"].receptive_field == 3 and found["conv"].macs == 3 * 2 * 4 * 20
    assert found["gru"].receptive_field == float("inf") and found["gru"].state_bytes == 4 * 4
    assert found["input"].state_bytes == 2 * 2 * 4  # for the convolution, which the residual shares
    assert "test_report.py" in found["conv"].at


def test_page(report, tmp_path):
    report.save(tmp_path / "report.html")
    text = Tags((tmp_path / "report.html").read_text()).text
    assert {"Net", "stream", "delay", "conv", "conv1d"} <= set(text) and "delay 1" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]
    assert "<html" not in report._repr_html_()


def test_names_are_escaped(report):
    assert "<script>" not in page(report, "<script>alert(1)</script>")


def test_deep_modules_are_drawn_together():
    stages = [
        Stage(f"stage{i // 8}.block{i // 2}.conv{i}", ("conv1d",), "", "stream", i, i, 1, 10, 1, (i - 1,) if i else ())
        for i in range(16)
    ]
    assert fold(stages, 16) == stages
    assert [s.module for s in fold(stages, 8)] == [f"stage{i // 4}.block{i}" for i in range(8)]
    two = fold(stages, 2)
    assert [s.module for s in two] == ["stage0", "stage1"]
    assert [s.macs for s in two] == [80, 80] and two[1].reads == (0,) and two[1].delay == 15
