"""Beside other tools: Lightning's modules and checkpoints, ptflops, and torch's flop counter against the report."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cofx
from cofx.checkpoints import apply_checkpoint, load_state_dict
from streaming import same


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, stride=2), nn.Conv1d(8, 4, 1)
    )


def torch_count(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


# -- the report, beside torch's own counter ----------------------------------------------------------------------------


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 8, 5, padding=2), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).mean(2))


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.gru(x.mT)[0]).mT


@pytest.mark.parametrize("build", [net, Pooled, Memory, lambda: nn.ConvTranspose1d(3, 4, 4, 2, 1)])
def test_report_is_what_torch_counts(build) -> None:
    """Offline, and over a long stretch in mid-stream, per step."""
    model = build().eval()
    step = cofx.compile(model, torch.randn(1, 3, 16))
    report = step.report()
    assert report.macs_per_clip == torch_count(lambda: model(torch.randn(1, 3, 16))) > 0
    for frame in torch.randn(20, 1, 3):
        step.forward_step(frame)
    frames = torch.randn(40, 1, 3)
    assert report.macs_per_step * 40 == torch_count(lambda: [step.forward_step(frame) for frame in frames]) > 0
    kept = [t for name, t in step.get_state().items() if name != "count"]
    held = sum(t.numel() * t.element_size() for t in kept if t.is_floating_point())
    assert held <= report.state_bytes <= held + 64


def test_report_counts_what_torch_does_not_know() -> None:
    """Attention and LSTM that are fused on the CPU: (queries x keys x size) twice, and all matrices for each frame."""

    class Attend(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(2 * x, x, x)[:, :, -1]

    report = cofx.compile(Attend().eval(), torch.randn(1, 2, 10, 8)).report()
    assert report.macs_per_clip == 2 * (2 * 10 * 10 * 8) and report.macs_per_step == 2 * (2 * 1 * 10 * 8)
    report = cofx.compile(nn.LSTM(5, 7, 2, batch_first=True).eval(), torch.randn(1, 9, 5), time_dim=1).report()
    weights = 4 * 7 * (5 + 7) + 4 * 7 * (7 + 7)
    assert report.macs_per_clip == 9 * weights and report.macs_per_step == weights


# -- ptflops -----------------------------------------------------------------------------------------------------------


def test_ptflops_counts_steps_and_clips() -> None:
    ptflops = pytest.importorskip("ptflops")
    step = cofx.compile(net().eval(), torch.randn(1, 3, 16))

    def count(mode: str, shape: tuple[int, ...]) -> tuple[float, int]:
        step.call_mode = mode
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"backend": "pytorch", "print_per_layer_stat": False, "as_strings": False}
            return ptflops.get_model_complexity_info(step, shape, **options)

    offline, parameters = count("forward", (3, 16))
    assert offline == ptflops.get_model_complexity_info(net(), (3, 16), print_per_layer_stat=False, as_strings=False)[0]
    assert parameters == sum(p.numel() for p in step.parameters())
    per_step = step.report().macs_per_step
    assert count("forward_step", (3,))[0] == per_step
    assert count("forward_steps", (3, 10))[0] == 10 * per_step


# -- Lightning ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path):
    """A LightningModule after two steps of training, and its checkpoint."""
    lightning = pytest.importorskip("pytorch_lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.features, self.head = net(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x).mT).mT

        def training_step(self, batch, index):
            loss = self(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 3, 16)), batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        model = Classifier()
        trainer.fit(model, data)
        path = tmp_path / "last.ckpt"
        trainer.save_checkpoint(path)
    return Classifier, model, path


def check_streams(step: cofx.StepModule, model: nn.Module) -> None:
    x = torch.randn(2, 3, 24)
    with torch.no_grad():
        got = step.forward_steps(x, pad_end=True)
        assert same(got, model.eval()(x))


def test_lightning_module_compiles_with_its_trainer_attached(trained) -> None:
    _, model, _ = trained
    check_streams(cofx.compile(model, torch.randn(1, 3, 16)), model)
    assert model.trainer is not None and not list(model.parameters())[0].isnan().any()


def test_lightning_checkpoints_load(trained) -> None:
    kind, model, path = trained
    check_streams(cofx.compile(kind.load_from_checkpoint(path, weights_only=False), torch.randn(1, 3, 16)), model)
    fresh = kind()
    fit = apply_checkpoint(fresh, load_state_dict(path, trust_pickle=True))
    assert not fit.missing and not fit.unexpected
    check_streams(cofx.compile(fresh, torch.randn(1, 3, 16)), model)
    step = cofx.compile(kind(), torch.randn(1, 3, 16))  # into a step model that is there already
    step.model.load_state_dict(load_state_dict(path, trust_pickle=True))
    step.refresh()
    check_streams(step, model)
