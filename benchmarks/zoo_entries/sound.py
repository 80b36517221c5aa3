"""Sound: vocoders, spectrogram front ends, pitch, separation and tagging beyond those of `audio.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .entry import Call, add, entry, hidden, load
from .speech import SMALL, SPEECH, of

# vocoders


def _bigvgan(activation: str) -> nn.Module:
    settings = load("bigvgan.env", "AttrDict")(
        resblock="1", upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4], upsample_initial_channel=16,
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3, 5]], activation=activation, snake_logscale=True,
        num_mels=6, use_tanh_at_final=False, use_bias_at_final=False,
    )  # fmt: skip
    model: nn.Module = load("bigvgan.bigvgan", "BigVGAN")(settings)
    return model


for _activation in ("snakebeta", "snake"):
    add(f"bigvgan/BigVGAN_{_activation}", lambda a=_activation: _bigvgan(a), (1, 6, 24))


@entry("speechbrain/HifiganGenerator_resblock2", (1, 6, 24))
def _() -> nn.Module:
    return load("speechbrain.lobes.models.HifiGAN", "HifiganGenerator")(
        6, 1, "2", [[1, 3], [1, 3]], [3, 5], [4, 4], 16, [2, 2]
    )


# front ends

_FRONT: dict[str, Any] = {
    "Spectrogram": {"n_fft": 64, "hop_length": 16, "power": None},
    "Spectrogram_power": {"n_fft": 64, "hop_length": 16},
    "Spectrogram_constant": {"n_fft": 64, "hop_length": 16, "pad_mode": "constant"},
    "LFCC": {"sample_rate": 8000, "n_filter": 8, "n_lfcc": 4, "speckwargs": {"n_fft": 64, "hop_length": 16}},
    "SpectralCentroid": {"sample_rate": 8000, "n_fft": 64, "hop_length": 16},
    "ComputeDeltas": {},
    "SlidingWindowCmn": {"cmn_window": 8, "min_cmn_window": 4},
    "SlidingWindowCmn_center": {"cmn_window": 8, "center": True},
    "AmplitudeToDB": {},
    "MuLawEncoding": {},
    "Vol": {"gain": 0.5},
    "Preemphasis": {},
    "Deemphasis": {},
    "FrequencyMasking": {"freq_mask_param": 2},
    "Resample_up": {"orig_freq": 2, "new_freq": 3},
    "Resample_half": {"orig_freq": 2, "new_freq": 1},
}  # fmt: skip
_FRAMES = {"ComputeDeltas": (1, 8, 24), "AmplitudeToDB": (1, 8, 24), "SlidingWindowCmn": (1, 24, 8),
           "SlidingWindowCmn_center": (1, 24, 8), "FrequencyMasking": (1, 8, 24)}  # fmt: skip
for _name, _options in _FRONT.items():
    _shape = _FRAMES.get(_name, (1, 384))
    add(f"torchaudio/{_name}", lambda n=_name, o=_options: load("torchaudio.transforms", n.split("_")[0])(**dict(o)),
        _shape, time=2 if len(_shape) == 3 and "Cmn" not in _name else 1)  # fmt: skip

for _filter in ("lowpass_biquad", "highpass_biquad", "bandpass_biquad", "equalizer_biquad", "dcshift", "overdrive"):
    _extra = {"dcshift": (0.1,), "overdrive": (), "equalizer_biquad": (8000, 1000.0, 3.0)}.get(_filter, (8000, 1000.0))
    add(f"torchaudio/{_filter}",
        lambda f=_filter, a=_extra: Call(nn.Identity(), lambda _, x: load("torchaudio.functional", f)(x, *a)),
        (1, 96), time=1)  # fmt: skip

for _name, _options in (
    ("STFT", {"n_fft": 64, "hop_length": 16, "output_format": "Magnitude"}),
    ("STFT_uncentered", {"n_fft": 64, "hop_length": 16, "output_format": "Magnitude", "center": False}),
    ("MelSpectrogram", {"sr": 8000, "n_fft": 64, "n_mels": 8, "hop_length": 16}),
    ("MFCC", {"sr": 8000, "n_mfcc": 4, "n_fft": 64, "n_mels": 8, "hop_length": 16}),
    ("Gammatonegram", {"sr": 8000, "n_fft": 64, "n_bins": 8, "hop_length": 16}),
    ("CQT1992v2", {"sr": 8000, "hop_length": 64, "fmin": 200, "n_bins": 12, "output_format": "Magnitude"}),
):  # fmt: skip
    add(f"nnAudio/{_name}", lambda n=_name, o=_options: load("nnAudio.features", n.split("_")[0])(verbose=False,
        **dict(o)), (1, 1024), time=1)  # fmt: skip


@entry("asteroid_filterbanks/free_encoder_decoder", (1, 1, 160))
def _() -> nn.Module:
    encoder = load("asteroid_filterbanks", "make_enc_dec")("free", 16, 16, 8)
    return nn.Sequential(*encoder)


@entry("asteroid_filterbanks/param_sinc", (1, 1, 160))
def _() -> nn.Module:
    return load("asteroid_filterbanks", "make_enc_dec")("param_sinc", 16, 17, 8)[0]


@entry("asteroid_filterbanks/torch_stft", (1, 1, 160))
def _() -> nn.Module:
    return nn.Sequential(*load("asteroid_filterbanks", "make_enc_dec")("torch_stft", 32, 32, 8))


@entry("asteroid_filterbanks/melgram", (1, 1, 512))
def _() -> nn.Module:
    return load("asteroid_filterbanks", "Encoder")(
        load("asteroid_filterbanks.melgram_fb", "MelGramFB")(64, 64, 16, sample_rate=8000, n_mels=8)
    )


@entry("torchlibrosa/LogmelFilterBank", (1, 512), time=1)
def _() -> nn.Module:
    stft = load("torchlibrosa.stft", "Spectrogram")(64, 16, center=True)
    return nn.Sequential(stft, load("torchlibrosa.stft", "LogmelFilterBank")(8000, 64, 8, top_db=None))


@entry("julius/LowPassFilter", (1, 1, 256))
def _() -> nn.Module:
    return load("julius", "LowPassFilter")(0.2)


@entry("julius/SplitBands", (1, 1, 256))
def _() -> nn.Module:
    return load("julius", "SplitBands")(8000, 3)


@entry("julius/ResampleFrac", (1, 1, 256))
def _() -> nn.Module:
    return load("julius", "ResampleFrac")(4, 3)


@entry("julius/FFTConv1d", (1, 1, 256))
def _() -> nn.Module:
    return load("julius", "FFTConv1d")(1, 2, 33)


# tagging and embeddings


@entry("torchvggish/features", (1, 1, 96, 64))
def _() -> nn.Module:
    return load("torchvggish.torchvggish", "make_layers")()


@entry("panns_inference/Cnn14_DecisionLevelMax", (1, 8000), time=1, length=13120)
def _() -> nn.Module:
    model = load("panns_inference.models", "Cnn14_DecisionLevelMax")(8000, 256, 80, 64, 50, 4000, 5)
    return Call(model, lambda m, x: m(x)["framewise_output"])


# separation


@entry("bs_roformer/BSRoformer", (1, 1024), time=1)
def _() -> nn.Module:
    return load("bs_roformer", "BSRoformer")(
        dim=8, depth=1, time_transformer_depth=1, freq_transformer_depth=1, dim_head=4, heads=2, flash_attn=False,
        freqs_per_bands=(8, 8, 8, 9), stft_n_fft=64, stft_hop_length=16, stft_win_length=64,
    )  # fmt: skip


# torchaudio: transducers


@entry("torchaudio/EmformerRNNT_transcriber", (1, 32, 8), time=1)
def _() -> nn.Module:
    make = load("torchaudio.models", "emformer_rnnt_model")
    model = make(input_dim=8, encoding_dim=16, num_symbols=10, segment_length=16, right_context_length=4,
                 time_reduction_input_dim=4, time_reduction_stride=4, transformer_num_heads=2,
                 transformer_ffn_dim=16, transformer_num_layers=1, transformer_dropout=0.0,
                 transformer_activation="gelu", transformer_left_context_length=4, transformer_max_memory_size=0,
                 transformer_weight_init_scale_strategy="depthwise", transformer_tanh_on_mem=True,
                 symbol_embedding_dim=8, num_lstm_layers=1, lstm_layer_norm=True, lstm_layer_norm_epsilon=1e-3,
                 lstm_dropout=0.0)  # fmt: skip
    return Call(model, lambda m, x: m.transcribe(x, torch.full((x.shape[0],), x.shape[1] - 4))[0])


@entry("torchaudio/Tacotron2_lstm_postnet", (1, 16, 8), time=1)
def _() -> nn.Module:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.post = load("torchaudio.models.tacotron2", "_Postnet")(8, 8, 5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.lstm(x)[0]
            return y + self.post(y.transpose(1, 2)).transpose(1, 2)

    return Both()


@entry("torchaudio/WaveRNN_upsample_resnet", (1, 6, 16))
def _() -> nn.Module:
    return Call(load("torchaudio.models.wavernn", "UpsampleNetwork")([2, 2], 2, 6, 8, 8), lambda m, x: m(x)[1])


@entry("torchaudio/wav2vec2_feature_extractor", (1, 640), time=1)
def _() -> nn.Module:
    layers = [(16, 10, 5), (16, 3, 2)]
    make = load("torchaudio.models", "wav2vec2_model")
    model = make("layer_norm", layers, True, 16, 0.0, 8, 2, 1, 2, 0.0, 32, 0.0, 0.0, False, 0.0, None)
    return Call(model.feature_extractor, lambda m, x: m(x, None)[0])


# speechbrain


def _sb(module: str, name: str) -> Any:
    return load(f"speechbrain.{module}", name)


for _name, _build in {
    "LiGRU": lambda: Call(_sb("nnet.RNN", "LiGRU")(8, input_shape=(None, None, 8), normalization="layernorm",
                                                    bidirectional=False), lambda m, x: m(x)[0]),
    "QuasiRNN": lambda: Call(_sb("nnet.RNN", "QuasiRNN")(8, input_shape=(None, None, 8), bidirectional=False),
                             lambda m, x: m(x)[0]),
    "LSTM": lambda: Call(_sb("nnet.RNN", "LSTM")(8, input_shape=(None, None, 8)), lambda m, x: m(x)[0]),
    "Conv1d_causal": lambda: _sb("nnet.CNN", "Conv1d")(8, 3, input_shape=(None, None, 8), padding="causal"),
    "Conv1d_same": lambda: _sb("nnet.CNN", "Conv1d")(8, 5, input_shape=(None, None, 8), padding="same"),
    "DepthwiseSeparableConv1d": lambda: _sb("nnet.CNN", "DepthwiseSeparableConv1d")(8, 3, (None, None, 8),
                                                                                    padding="causal"),
    "TDNNBlock": lambda: nn.Sequential(_T(), _sb("lobes.models.ECAPA_TDNN", "TDNNBlock")(8, 8, 3, 2), _T()),
    "Res2NetBlock": lambda: nn.Sequential(_T(), _sb("lobes.models.ECAPA_TDNN", "Res2NetBlock")(8, 8, 2, 3, 2), _T()),
    "TransformerEncoder_causal": lambda: Call(
        _sb("lobes.models.transformer.Transformer", "TransformerEncoder")(1, 2, 16, d_model=8, causal=True),
        lambda m, x: m(x, src_mask=torch.triu(torch.full((x.shape[1], x.shape[1]), -torch.inf), 1))[0]),
    "BranchformerEncoderLayer": lambda: Call(
        _sb("lobes.models.transformer.Branchformer", "BranchformerEncoderLayer")(
            8, 2, kernel_size=3, attention_type="regularMHA", csgu_linear_units=16), lambda m, x: m(x)[0]),
    "ConvolutionModule_causal": lambda: _sb("lobes.models.transformer.Conformer", "ConvolutionModule")(
        8, 5, causal=True),
    "conv_tasnet_Encoder": lambda: _sb("lobes.models.conv_tasnet", "Encoder")(8, 16),
}.items():  # fmt: skip
    _wave = _name == "conv_tasnet_Encoder"
    add(f"speechbrain/{_name}", _build, (1, 160) if _wave else (1, 24, 8), time=1)


class _T(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Swap time and channels."""
        return x.transpose(1, 2)


