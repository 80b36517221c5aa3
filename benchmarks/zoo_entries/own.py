"""The models of this repository, small; `flops.py` has them at full size."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import models

from .entry import add

add("own/ST-GCN", lambda: models.STGCN(5, 8), (1, 3, 32, 25))
add("own/A-GCN", lambda: models.AGCN(5, 8), (1, 3, 32, 25))
add("own/S-TR", lambda: models.STR(5, 32), (1, 3, 32, 25))
for _blocks in (1, 2):
    add(f"own/OadTR_{_blocks}", lambda b=_blocks: models.OadTR(8, 5, 16, b, 2, 16), (1, 16, 8), time=1)
add("own/TCN", lambda: models.TCN(3, 4, 8, 4, 3), (1, 3, 40))
add("own/WaveNet", lambda: models.WaveNet(8, 8, 8, 2, 4), (1, 8, 40))
add("own/SEANetEncoder", lambda: models.SEANetEncoder(4, 8, (2, 4)), (1, 1, 128))
add("own/SEANetDecoder", lambda: models.SEANetDecoder(4, 8, (4, 2)), (1, 8, 16))
add("own/Conv-TasNet_causal", lambda: models.ConvTasNet(2, 16, 8, 8, 16, 3, 2), (1, 1, 128))
add("own/Conv-TasNet", lambda: models.ConvTasNet(2, 16, 8, 8, 16, 3, 2, causal=False), (1, 1, 128))
add("own/DS-CNN", lambda: models.DSCNN(5, 8, 2), (1, 1, 48, 10))
