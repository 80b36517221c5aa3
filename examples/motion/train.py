"""Train the activity classifier and write `checkpoint.pt`: about 20 s on one CPU thread."""

import torch
from data import ACTIVITIES, Recordings, join_recordings, load_recordings
from model import CHECKPOINT, MotionNet
from torch import Tensor
from torch.nn.functional import cross_entropy

STEPS, BATCH, FRAMES = 400, 16, 240


def random_stream(recordings: Recordings, frames: int) -> tuple[Tensor, Tensor]:
    """A stream with changing activities: pieces of 3 to 10 s of random recordings, each a little louder or softer.

    Returns:
        The signal `(6, frames)` and the activity at each frame `(frames,)`.
    """
    signals: list[Tensor] = []
    labels: list[Tensor] = []
    while sum(map(len, labels)) < frames:
        index = int(torch.randint(len(recordings.labels), ()))
        length = int(torch.randint(30, 101, ()))
        start = int(torch.randint(101 - length, ()))
        gain = torch.empty(()).uniform_(0.8, 1.25)
        signals.append(gain * recordings.signals[index, :, start : start + length])
        labels.append(recordings.labels[index].expand(length))
    return torch.cat(signals, dim=-1)[:, :frames], torch.cat(labels)[:frames]


def train(recordings: Recordings) -> MotionNet:
    """A model trained on random streams made of `recordings`, in eval mode."""
    model = MotionNet().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=STEPS)
    for step in range(1, STEPS + 1):
        signals, labels = map(torch.stack, zip(*(random_stream(recordings, FRAMES) for _ in range(BATCH)), strict=True))
        loss = cross_entropy(model(signals), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:4d}   loss {loss.item():.4f}", flush=True)
    return model.eval()


@torch.no_grad()
def report_accuracy(model: MotionNet, recordings: Recordings) -> None:
    """Print the accuracy over whole recordings (mean logits) and over the frames of all of them joined."""
    whole = model(recordings.signals).mean(dim=-1).argmax(dim=1) == recordings.labels
    stream = join_recordings(recordings)
    frames = model(stream.signal).argmax(dim=1) == stream.labels
    print(f"test recordings right: {int(whole.sum())} of {len(whole)}")
    print(f"test frames right, all recordings joined to one stream: {frames.float().mean():.1%}")
    for index, activity in enumerate(ACTIVITIES):
        print(f"    {activity:10s} {frames[stream.labels == index].float().mean():6.1%}")


def main() -> None:
    """Train, report, save."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    model = train(load_recordings("TRAIN"))
    report_accuracy(model, load_recordings("TEST"))
    torch.save(model.state_dict(), CHECKPOINT)
    print(f"wrote {CHECKPOINT} ({CHECKPOINT.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
