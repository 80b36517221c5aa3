"""Smart-watch recordings of four activities: the BasicMotions data that the `aeon` package ships.

Students wore a smart watch while standing, walking, running and playing badminton. Each recording holds ten seconds
of a 3-axis accelerometer and a 3-axis gyroscope at ten frames per second. The archive's own split is used: 40
recordings to train and 40 to test, ten of each activity. It does not say who wore the watch.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ACTIVITIES = ("standing", "walking", "running", "badminton")
RATE = 10
"""Frames per second."""


class Recordings(NamedTuple):
    """N recordings of T frames, one activity each."""

    signals: Tensor
    """`(N, 6, T)`, float32: accelerometer x, y, z and gyroscope x, y, z, in the watch's units."""
    labels: Tensor
    """`(N,)`, int64: indices into `ACTIVITIES`."""


class Stream(NamedTuple):
    """One long recording in which the activity changes."""

    signal: Tensor
    """`(1, 6, T)`, float32."""
    labels: Tensor
    """`(1, T)`, int64: the activity at each frame."""


def load_recordings(split: Literal["TRAIN", "TEST"]) -> Recordings:
    """Read one half of BasicMotions.

    The file is found without importing `aeon`, so its dependencies need not be there. Format: after the header, one
    recording per line, `x,x,..:y,y,..: .. :Label`, one comma-separated run of values per sensor axis.

    Raises:
        ModuleNotFoundError: `aeon` is not installed.
    """
    package = find_spec("aeon")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("run scripts/demo, or pip install --no-deps -r examples/motion/requirements.txt")
    path = Path(package.origin).parent / "datasets" / "data" / "BasicMotions" / f"BasicMotions_{split}.ts"
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in "#@"]
    *axes, names = zip(*(line.split(":") for line in lines), strict=True)
    signals = [torch.tensor([[float(value) for value in run.split(",")] for run in axis]) for axis in axes]
    return Recordings(torch.stack(signals, dim=1), torch.tensor([ACTIVITIES.index(name.lower()) for name in names]))


def join_recordings(recordings: Recordings, seed: int = 0) -> Stream:
    """All recordings one after another, as if worn in one go.

    Each run of four is one recording of every activity, in an order drawn from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    by_activity = recordings.labels.argsort(stable=True).view(len(ACTIVITIES), -1)
    order = torch.cat([take[torch.randperm(len(ACTIVITIES), generator=generator)] for take in by_activity.T])
    signals, labels = recordings.signals[order], recordings.labels[order]
    return Stream(torch.cat(list(signals), dim=-1)[None], labels.repeat_interleave(signals.shape[-1])[None])