# transformers: codecs, encoders, decoders


@entry("transformers/SeamlessM4T_speech_encoder", (1, 32, 8), time=1)
def _() -> nn.Module:
    model = of("SeamlessM4Tv2Model", "SeamlessM4Tv2Config", hidden_size=16, speech_encoder_layers=1,
               speech_encoder_attention_heads=2, speech_encoder_intermediate_size=32,
               feature_projection_input_dim=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
               decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=20,
               conv_depthwise_kernel_size=5, speech_encoder_chunk_size=8, speech_encoder_left_chunk_num=1,
               num_adapter_layers=1, unit_hifi_gan_vocab_size=20, t2u_vocab_size=20, t2u_encoder_layers=1,
               t2u_decoder_layers=1, t2u_encoder_ffn_dim=16, t2u_decoder_ffn_dim=16, t2u_encoder_attention_heads=2,
               t2u_decoder_attention_heads=2, char_vocab_size=20)  # fmt: skip
    return hidden(model.speech_encoder)  # type: ignore[arg-type]


@entry("transformers/Musicgen_decoder", (1, 16), time=1, tokens=16)
def _() -> nn.Module:
    model = of("MusicgenForCausalLM", "MusicgenDecoderConfig", hidden_size=16, num_hidden_layers=2, ffn_dim=32,
               num_attention_heads=2, vocab_size=16, num_codebooks=1, pad_token_id=0, bos_token_id=0,
               max_position_embeddings=64)  # fmt: skip
    return Call(model, lambda m, x: m(x, use_cache=False).logits)


