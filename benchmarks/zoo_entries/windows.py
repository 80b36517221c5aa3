"""Nets of windows: EEG, forecasting, video transformers, beats and pitch, from packages of their own."""

from __future__ import annotations

import torch
from torch import nn

from .entry import Call, add, entry, load

# braindecode's newer classifiers

for _name, _options in {
    "BENDR": {"encoder_h": 16, "transformer_layers": 1, "transformer_heads": 2, "contextualizer_hidden": 16},
    "SleepStagerBlanco2020": {},
    "SSTDPN": {},
    "BrainModule": {},
}.items():
    add(f"braindecode/{_name}",
        lambda n=_name, o=_options: load("braindecode.models", n)(n_chans=4, n_outputs=3, n_times=512, sfreq=128,
            input_window_seconds=4, **o), (1, 4, 512))  # fmt: skip

# forecasting

for _name, _build in {
    "pytorch_tsmixer/TSMixer": lambda: load("torchtsmixer", "TSMixer")(24, 6, 3, output_channels=3),
    "iTransformer/iTransformer": lambda: Call(load("iTransformer", "iTransformer")(num_variates=3, lookback_len=24,
        dim=8, depth=1, heads=2, dim_head=4, pred_length=6), lambda m, x: m(x)),
    "nbeats_pytorch/NBeats": lambda: Call(load("nbeats_pytorch.model", "NBeatsNet")(forecast_length=6,
        backcast_length=24, hidden_layer_units=8, nb_blocks_per_stack=1), lambda m, x: m(x[..., 0])[1]),
}.items():  # fmt: skip
    add(_name, _build, (1, 24, 1 if "NB" in _name else 3), time=1)


# video transformers


@entry("timesformer_pytorch/TimeSformer", (1, 4, 3, 32, 32), time=1)
def _() -> nn.Module:
    return load("timesformer_pytorch", "TimeSformer")(dim=16, image_size=32, patch_size=16, num_frames=4,
        num_classes=5, depth=1, heads=2, dim_head=8)  # fmt: skip


@entry("stam_pytorch/STAM", (1, 4, 3, 32, 32), time=1)
def _() -> nn.Module:
    return load("stam_pytorch", "STAM")(dim=16, image_size=32, patch_size=16, num_frames=4, num_classes=5,
        space_depth=1, space_heads=2, space_mlp_dim=16, time_depth=1, time_heads=2, time_mlp_dim=16, space_dim_head=8,
        time_dim_head=8)  # fmt: skip


# linear recurrences in other clothes


@entry("gateloop_transformer/SimpleGateLoopLayer", (1, 16, 8), time=1)
def _() -> nn.Module:
    return load("gateloop_transformer", "SimpleGateLoopLayer")(8)


@entry("gateloop_transformer/heinsen", (1, 16, 8), time=1)
def _() -> nn.Module:
    return load("gateloop_transformer", "SimpleGateLoopLayer")(8, use_heinsen=True)


@entry("mega_pytorch/MegaLayer", (1, 16, 8), time=1)
def _() -> nn.Module:
    return load("mega_pytorch", "MegaLayer")(
        dim=8, ema_heads=4, attn_dim_qk=4, attn_dim_value=8, laplacian_attn_fn=False
    )


# beats, pitch, vocoder, voice


@entry("beat_this/BeatThis", (1, 32, 128), time=1)
def _() -> nn.Module:
    return Call(load("beat_this.model.beat_tracker", "BeatThis")(transformer_dim=32, n_layers=1, head_dim=16,
                                                                 ff_mult=2), lambda m, x: m(x)["beat"])  # fmt: skip


@entry("torchfcpe/ConformerConvModule", (1, 16, 8), time=1)
def _() -> nn.Module:
    return load("torchfcpe.model_conformer_naive", "ConformerNaiveEncoder")(num_layers=1, num_heads=2, dim_model=8)


@entry("resemblyzer/VoiceEncoder_lstm", (1, 40, 40), time=1)
def _() -> nn.Module:
    return Call(nn.LSTM(40, 16, 2, batch_first=True), lambda m, x: nn.functional.normalize(m(x)[1][0][-1]))


@entry("hifi_gan/Generator", (1, 80, 24))
def _() -> nn.Module:
    settings = load("bigvgan.env", "AttrDict")(
        resblock="1", upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4], upsample_initial_channel=16,
        resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
    )  # fmt: skip
    return load("hifi_gan.models", "Generator")(settings)


# by hand, as tutorials write them


@entry("torch/ConvLSTM_head", (1, 6, 3, 16, 16), time=1)
def _() -> nn.Module:
    class ConvLSTM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates, self.head = nn.Conv2d(3 + 4, 16, 3, padding=1), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = c = x.new_zeros(x.shape[0], 4, *x.shape[3:])
            out = []
            for t in range(x.shape[1]):
                i, f, o, g = self.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                out.append(self.head(h.mean((2, 3))))
            return torch.stack(out, 1)

    return ConvLSTM()
