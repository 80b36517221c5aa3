"""A per-frame activity classifier: an ordinary PyTorch module that knows nothing of streaming."""

from pathlib import Path

import torch
from torch import Tensor, nn

CHECKPOINT = Path(__file__).with_name("checkpoint.pt")


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip connection, centred in time: `(B, C, T) -> (B, C, T)`.

    Args:
        channels: C.
        dilation: Distance in frames between the three taps, which is also the padding on each side.
        dropout: Share of the channels dropped in training.
    """

    def __init__(self, channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dilated = nn.Conv1d(channels, channels, kernel_size=3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm1d(channels)
        self.dropout = nn.Dropout1d(dropout)
        self.pointwise = nn.Conv1d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise(self.dropout(torch.relu(self.norm(self.dilated(x)))))


class MotionNet(nn.Module):
    """Class logits for every frame of a motion recording: `(B, sensors, T) -> (B, classes, T)`.

    The receptive field is `5 + 2 * sum(dilations)` frames, centred: 67 with the defaults, so a frame's logits
    depend on the 33 frames before it and the 33 after.

    Args:
        sensors: Number of sensor axes, the input channels.
        classes: Number of activities.
        channels: Width of the hidden layers.
        dilations: Dilation of each residual block.
        dropout: Share of the channels dropped in training.
    """

    def __init__(
        self,
        sensors: int = 6,
        classes: int = 4,
        channels: int = 40,
        dilations: tuple[int, ...] = (1, 2, 4, 8, 16),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.scale = nn.BatchNorm1d(sensors, affine=False)
        self.stem = nn.Conv1d(sensors, channels, kernel_size=5, padding=2)
        self.blocks = nn.Sequential(*(ResidualBlock(channels, dilation, dropout) for dilation in dilations))
        self.norm = nn.BatchNorm1d(channels)
        self.head = nn.Conv1d(channels, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(self.scale(x)))
        return self.head(torch.relu(self.norm(x)))


def load_model(path: Path = CHECKPOINT) -> MotionNet:
    """The trained model, in eval mode.

    Args:
        path: A state dict written by `train.py`.
    """
    model = MotionNet()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()
