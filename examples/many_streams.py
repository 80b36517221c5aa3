"""Many live streams on one model: they begin, pause and end independently, and share batched steps."""

import torch
from torch import nn

import cofx
from cofx.runtime import LanePool

torch.manual_seed(0)
torch.set_grad_enabled(False)
torch.set_num_threads(1)

model = nn.Sequential(nn.Conv1d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 2, 3, padding=1)).eval()
step = cofx.compile(model, torch.randn(1, 3, 32), time_dim=2)
pool = LanePool(step, capacity=4)

recordings = [torch.randn(3, n) for n in (40, 7, 25)]  # one stream each; they come in pieces of any size
streams = [pool.open() for _ in recordings]
received: dict[object, list[torch.Tensor]] = {stream: [] for stream in streams}
sent = [0] * len(streams)

while any(stream.open for stream in streams):
    for i, (stream, recording) in enumerate(zip(streams, recordings, strict=True)):
        if stream.closed:
            continue
        piece = recording[:, sent[i] : sent[i] + int(torch.randint(0, 6, ()))]
        sent[i] += piece.shape[1]
        if piece.shape[1]:
            stream.feed(piece)
        if sent[i] == recording.shape[1]:
            stream.close()  # its tail comes with the next runs, then its lane is free
    for stream, frames in pool.run():  # one batched step for all that have frames
        received[stream].append(frames)

for stream, recording in zip(streams, recordings, strict=True):
    streamed = torch.cat(received[stream], dim=-1)
    difference = (streamed - model(recording[None])[0]).abs().max().item()
    print(f"{recording.shape[1]:3} frames in, {streamed.shape[-1]:3} out, largest difference {difference:.1e}")
