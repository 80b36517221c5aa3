"""Published architectures in plain PyTorch, written from their papers. Nothing here knows cofx."""

from .audio import ConvTasNet, SEANetDecoder, SEANetEncoder, WaveNet
from .graph import AGCN, STGCN, STR
from .keywords import DSCNN
from .oadtr import OadTR
from .tcn import TCN
from .video import VIDEO, video

__all__ = [
    "AGCN",
    "DSCNN",
    "STGCN",
    "STR",
    "TCN",
    "VIDEO",
    "ConvTasNet",
    "OadTR",
    "SEANetDecoder",
    "SEANetEncoder",
    "WaveNet",
    "video",
]
