"""Time series and EEG: braindecode, tsai, pytorch-tcn, mambapy, x-transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .entry import Call, add, entry, load

# braindecode: all classifiers of (batch, channels, times), each with its own defaults where they are small

EEG = [
    "ATCNet", "AttentionBaseNet", "AttnSleep", "BDTCN", "BIOT", "ContraWR", "CTNet", "Deep4Net", "DeepSleepNet",
    "EEGConformer", "EEGITNet", "EEGInceptionERP", "EEGInceptionMI", "EEGMiner", "EEGNeX", "EEGNet", "EEGSimpleConv",
    "EEGTCNet", "FBCNet", "FBLightConvNet", "FBMSNet", "HybridNet", "IFNet", "SCCNet", "SPARCNet", "ShallowFBCSPNet",
    "SincShallowNet", "SyncNet", "TCFormer", "TIDNet", "TSception", "USleep", "MEDFormer", "MSVTNet",
    "SleepStagerChambon2018", "NeuroPose",
]  # fmt: skip
LENGTHS = {"AttnSleep": (3000, 100), "DeepSleepNet": (3000, 100), "USleep": (3000, 100), "BIOT": (600, 200),
           "SPARCNet": (512, 128), "HybridNet": (1000, 128), "SleepStagerChambon2018": (3000, 100),
           "TIDNet": (512, 128)}  # fmt: skip

CHANNELS = {"AttnSleep": 1, "DeepSleepNet": 1, "NeuroPose": 16}


def _eeg(name: str, times: int, rate: int) -> nn.Module:
    model: nn.Module = load("braindecode.models", name)(
        n_chans=CHANNELS.get(name, 4), n_outputs=3, n_times=times, sfreq=rate, input_window_seconds=times / rate
    )
    return model


for _name in EEG:
    _times, _rate = LENGTHS.get(_name, (512, 128))
    add(f"braindecode/{_name}", lambda n=_name, t=_times, r=_rate: _eeg(n, t, r), (1, CHANNELS.get(_name, 4), _times))


@entry("braindecode/TCN", (1, 4, 64))
def _() -> nn.Module:
    return load("braindecode.models", "TCN")(n_chans=4, n_outputs=3, n_blocks=3, n_filters=8, kernel_size=3,
                                             drop_prob=0.0, activation=nn.ReLU)  # fmt: skip


@entry("braindecode/Deep4Net_dense", (1, 4, 700))
def _() -> nn.Module:
    model = load("braindecode.models", "Deep4Net")(n_chans=4, n_outputs=3, n_times=700, final_conv_length=1)
    model.to_dense_prediction_model()
    return model


@entry("braindecode/ShallowFBCSPNet_dense", (1, 4, 200))
def _() -> nn.Module:
    model = load("braindecode.models", "ShallowFBCSPNet")(n_chans=4, n_outputs=3, n_times=200, final_conv_length=1)
    model.to_dense_prediction_model()
    return model


# tsai: classifiers of (batch, channels, times)


def tsai(module: str, name: str) -> Any:
    """A model of tsai."""
    return load(f"tsai.models.{module}", name)


add("tsai/FCN", lambda: tsai("FCN", "FCN")(3, 4, [8, 8, 8]), (1, 3, 24))
add("tsai/ResNet", lambda: tsai("ResNet", "ResNet")(3, 4), (1, 3, 24))
add("tsai/ResCNN", lambda: tsai("ResCNN", "ResCNN")(3, 4), (1, 3, 24))
add("tsai/InceptionTime", lambda: tsai("InceptionTime", "InceptionTime")(3, 4, nf=4), (1, 3, 48))
add("tsai/InceptionTimePlus", lambda: tsai("InceptionTimePlus", "InceptionTimePlus")(3, 4, 48, nf=4), (1, 3, 48))
add("tsai/XceptionTime", lambda: tsai("XceptionTime", "XceptionTime")(3, 4, nf=4, adaptive_size=8), (1, 3, 48))
add("tsai/OmniScaleCNN", lambda: tsai("OmniScaleCNN", "OmniScaleCNN")(3, 4, 24, [64, 1024]), (1, 3, 24))
add("tsai/TCN", lambda: tsai("TCN", "TCN")(3, 4, [8] * 3, 3), (1, 3, 24))
add("tsai/TemporalConvNet", lambda: tsai("TCN", "TemporalConvNet")(3, [8] * 3, 3), (1, 3, 24))
add("tsai/TST", lambda: tsai("TST", "TST")(3, 4, 24, n_layers=2, d_model=8, n_heads=2, d_ff=16), (1, 3, 24))
add("tsai/TSTPlus", lambda: tsai("TSTPlus", "TSTPlus")(3, 4, 24, n_layers=2, d_model=8, n_heads=2, d_ff=16),
    (1, 3, 24))  # fmt: skip
add("tsai/PatchTST", lambda: tsai("PatchTST", "PatchTST")(3, 4, 24, 4, 2, 2, 8, 16, patch_len=4, stride=2), (1, 3, 24))
for _name in ("RNN", "LSTM", "GRU"):
    add(f"tsai/{_name}", lambda n=_name: tsai("RNN", n)(3, 4, 8), (1, 3, 24))
    add(f"tsai/{_name}_FCN", lambda n=_name: tsai("RNN_FCN", f"{n}_FCN")(3, 4, 24, 8, conv_layers=[8, 8, 8]),
        (1, 3, 24))  # fmt: skip
add("tsai/mWDN", lambda: tsai("mWDN", "mWDN")(3, 4, 32, 2), (1, 3, 32))
add("tsai/gMLP", lambda: tsai("gMLP", "gMLP")(3, 4, 24, 1, 8, 16, 2), (1, 3, 24))
add("tsai/XCM", lambda: tsai("XCM", "XCM")(3, 4, 24, 8), (1, 3, 24))
add("tsai/TSiT", lambda: tsai("TSiTPlus", "TSiTPlus")(3, 4, 24, 8, 2, 2), (1, 3, 24))
add("tsai/TSPerceiver", lambda: tsai("TSPerceiver", "TSPerceiver")(3, 4, 24, n_latents=4, d_latent=8), (1, 3, 24))
add("tsai/TSSequencerPlus", lambda: tsai("TSSequencerPlus", "TSSequencerPlus")(3, 4, 24, 8, 2), (1, 3, 24))
add("tsai/TransformerModel", lambda: tsai("TransformerModel", "TransformerModel")(3, 4, 8, 2, 16, n_layers=2),
    (1, 3, 24))  # fmt: skip
add("tsai/LSTMAttention", lambda: tsai("RNNAttention", "LSTMAttention")(3, 4, 24, 8, n_heads=2, encoder_layers=1),
    (1, 3, 24))  # fmt: skip
add("tsai/xresnet1d18", lambda: tsai("XResNet1d", "xresnet1d18")(3, 4), (1, 3, 64))
add("tsai/MLP", lambda: tsai("MLP", "MLP")(3, 4, 24, [8, 8], [0.1, 0.1]), (1, 3, 24))

# pytorch-tcn


def _tcn(**options: Any) -> nn.Module:
    model: nn.Module = load("pytorch_tcn", "TCN")(3, [8, 8, 8], 3, **options)
    return model


add("pytorch_tcn/TCN", lambda: _tcn(), (1, 3, 24))
add("pytorch_tcn/TCN_noncausal", lambda: _tcn(causal=False), (1, 3, 24))
add("pytorch_tcn/TCN_batch_norm_skip", lambda: _tcn(use_norm="batch_norm", use_skip_connections=True), (1, 3, 24))
add("pytorch_tcn/TCN_layer_norm_gate", lambda: _tcn(use_norm="layer_norm", use_gate=True), (1, 3, 24))
add("pytorch_tcn/TCN_projection", lambda: _tcn(output_projection=2), (1, 3, 24))
add("pytorch_tcn/TCN_NLC", lambda: _tcn(input_shape="NLC"), (1, 24, 3), time=1)
add("pytorch_tcn/TemporalConvTranspose1d", lambda: load("pytorch_tcn", "TemporalConvTranspose1d")(3, 4, 4, 2),
    (1, 3, 24))  # fmt: skip
add("pytorch_tcn/TemporalConv1d_reflect", lambda: load("pytorch_tcn", "TemporalConv1d")(3, 4, 3,
    padding_mode="reflect", causal=False), (1, 3, 24))  # fmt: skip

# mambapy


def _mamba(pscan: bool, module: str = "mamba", **options: Any) -> nn.Module:
    config = load(f"mambapy.{module}", "MambaConfig")(d_model=8, n_layers=2, pscan=pscan, **options)
    model: nn.Module = load(f"mambapy.{module}", "Mamba")(config)
    return model


add("mambapy/Mamba_sequential", lambda: _mamba(False), (1, 12, 8), time=1)
add("mambapy/Mamba_pscan", lambda: _mamba(True), (1, 16, 8), time=1)


# x-transformers


def _x(causal: bool, **options: Any) -> nn.Module:
    wrapper, layers = load("x_transformers", "ContinuousTransformerWrapper"), load(
        "x_transformers", "Decoder" if causal else "Encoder"
    )  # fmt: skip
    model: nn.Module = wrapper(
        dim_in=4, dim_out=4, max_seq_len=64, use_abs_pos_emb=options.pop("pos", False),
        attn_layers=layers(dim=16, depth=2, heads=2, attn_dim_head=8, **options),
    )  # fmt: skip
    return model


for _label, _causal, _options in (
    ("Encoder", False, {}),
    ("Decoder", True, {}),
    ("Decoder_abs_pos", True, {"pos": True}),
    ("Decoder_rotary_rmsnorm_swiglu", True, {"rotary_pos_emb": True, "use_rmsnorm": True, "ff_swish": True,
                                             "ff_glu": True}),
    ("Decoder_alibi", True, {"alibi_pos_bias": True}),
    ("Decoder_rel_pos", True, {"rel_pos_bias": True}),
    ("Decoder_shift_tokens", True, {"shift_tokens": 1}),
    ("Decoder_flash", True, {"attn_flash": True}),
):  # fmt: skip
    add(f"x_transformers/{_label}", lambda c=_causal, o=_options: _x(c, **dict(o)), (1, 16, 4), time=1)


@entry("x_transformers/Decoder_tokens", (1, 16), time=1, tokens=20)
def _() -> nn.Module:
    layers = load("x_transformers", "Decoder")(dim=16, depth=2, heads=2, attn_dim_head=8)
    return load("x_transformers", "TransformerWrapper")(num_tokens=20, max_seq_len=64, attn_layers=layers)


@entry("local_attention/LocalMHA", (1, 16, 8), time=1)
def _() -> nn.Module:
    return load("local_attention.transformer", "LocalMHA")(dim=8, window_size=4, dim_head=4, heads=2, causal=True)


@entry("local_attention/LocalTransformer", (1, 16), time=1, tokens=20)
def _() -> nn.Module:
    return load("local_attention", "LocalTransformer")(num_tokens=20, max_seq_len=64, dim=8, depth=2,
        local_attn_window_size=4, dim_head=4, heads=2)  # fmt: skip


@entry("rotary_embedding_torch/rotate", (1, 2, 16, 8))
def _() -> nn.Module:
    return Call(load("rotary_embedding_torch", "RotaryEmbedding")(dim=4), lambda m, x: m.rotate_queries_or_keys(x))


# torch's own

add("torch/TransformerEncoder", lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    2), (1, 16, 8), time=1)  # fmt: skip


@entry("torch/TransformerEncoder_causal", (1, 16, 8), time=1)
def _() -> nn.Module:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    return Call(
        encoder,
        lambda m, x: m(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]), is_causal=True),
    )


@entry("torch/LSTM_tagger", (1, 16), time=1, tokens=20)
def _() -> nn.Module:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm, self.head = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(self.embed(x))[0]).log_softmax(-1)

    return Tagger()
