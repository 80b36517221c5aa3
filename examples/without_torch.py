"""A step model as one ONNX file, run with numpy and ONNX Runtime alone."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import cofx

DEVICE = """
import sys
import numpy as np
from cofx.runtime import OnnxStep

step = OnnxStep(sys.argv[1])
frames = np.load(sys.argv[2])
outputs = [y for x in np.moveaxis(frames, 2, 0) if (y := step.forward_step(x)) is not None]
np.save(sys.argv[3], np.concatenate([np.stack(outputs, axis=2), step.flush()], axis=2))
print("delay", step.delay, "| torch was imported:", "torch" in sys.modules)
"""

torch.manual_seed(0)
torch.set_grad_enabled(False)
model = nn.Sequential(nn.Conv1d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 2, 3, padding=1)).eval()
clip = torch.randn(1, 3, 50)

with tempfile.TemporaryDirectory() as folder:
    graph, recording, streamed = (str(Path(folder, name)) for name in ("step.onnx", "in.npy", "out.npy"))
    cofx.compile(model, clip, time_dim=2).to_onnx(graph)
    np.save(recording, clip.numpy())
    subprocess.run([sys.executable, "-c", DEVICE, graph, recording, streamed], check=True)  # as on the device
    print("largest difference", float(np.abs(np.load(streamed) - model(clip).numpy()).max()))
