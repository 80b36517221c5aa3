"""Audio and sequence models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .entry import Call, entry, hidden, load


def of(name: str, config: str, **options: Any) -> nn.Module:
    """A model of transformers from a configuration."""
    torch.manual_seed(0)
    settings = load("transformers", config)(**options)
    settings._attn_implementation = options.get("attn_implementation", "sdpa")
    try:
        model: nn.Module = load("transformers", name)(settings)
    except ValueError:
        settings._attn_implementation = "eager"
        model = load("transformers", name)(settings)
    return model


CONVOLUTIONS = {
    "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2), "num_feat_extract_layers": 3
}  # fmt: skip
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2
}  # fmt: skip
SPEECH = SMALL | CONVOLUTIONS | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}

for _name, _extra in (
    ("Wav2Vec2", {}),
    ("Hubert", {}),
    ("WavLM", {}),
    ("UniSpeech", {}),
    ("UniSpeechSat", {}),
    ("Data2VecAudio", {"conv_pos_kernel_size": 5}),
    ("SEW", {"squeeze_factor": 2}),
    ("SEWD", {"squeeze_factor": 2, "position_buckets": 8}),
    ("Wav2Vec2Conformer", {"conv_depthwise_kernel_size": 5, "position_embeddings_type": "rotary"}),
):

    @entry(f"transformers/{_name}", (1, 640), time=1)
    def _(name: str = _name, extra: Any = _extra) -> nn.Module:
        return hidden(of(f"{name}Model", f"{name}Config", **(SPEECH | extra)))


@entry("transformers/Wav2Vec2_feature_encoder", (1, 640), time=1)
def _() -> nn.Module:
    options = SPEECH | {"feat_extract_norm": "layer"}
    return of("Wav2Vec2Model", "Wav2Vec2Config", **options).feature_extractor  # type: ignore[return-value]


@entry("transformers/Wav2Vec2ForCTC", (1, 640), time=1)
def _() -> nn.Module:
    options = SPEECH | {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    return Call(of("Wav2Vec2ForCTC", "Wav2Vec2Config", **options), lambda m, x: m(x).logits)


@entry("transformers/Wav2Vec2Bert", (1, 16, 8), time=1)
def _() -> nn.Module:
    return hidden(
        of("Wav2Vec2BertModel", "Wav2Vec2BertConfig", feature_projection_input_dim=8, conv_depthwise_kernel_size=5,
           position_embeddings_type="relative_key", left_max_position_embeddings=4, right_max_position_embeddings=2,
           **SMALL)
    )  # fmt: skip


@entry("transformers/Whisper_encoder", (1, 8, 32))
def _() -> nn.Module:
    model = of("WhisperModel", "WhisperConfig", d_model=16, encoder_layers=2, encoder_attention_heads=2,
               decoder_layers=1, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
               max_source_positions=16, vocab_size=60000)  # fmt: skip
    return hidden(model.encoder)  # type: ignore[arg-type]


@entry("transformers/AST", (1, 32, 16), time=1)
def _() -> nn.Module:
    return hidden(
        of("ASTModel", "ASTConfig", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
           patch_size=4, frequency_stride=4, time_stride=4, max_length=32, num_mel_bins=16)
    )  # fmt: skip


@entry("transformers/Speech2Text_encoder", (1, 32, 8), time=1)
def _() -> nn.Module:
    model = of("Speech2TextModel", "Speech2TextConfig", d_model=16, encoder_layers=2, encoder_attention_heads=2,
               decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, input_feat_per_channel=8,
               conv_channels=16, vocab_size=20, max_source_positions=64)  # fmt: skip
    return hidden(model.encoder)  # type: ignore[arg-type]


CODEC = {"num_filters": 4, "upsampling_ratios": [4, 2], "hidden_size": 8, "codebook_size": 16, "codebook_dim": 8}

for _side, _shape in (("encoder", (1, 1, 128)), ("decoder", (1, 8, 16))):
    for _causal in (True, False):

        @entry(f"transformers/Encodec_{_side}{'_causal' * _causal}", _shape)
        def _(side: str = _side, causal: bool = _causal) -> nn.Module:
            return getattr(of("EncodecModel", "EncodecConfig", use_causal_conv=causal, **CODEC), side)  # type: ignore


MIMI = {
    "num_filters": 4, "upsampling_ratios": [4, 2], "hidden_size": 16, "codebook_size": 16, "codebook_dim": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
    "head_dim": 8, "sliding_window": 8, "vector_quantization_hidden_dimension": 16, "num_quantizers": 4,
    "upsample_groups": 16
}  # fmt: skip


@entry("transformers/Mimi_encoder", (1, 1, 128))
def _() -> nn.Module:
    return of("MimiModel", "MimiConfig", **MIMI).encoder  # type: ignore[return-value]


@entry("transformers/Mimi_decoder", (1, 16, 16))
def _() -> nn.Module:
    return of("MimiModel", "MimiConfig", **MIMI).decoder  # type: ignore[return-value]


@entry("transformers/Mimi_encoder_transformer", (1, 16, 16), time=1)
def _() -> nn.Module:
    return hidden(of("MimiModel", "MimiConfig", **MIMI).encoder_transformer)  # type: ignore[arg-type]


@entry("transformers/Mimi_encode", (1, 1, 256))
def _() -> nn.Module:
    return Call(of("MimiModel", "MimiConfig", **MIMI), lambda m, x: m.encode(x).audio_codes)


@entry("transformers/Mimi_decode", (1, 4, 8), tokens=16)
def _() -> nn.Module:
    return Call(of("MimiModel", "MimiConfig", **MIMI), lambda m, x: m.decode(x).audio_values)


DAC = {"encoder_hidden_size": 4, "downsampling_ratios": [2, 4], "decoder_hidden_size": 16, "n_codebooks": 2,
       "codebook_size": 16, "codebook_dim": 4, "hidden_size": 16}  # fmt: skip


@entry("transformers/Dac_encoder", (1, 1, 128), length=256)
def _() -> nn.Module:
    return of("DacModel", "DacConfig", **DAC).encoder  # type: ignore[return-value]


@entry("transformers/Dac_decoder", (1, 16, 24), length=48)
def _() -> nn.Module:
    return of("DacModel", "DacConfig", **DAC).decoder  # type: ignore[return-value]


@entry("transformers/Dac_encode", (1, 1, 128), length=256)
def _() -> nn.Module:
    return Call(of("DacModel", "DacConfig", **DAC), lambda m, x: m.encode(x).audio_codes)


@entry("transformers/Univnet", (1, 24, 8), time=1)
def _() -> nn.Module:
    model = of("UnivNetModel", "UnivNetConfig", model_in_channels=8, model_hidden_channels=4, num_mel_bins=8,
               resblock_kernel_sizes=(3,), resblock_stride_sizes=(2,), resblock_dilation_sizes=((1, 3),),
               kernel_predictor_num_blocks=1, kernel_predictor_hidden_channels=8, kernel_predictor_conv_size=3,
               )  # fmt: skip
    return Call(model, lambda m, x: m(x, torch.zeros(x.shape[0], x.shape[1], 8)).waveforms)


@entry("transformers/SpeechT5HifiGan", (1, 16, 8), time=1)
def _() -> nn.Module:
    return of("SpeechT5HifiGan", "SpeechT5HifiGanConfig", model_in_dim=8, upsample_initial_channel=16,
              upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3],
              resblock_dilation_sizes=[[1, 3]])  # fmt: skip


@entry("transformers/Vits_decoder", (1, 8, 16))
def _() -> nn.Module:
    model = of("VitsModel", "VitsConfig", hidden_size=8, flow_size=8, num_hidden_layers=1, num_attention_heads=2,
               ffn_dim=16, upsample_initial_channel=16, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
               resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], spectrogram_bins=9,
               vocab_size=10)  # fmt: skip
    return model.decoder  # type: ignore[return-value]


@entry("transformers/Clap_audio", (1, 1, 64, 16))
def _() -> nn.Module:
    model = of("ClapAudioModel", "ClapAudioConfig", spec_size=32, patch_size=4, patch_stride=[4, 4],
               num_mel_bins=16, window_size=4, hidden_size=16, patch_embeds_hidden_size=4, depths=[1, 1],
               num_attention_heads=[1, 1], num_hidden_layers=2, enable_fusion=False)  # fmt: skip
    return Call(model, lambda m, x: m(x).pooler_output)


@entry("transformers/Encodec", (1, 1, 128))
def _() -> nn.Module:
    model = of("EncodecModel", "EncodecConfig", target_bandwidths=[1.5], sampling_rate=1000, **CODEC)
    return Call(model, lambda m, x: m(x).audio_values)


@entry("transformers/Mimi", (1, 1, 128))
def _() -> nn.Module:
    return Call(of("MimiModel", "MimiConfig", **MIMI), lambda m, x: m(x).audio_values)


@entry("transformers/FastSpeech2ConformerHifiGan", (1, 16, 8), time=1)
def _() -> nn.Module:
    return of("FastSpeech2ConformerHifiGan", "FastSpeech2ConformerHifiGanConfig", model_in_dim=8,
              upsample_initial_channel=16, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
              resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]])  # fmt: skip


@entry("transformers/Moonshine_encoder", (1, 1600), time=1)
def _() -> nn.Module:
    model = of("MoonshineModel", "MoonshineConfig", hidden_size=16, intermediate_size=32, encoder_num_hidden_layers=2,
               decoder_num_hidden_layers=1, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
               vocab_size=32)  # fmt: skip
    return hidden(model.encoder)  # type: ignore[arg-type]


@entry("transformers/Parakeet_encoder", (1, 64, 16), time=1)
def _() -> nn.Module:
    return hidden(of("ParakeetEncoder", "ParakeetEncoderConfig", hidden_size=16, num_hidden_layers=2,
                     num_attention_heads=2, intermediate_size=32, subsampling_conv_channels=8, num_mel_bins=16,
                     conv_kernel_size=5))  # fmt: skip


@entry("transformers/Qwen2Audio_encoder", (1, 8, 32))
def _() -> nn.Module:
    return hidden(of("Qwen2AudioEncoder", "Qwen2AudioEncoderConfig", d_model=16, encoder_layers=2, num_mel_bins=8,
                     encoder_attention_heads=2, encoder_ffn_dim=32, max_source_positions=16))  # fmt: skip


@entry("transformers/SpeechT5_encoder", (1, 640), time=1)
def _() -> nn.Module:
    model = of("SpeechT5ForSpeechToText", "SpeechT5Config", hidden_size=16, encoder_layers=2, decoder_layers=1,
               encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
               conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
               num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, vocab_size=32)  # fmt: skip
    return hidden(model.speecht5.encoder)  # type: ignore[arg-type,union-attr]


# language models, which are causal


def _causal(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: hidden(of(f"{name}Model", f"{name}Config", **(SMALL | options)))


def _no_cache(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Call(of(f"{name}Model", f"{name}Config", **(SMALL | options)),
                        lambda m, x: m(x, use_cache=False).last_hidden_state)  # fmt: skip


for _name, _options in (
    ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    ("GPTNeoX", {}),
    ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    ("Llama", {"num_key_value_heads": 1}),
    ("Mistral", {"num_key_value_heads": 1, "sliding_window": 4}),
    ("Gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    ("Qwen2", {"num_key_value_heads": 1}),
    ("Mamba", {"state_size": 4}),
    ("FalconMamba", {"state_size": 4}),
    ("Rwkv", {"attention_hidden_size": 16}),
    ("Bloom", {"n_layer": 2, "n_head": 2}),
    ("Qwen3", {"num_key_value_heads": 1, "head_dim": 8}),
    ("Gemma2", {"num_key_value_heads": 1, "head_dim": 8}),
    ("Phi", {"num_key_value_heads": 2}),
    ("Phi3", {"num_key_value_heads": 2}),
    ("GPTJ", {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64}),
    ("StableLm", {"num_key_value_heads": 2}),
    ("Olmo2", {"num_key_value_heads": 2}),
    ("Cohere", {"num_key_value_heads": 2}),
    ("Granite", {"num_key_value_heads": 2}),
    ("Starcoder2", {"num_key_value_heads": 2}),
    ("XGLM", {"d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 64}),
    ("BioGpt", {"max_position_embeddings": 64}),
    ("Lfm2", {"num_key_value_heads": 2}),
    ("ModernBertDecoder", {}),
    ("OpenAIGPT", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
):
    entry(f"transformers/{_name}", (1, 16), time=1, tokens=20)(_no_cache(_name, **_options))

entry("transformers/Bert", (1, 16), time=1, tokens=20)(_causal("Bert"))
entry("transformers/FNet", (1, 16), time=1, tokens=20)(_causal("FNet"))


@entry("transformers/MusicgenMelody_free_T5_encoder", (1, 16), time=1, tokens=20)
def _() -> nn.Module:
    return hidden(of("T5EncoderModel", "T5Config", d_model=16, num_layers=2, num_heads=2, d_ff=32, d_kv=8,
                     vocab_size=20))  # fmt: skip


# forecasting


@entry("transformers/PatchTSMixer", (1, 32, 3), time=1)
def _() -> nn.Module:
    return hidden(of("PatchTSMixerModel", "PatchTSMixerConfig", context_length=32, patch_length=4, patch_stride=4,
                     d_model=8, num_layers=2, num_input_channels=3))  # fmt: skip


@entry("transformers/PatchTST", (1, 32, 3), time=1)
def _() -> nn.Module:
    return hidden(of("PatchTSTModel", "PatchTSTConfig", context_length=32, patch_length=4, patch_stride=4,
                     d_model=8, num_hidden_layers=2, num_attention_heads=2, num_input_channels=3))  # fmt: skip


# video


@entry("transformers/VideoMAE", (1, 4, 3, 16, 16), time=1)
def _() -> nn.Module:
    return hidden(of("VideoMAEModel", "VideoMAEConfig", image_size=16, patch_size=8, num_frames=4, tubelet_size=2,
                     hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))  # fmt: skip


@entry("transformers/Vivit", (1, 4, 3, 16, 16), time=1)
def _() -> nn.Module:
    return hidden(of("VivitModel", "VivitConfig", image_size=16, num_frames=4, tubelet_size=[2, 8, 8],
                     hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))  # fmt: skip


@entry("transformers/Timesformer", (1, 4, 3, 16, 16), time=1)
def _() -> nn.Module:
    return hidden(of("TimesformerModel", "TimesformerConfig", image_size=16, patch_size=8, num_frames=4,
                     hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))  # fmt: skip