@entry("transformers/UMT5_encoder", (1, 16), time=1, tokens=20)
def _() -> nn.Module:
    return hidden(of("UMT5EncoderModel", "UMT5Config", d_model=16, num_layers=2, num_heads=2, d_ff=32, d_kv=8,
                     vocab_size=20))  # fmt: skip


@entry("transformers/Bark_coarse", (1, 16), time=1, tokens=16)
def _() -> nn.Module:
    model = of("BarkCoarseModel", "BarkCoarseConfig", block_size=64, input_vocab_size=16, output_vocab_size=16,
               num_layers=2, num_heads=2, hidden_size=16)  # fmt: skip
    return Call(model, lambda m, x: m(x, use_cache=False).logits)


@entry("transformers/VoxtralEncoder", (1, 8, 32))
def _() -> nn.Module:
    return hidden(of("VoxtralEncoder", "VoxtralEncoderConfig", hidden_size=16, num_hidden_layers=2, num_mel_bins=8,
                     num_attention_heads=2, intermediate_size=32, max_source_positions=16))  # fmt: skip


@entry("transformers/WavLM_feature_encoder", (1, 640), time=1)
def _() -> nn.Module:
    return of("WavLMModel", "WavLMConfig", **(SPEECH | {"feat_extract_norm": "layer"})).feature_extractor  # type: ignore


@entry("transformers/ConvBert", (1, 16), time=1, tokens=20)
def _() -> nn.Module:
    return hidden(of("ConvBertModel", "ConvBertConfig", embedding_size=16, conv_kernel_size=3, **SMALL))
