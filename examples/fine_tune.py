"""A model that looks over whole clips inside: stream it by its trailing form, and fine-tune that form offline."""

import torch
from torch import nn

import cofx

torch.manual_seed(0)


class Excited(nn.Module):
    """Convolutions whose channels are weighted by a mean over the clip (squeeze-and-excitation)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv1d(3, 16, 5), nn.Linear(16, 16)
        self.head = nn.Conv1d(16, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, time) -> (batch, 2, time - 6)"""
        y = self.conv(x).relu()
        return self.head(y * self.gate(y.mean(dim=2)).sigmoid().unsqueeze(2))


model = Excited().eval()
clips = torch.randn(64, 3, 32)
targets = torch.stack([clips.mean(1)[:, 6:], clips.std(1)[:, 6:]], dim=1)

step = cofx.compile(model, clips[:1], time_dim=2, nonlocal_ops="continual")
print(step.report())

reference = step.reference_module  # an offline module: the mean looks on the frames so far; same parameters
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for epoch in range(61):
    loss = nn.functional.mse_loss(reference(clips), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if epoch % 20 == 0:
        print(f"epoch {epoch}: loss {loss.item():.4f}")

step.clean_state()  # the step model has the new parameters
with torch.no_grad():
    streamed = [y for x in clips[:1].unbind(2) if (y := step.forward_step(x)) is not None]
    difference = (torch.stack(streamed, dim=2) - reference(clips[:1])).abs().max().item()
print(f"largest difference of the stream to the fine-tuned reference {difference:.1e}")
