"""Audio: separation, codecs, vocoders, recognition, from the packages of their authors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .entry import Call, add, entry, load

# torchaudio


def torchaudio(name: str) -> Any:
    """A model of torchaudio."""
    return load("torchaudio.models", name)


@entry("torchaudio/ConvTasNet", (1, 1, 160), length=320)
def _() -> nn.Module:
    return torchaudio("ConvTasNet")(2, 16, 16, 3, 8, 16, 3, 2)


def _wav2vec2(norm_first: bool, mode: str) -> nn.Module:
    layers = [(16, 10, 5), (16, 3, 2), (16, 2, 2)]
    return Call(
        torchaudio("wav2vec2_model")(
            mode, layers, norm_first, 16, 0.0, 8, 2, 2, 2, 0.0, 32, 0.0, 0.0, norm_first, 0.0, 10
        ),
        lambda m, x: m(x)[0],
    )  # fmt: skip


add("torchaudio/wav2vec2_base", lambda: _wav2vec2(False, "group_norm"), (1, 640), time=1)
add("torchaudio/wav2vec2_large", lambda: _wav2vec2(True, "layer_norm"), (1, 640), time=1)
add("torchaudio/Wav2Letter", lambda: torchaudio("Wav2Letter")(5, "mfcc", 6), (1, 6, 64))
add("torchaudio/Wav2Letter_waveform", lambda: torchaudio("Wav2Letter")(5, "waveform", 1), (1, 1, 3200))
add("torchaudio/DeepSpeech", lambda: torchaudio("DeepSpeech")(6, 8, 5), (1, 1, 12, 6))


@entry("torchaudio/Conformer", (1, 16, 8), time=1)
def _() -> nn.Module:
    model = torchaudio("Conformer")(8, 2, 16, 2, 5)
    return Call(model, lambda m, x: m(x, torch.full((x.shape[0],), x.shape[1]))[0])


@entry("torchaudio/Emformer", (1, 20, 8), time=1)
def _() -> nn.Module:
    model = torchaudio("Emformer")(8, 2, 16, 2, 4, left_context_length=4, right_context_length=2)
    return Call(model, lambda m, x: m(x, torch.full((x.shape[0],), x.shape[1] - 2))[0])


add("torchaudio/MelResNet", lambda: load("torchaudio.models.wavernn", "MelResNet")(2, 6, 8, 8), (1, 6, 16))
add(
    "torchaudio/UpsampleNetwork",
    lambda: load("torchaudio.models.wavernn", "UpsampleNetwork")([2, 3], 2, 6, 8, 8),
    (1, 6, 16),
)
add("torchaudio/HDemucs", lambda: torchaudio("HDemucs")(["a", "b"], 1, 4, nfft=256, depth=4), (1, 1, 2048))
add("torchaudio/Tacotron2_Postnet", lambda: load("torchaudio.models.tacotron2", "_Postnet")(6, 8, 5, 3), (1, 6, 16))


@entry("torchaudio/SquimObjective", (1, 320), time=1)
def _() -> nn.Module:
    return torchaudio("squim_objective_model")(16, 32, 16, 2, 8, 1, "LSTM", 8)


# asteroid


def asteroid(name: str) -> Any:
    """A model of asteroid."""
    return load("asteroid.models", name)


for _norm, _causal in (("gLN", False), ("cLN", True), ("bN", True), ("bN", False)):
    add(
        f"asteroid/ConvTasNet_{_norm}{'_causal' * _causal}",
        lambda n=_norm, c=_causal: asteroid("ConvTasNet")(
            2, n_blocks=3, n_repeats=2, bn_chan=8, hid_chan=16, skip_chan=8, norm_type=n, causal=c, n_filters=16,
            mask_act="sigmoid",
        ),
        (1, 1, 160),
        length=320,
    )  # fmt: skip
add(
    "asteroid/ConvTasNet_cgLN_causal",
    lambda: asteroid("ConvTasNet")(
        2, n_blocks=2, n_repeats=1, bn_chan=8, hid_chan=16, skip_chan=8, norm_type="cgLN", causal=True, n_filters=16
    ),
    (1, 1, 160),
)
add(
    "asteroid/DPRNNTasNet",
    lambda: asteroid("DPRNNTasNet")(2, bn_chan=8, hid_size=8, chunk_size=6, n_repeats=1, n_filters=16),
    (1, 1, 160),
)
add(
    "asteroid/DPTNet",
    lambda: asteroid("DPTNet")(2, n_heads=2, ff_hid=8, chunk_size=6, n_repeats=1, n_filters=16),
    (1, 1, 160),
)
add(
    "asteroid/LSTMTasNet_causal",
    lambda: asteroid("LSTMTasNet")(2, n_layers=2, hid_size=8, bidirectional=False, n_filters=16),
    (1, 1, 160),
)
add("asteroid/LSTMTasNet", lambda: asteroid("LSTMTasNet")(2, n_layers=1, hid_size=8, n_filters=16), (1, 1, 160))
add(
    "asteroid/SuDORMRFNet",
    lambda: asteroid("SuDORMRFNet")(2, bn_chan=8, num_blocks=2, upsampling_depth=3, n_filters=16),
    (1, 1, 400),
)
add(
    "asteroid/SuDORMRFImprovedNet",
    lambda: asteroid("SuDORMRFImprovedNet")(2, bn_chan=8, num_blocks=2, upsampling_depth=3, n_filters=16),
    (1, 1, 400),
)
add("asteroid/DCUNet", lambda: asteroid("DCUNet")("mini", stft_n_filters=64, stft_kernel_size=64, stft_stride=16,
    fix_length_mode="pad"), (1, 640), time=1)  # fmt: skip
add(
    "asteroid/DeMask",
    lambda: asteroid("DeMask")(hidden_dims=(16,), n_filters=32, stride=16, kernel_size=32),
    (1, 320),
    time=1,
)
add(
    "asteroid/DeMask_BN",
    lambda: asteroid("DeMask")(hidden_dims=(16,), n_filters=32, stride=16, kernel_size=32, norm_type="bN"),
    (1, 320),
    time=1,
)
for _norm in ("gLN", "cLN", "bN"):
    add(
        f"asteroid/TDConvNet_{_norm}",
        lambda n=_norm: load("asteroid.masknn", "TDConvNet")(
            8, 2, n_blocks=3, n_repeats=2, bn_chan=8, hid_chan=16, skip_chan=8, norm_type=n, causal=n != "gLN"
        ),
        (1, 8, 24),
    )
add(
    "asteroid/TDConvNetpp",
    lambda: load("asteroid.masknn", "TDConvNetpp")(8, 2, n_blocks=2, n_repeats=2, bn_chan=8, hid_chan=16, skip_chan=8),
    (1, 8, 24),
)
add(
    "asteroid/FasNetTAC",
    lambda: asteroid("FasNetTAC")(
        2, 8, 8, 8, 1, window_ms=2, context_ms=4, sample_rate=2000, chunk_size=4, hop_size=2, tac_hidden_dim=8
    ),
    (1, 2, 64),
)

# denoiser and demucs

add(
    "denoiser/Demucs",
    lambda: load("denoiser.demucs", "Demucs")(hidden=4, depth=3, normalize=False, resample=1),
    (1, 1, 256),
)
add(
    "denoiser/Demucs_resample",
    lambda: load("denoiser.demucs", "Demucs")(hidden=4, depth=3, normalize=False),
    (1, 1, 256),
)
add("denoiser/Demucs_normalize", lambda: load("denoiser.demucs", "Demucs")(hidden=4, depth=3), (1, 1, 256))
add(
    "denoiser/Demucs_noncausal",
    lambda: load("denoiser.demucs", "Demucs")(hidden=4, depth=3, causal=False, normalize=False),
    (1, 1, 256),
)
add(
    "demucs/Demucs",
    lambda: load("demucs.demucs", "Demucs")(
        ["a"], 1, 4, depth=3, resample=False, normalize=False, norm_starts=9, dconv_mode=0
    ),
    (1, 1, 512),
)
add(
    "demucs/Demucs_full",
    lambda: load("demucs.demucs", "Demucs")(["a"], 1, 8, depth=2, norm_starts=1, norm_groups=2),
    (1, 1, 512),
)
add("demucs/HDemucs", lambda: load("demucs.hdemucs", "HDemucs")(["a", "b"], 1, 4, nfft=256, depth=4), (1, 1, 2048))
add(
    "demucs/HTDemucs",
    lambda: load("demucs.htdemucs", "HTDemucs")(
        ["a"], 1, 8, nfft=64, depth=2, t_layers=2, t_heads=2, use_train_segment=False, samplerate=800, segment=1
    ),
    (1, 1, 512),
)

# codecs


@entry("snac/Encoder", (1, 1, 192), length=384)
def _() -> nn.Module:
    return load("snac", "SNAC")(16000, 4, [2, 4], 8, 16, [4, 2], None, 8, 4, [2, 1], False).encoder


@entry("snac/Decoder", (1, 16, 24), length=48)
def _() -> nn.Module:
    return load("snac", "SNAC")(16000, 4, [2, 4], 16, 16, [4, 2], None, 8, 4, [2, 1], False).decoder


@entry("snac/Decoder_noise", (1, 16, 24), length=48)
def _() -> nn.Module:
    return load("snac", "SNAC")(16000, 4, [2, 4], 16, 16, [4, 2], None, 8, 4, [2, 1], True).decoder


@entry("snac/SNAC", (1, 1, 192), length=384)
def _() -> nn.Module:
    model = load("snac", "SNAC")(16000, 4, [2, 4], None, 16, [4, 2], None, 8, 4, [2, 1], False)
    return Call(model, lambda m, x: m(x)[0])


@entry("snac/Encoder_attention", (1, 1, 192))
def _() -> nn.Module:
    return load("snac", "SNAC")(16000, 16, [2, 4], None, 64, [4, 2], 4, 8, 4, [2, 1], False).encoder


def _encodec(causal: bool, lstm: int, pad: str = "reflect", norm: str = "weight_norm", side: str = "Encoder") -> Any:
    return load("encodec.modules", f"SEANet{side}")(
        1, 8, 4, 1, [4, 2], causal=causal, lstm=lstm, pad_mode=pad, norm=norm
    )


add("encodec/SEANetEncoder", lambda: _encodec(False, 2), (1, 1, 128))
add("encodec/SEANetEncoder_causal", lambda: _encodec(True, 2), (1, 1, 128))
add("encodec/SEANetEncoder_causal_constant", lambda: _encodec(True, 2, "constant"), (1, 1, 128))
add("encodec/SEANetEncoder_group_norm", lambda: _encodec(False, 0, norm="time_group_norm"), (1, 1, 128))
add("encodec/SEANetDecoder", lambda: _encodec(False, 2, side="Decoder"), (1, 8, 16))
add("encodec/SEANetDecoder_causal", lambda: _encodec(True, 2, side="Decoder"), (1, 8, 16))


@entry("encodec/quantizer", (1, 8, 16))
def _() -> nn.Module:
    quantizer = load("encodec.quantization", "ResidualVectorQuantizer")(8, 4, 16, kmeans_init=False)
    for layer in quantizer.vq.layers:
        layer._codebook.embed.copy_(torch.randn(16, 8))
    return Call(quantizer, lambda m, x: m(x, 50).quantized)


@entry("encodec/EncodecModel", (1, 1, 128))
def _() -> nn.Module:
    quantizer = load("encodec.quantization", "ResidualVectorQuantizer")(8, 4, 16, kmeans_init=False)
    for layer in quantizer.vq.layers:
        layer._codebook.embed.copy_(torch.randn(16, 8))
    return load("encodec", "EncodecModel")(_encodec(True, 1), _encodec(True, 1, side="Decoder"), quantizer, [6.0],
                                           16000, 1)  # fmt: skip


@entry("dac/DAC_encoder", (1, 1, 128), length=256)
def _() -> nn.Module:
    return load("dac", "DAC")(4, [2, 4], None, 16, [4, 2], 2, 16, 4).encoder


@entry("dac/DAC_decoder", (1, 16, 24), length=48)
def _() -> nn.Module:
    return load("dac", "DAC")(4, [2, 4], None, 16, [4, 2], 2, 16, 4).decoder


@entry("dac/DAC", (1, 1, 128), length=256)
def _() -> nn.Module:
    return Call(load("dac", "DAC")(4, [2, 4], None, 16, [4, 2], 2, 16, 4), lambda m, x: m(x)["audio"])


def _moshi(side: str, **options: Any) -> nn.Module:
    return load("moshi.modules", f"SEANet{side}")(1, 8, 4, 1, [4, 2], causal=True, **options)


add("moshi/SEANetEncoder", lambda: _moshi("Encoder", pad_mode="constant"), (1, 1, 128))
add("moshi/SEANetEncoder_replicate", lambda: _moshi("Encoder", pad_mode="replicate"), (1, 1, 128))
add("moshi/SEANetDecoder", lambda: _moshi("Decoder", pad_mode="constant"), (1, 8, 16))


@entry("moshi/ProjectedTransformer", (1, 8, 16))
def _() -> nn.Module:
    model = load("moshi.modules.transformer", "ProjectedTransformer")(
        8, (8,), 16, conv_layout=True, num_heads=2, num_layers=2, dim_feedforward=32, causal=True, context=6,
        positional_embedding="rope", norm="layer_norm", gating="none", layer_scale=0.1, max_period=10000,
    )  # fmt: skip
    return Call(model, lambda m, x: m(x)[0])


@entry("moshi/StreamingTransformer", (1, 16, 8), time=1)
def _() -> nn.Module:
    return load("moshi.modules.transformer", "StreamingTransformer")(
        8, 2, 2, 32, causal=True, positional_embedding="rope", norm="rms_norm_f32", gating="silu"
    )


add("moshi/ConvDownsample1d", lambda: load("moshi.modules.resample", "ConvDownsample1d")(2, 8, causal=True,
    learnt=True), (1, 8, 16))  # fmt: skip
add("moshi/ConvTrUpsample1d", lambda: load("moshi.modules.resample", "ConvTrUpsample1d")(2, 8, causal=True,
    learnt=True), (1, 8, 16))  # fmt: skip

# vocoders

add("vocos/VocosBackbone", lambda: load("vocos.models", "VocosBackbone")(6, 8, 16, 2), (1, 6, 32))
add("vocos/VocosResNetBackbone", lambda: load("vocos.models", "VocosResNetBackbone")(6, 8, 2), (1, 6, 32))
add("vocos/ISTFTHead", lambda: load("vocos.heads", "ISTFTHead")(8, 16, 4), (1, 16, 8), time=1)
add("vocos/ISTFTHead_center", lambda: load("vocos.heads", "ISTFTHead")(8, 16, 4, "center"), (1, 16, 8), time=1)


@entry("vocos/Vocos", (1, 6, 32))
def _() -> nn.Module:
    backbone, head = load("vocos.models", "VocosBackbone")(6, 8, 16, 2), load("vocos.heads", "ISTFTHead")(8, 16, 4)
    return nn.Sequential(backbone, head)


add(
    "speechbrain/HifiganGenerator",
    lambda: load("speechbrain.lobes.models.HifiGAN", "HifiganGenerator")(
        6, 1, "1", [[1, 3, 5], [1, 3, 5]], [3, 5], [4, 4], 16, [2, 2]
    ),
    (1, 6, 24),
)

# spectrogram front ends


@entry("torchaudio/MelSpectrogram", (1, 512), time=1)
def _() -> nn.Module:
    return load("torchaudio.transforms", "MelSpectrogram")(8000, n_fft=64, hop_length=16, n_mels=8)


@entry("torchaudio/MelSpectrogram_uncentered", (1, 512), time=1)
def _() -> nn.Module:
    return load("torchaudio.transforms", "MelSpectrogram")(8000, n_fft=64, hop_length=16, n_mels=8, center=False)


@entry("torchaudio/MFCC", (1, 512), time=1)
def _() -> nn.Module:
    return load("torchaudio.transforms", "MFCC")(
        8000, 4, melkwargs={"n_fft": 64, "hop_length": 16, "n_mels": 8, "center": False}
    )


@entry("torchaudio/Resample", (1, 96), time=1)
def _() -> nn.Module:
    return load("torchaudio.transforms", "Resample")(3, 2)


@entry("torchlibrosa/Spectrogram", (1, 512), time=1)
def _() -> nn.Module:
    return load("torchlibrosa.stft", "Spectrogram")(64, 16, center=False)


@entry("openunmix/STFT", (1, 2, 512))
def _() -> nn.Module:
    return load("openunmix.transforms", "TorchSTFT")(64, 16)


@entry("openunmix/OpenUnmix", (1, 2, 9, 12), time=3, positive=True)
def _() -> nn.Module:
    return load("openunmix.model", "OpenUnmix")(9, 2, 8, 2)


@entry("openunmix/OpenUnmix_unidirectional", (1, 2, 9, 12), time=3, positive=True)
def _() -> nn.Module:
    return load("openunmix.model", "OpenUnmix")(9, 2, 8, 2, True)


@entry("torchcrepe/Crepe", (1, 1024), time=1)
def _() -> nn.Module:
    return load("torchcrepe.model", "Crepe")("tiny")


# speechbrain


def speechbrain(module: str, name: str) -> Any:
    """A model of speechbrain."""
    return load(f"speechbrain.lobes.models.{module}", name)


@entry("speechbrain/ECAPA_TDNN", (1, 20, 8), time=1)
def _() -> nn.Module:
    return speechbrain("ECAPA_TDNN", "ECAPA_TDNN")(
        8, lin_neurons=4, channels=[8] * 5, attention_channels=4, res2net_scale=2, se_channels=4
    )


add(
    "speechbrain/Xvector",
    lambda: speechbrain("Xvector", "Xvector")(tdnn_channels=[8] * 5, lin_neurons=4, in_channels=6),
    (1, 20, 6),
    time=1,
)


@entry("speechbrain/CRDNN", (1, 16, 8), time=1)
def _() -> nn.Module:
    return speechbrain("CRDNN", "CRDNN")(
        input_shape=[None, None, 8], cnn_channels=[4, 4], rnn_layers=1, rnn_neurons=8, rnn_bidirectional=False,
        rnn_class=load("speechbrain.nnet.RNN", "LSTM"), dnn_neurons=8, dnn_blocks=1,
    )  # fmt: skip


@entry("speechbrain/CRDNN_LiGRU", (1, 16, 8), time=1)
def _() -> nn.Module:
    return speechbrain("CRDNN", "CRDNN")(
        input_shape=[None, None, 8], cnn_channels=[4, 4], rnn_layers=1, rnn_neurons=8, rnn_bidirectional=False,
        dnn_neurons=8, dnn_blocks=1,
    )  # fmt: skip


@entry("speechbrain/ContextNet", (1, 24, 8), time=1)
def _() -> nn.Module:
    return speechbrain("ContextNet", "ContextNet")((None, None, 8), 8, [8, 8, 8], 3, [1, 2, 1], 3, 2, 4)


for _norm in ("gLN", "cLN"):
    add(
        f"speechbrain/MaskNet_{_norm}",
        lambda n=_norm: speechbrain("conv_tasnet", "MaskNet")(8, 8, 16, 3, 2, 2, 2, n, n == "cLN"),
        (1, 8, 24),
    )
add(
    "speechbrain/W2VLatentExtractor",
    lambda: Call(speechbrain("wav2vec", "W2VLatentExtractor")([8] * 3, [10, 3, 3], [5, 2, 2]),
                 lambda m, x: m(x, False)),
    (1, 320),
    time=1,
)  # fmt: skip
add(
    "speechbrain/ConvolutionFrontEnd",
    lambda: speechbrain("convolution", "ConvolutionFrontEnd")((None, None, 8), 2, 2, [4, 4], [3, 3], [1, 2], [1, 1],
                                                              [True, True]),
    (1, 24, 8),
    time=1,
)  # fmt: skip
add("speechbrain/Cnn14", lambda: speechbrain("Cnn14", "Cnn14")(64, 8), (1, 64, 64), time=1)


@entry("speechbrain/MetricGAN", (1, 16, 257), time=1, positive=True)
def _() -> nn.Module:
    model = speechbrain("MetricGAN", "EnhancementGenerator")(257, 200, 1)
    return Call(model, lambda m, x: m(x, None))


@entry("speechbrain/resepformer", (1, 8, 40))
def _() -> nn.Module:
    return speechbrain("resepformer", "ResourceEfficientSeparator")(
        8, True, 2, layer=2, unit=8, segment_size=4,
        seg_model=speechbrain("resepformer", "SegLSTM")(8, 8, bidirectional=False, norm_type="cLN"),
        mem_model=speechbrain("resepformer", "MemLSTM")(8, bidirectional=False, norm_type="cln"),
    )  # fmt: skip


@entry("speechbrain/Dual_Path", (1, 8, 40))
def _() -> nn.Module:
    block = speechbrain("dual_path", "SBRNNBlock")
    return speechbrain("dual_path", "Dual_Path_Model")(
        8, 8, block(8, 8, 1, bidirectional=True), block(8, 8, 1, bidirectional=True), K=8
    )


# others

add("whisper/AudioEncoder", lambda: load("whisper.model", "AudioEncoder")(6, 8, 8, 2, 2), (1, 6, 16))
add("conformer/Conformer", lambda: load("conformer", "Conformer")(8, depth=2, dim_head=4, heads=2, conv_kernel_size=5),
    (1, 16, 8), time=1)  # fmt: skip
add("conformer/ConformerConvModule", lambda: load("conformer", "ConformerConvModule")(8, kernel_size=5),
    (1, 16, 8), time=1)  # fmt: skip
add("conformer/ConformerConvModule_causal", lambda: load("conformer", "ConformerConvModule")(8, True, kernel_size=5),
    (1, 16, 8), time=1)  # fmt: skip
