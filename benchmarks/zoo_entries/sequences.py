"""Sequence models: linear and local attention, state spaces, minimal recurrences, language models with other mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .entry import Call, add, entry, load
from .speech import SMALL, of

# minimal recurrences, xLSTM, S5

add("minGRU_pytorch/minGRU", lambda: load("minGRU_pytorch", "minGRU")(8, 2.0), (1, 16, 8), time=1)
add("minGRU_pytorch/minLSTM", lambda: load("minGRU_pytorch.minLSTM", "minLSTM")(8, 2.0), (1, 16, 8), time=1)


@entry("minGRU_pytorch/minGRULM", (1, 16), time=1, tokens=20)
def _() -> nn.Module:
    return load("minGRU_pytorch.minLM", "minLM")(num_tokens=20, dim=8, depth=2)


for _kind in ("slstm", "mlstm"):
    add(f"pyxlstm/{_kind}", lambda k=_kind: Call(load("xLSTM.block", "xLSTMBlock")(8, 8, 1, lstm_type=k),
        lambda m, x: m(x)[0]), (1, 12, 8), time=1)  # fmt: skip


@entry("s5/S5Block", (1, 16, 8), time=1)
def _() -> nn.Module:
    return load("s5", "S5Block")(8, 8, False)


@entry("xlstm/mLSTM_stack", (1, 16, 16), time=1)
def _() -> nn.Module:
    m = load("xlstm", "mLSTMBlockConfig")(mlstm=load("xlstm", "mLSTMLayerConfig")(num_heads=2, conv1d_kernel_size=4))
    config = load("xlstm", "xLSTMBlockStackConfig")(mlstm_block=m, context_length=64, num_blocks=2, embedding_dim=16)
    return load("xlstm", "xLSTMBlockStack")(config)


@entry("xlstm/sLSTM_stack", (1, 12, 16), time=1)
def _() -> nn.Module:
    layer = load("xlstm", "sLSTMLayerConfig")(backend="vanilla", num_heads=2, conv1d_kernel_size=4)
    block = load("xlstm", "sLSTMBlockConfig")(
        slstm=layer, feedforward=load("xlstm", "FeedForwardConfig")(proj_factor=1.3, act_fn="gelu")
    )
    config = load("xlstm", "xLSTMBlockStackConfig")(slstm_block=block, context_length=12, num_blocks=1,
                                                    embedding_dim=16, slstm_at="all")  # fmt: skip
    return load("xlstm", "xLSTMBlockStack")(config)


# attention of other kinds


@entry("performer_pytorch/Performer", (1, 16, 8), time=1)
def _() -> nn.Module:
    return load("performer_pytorch", "Performer")(dim=8, depth=2, heads=2, dim_head=4)


@entry("linear_attention_transformer/LinearAttentionTransformer", (1, 16, 8), time=1)
def _() -> nn.Module:
    return load("linear_attention_transformer", "LinearAttentionTransformer")(dim=8, depth=2, heads=2, max_seq_len=64)


@entry("linear_attention_transformer/causal", (1, 16), time=1, tokens=20)
def _() -> nn.Module:
    return load("linear_attention_transformer", "LinearAttentionTransformerLM")(
        num_tokens=20, dim=8, depth=1, heads=2, max_seq_len=16, causal=True, blindspot_size=1, local_attn_window_size=4
    )


@entry("nystrom_attention/Nystromformer", (1, 16, 8), time=1)
def _() -> nn.Module:
    return load("nystrom_attention", "Nystromformer")(dim=8, dim_head=4, heads=2, depth=1, num_landmarks=4)


@entry("linformer/Linformer", (1, 16, 8), time=1)
def _() -> nn.Module:
    return load("linformer", "Linformer")(dim=8, seq_len=16, depth=1, heads=2, k=4)


@entry("megabyte/MEGABYTE", (1, 16), time=1, tokens=16)
def _() -> nn.Module:
    return load("MEGABYTE_pytorch", "MEGABYTE")(num_tokens=16, dim=(8, 8), depth=(1, 1), max_seq_len=(8, 4),
                                                dim_head=4, heads=2)  # fmt: skip


def _x(**options: Any) -> nn.Module:
    wrapper, layers = load("x_transformers", "ContinuousTransformerWrapper"), load("x_transformers", "Decoder")
    model: nn.Module = wrapper(dim_in=4, dim_out=4, max_seq_len=64, use_abs_pos_emb=False,
                               attn_layers=layers(dim=16, depth=2, heads=2, attn_dim_head=8, **options))  # fmt: skip
    return model


for _label, _options in (
    ("kv_heads", {"attn_kv_heads": 1}),
    ("qk_norm", {"attn_qk_norm": True}),
    ("talking_heads", {"attn_pre_talking_heads": True, "attn_post_talking_heads": True}),
    ("sparse_topk", {"attn_sparse_topk": 4}),
    ("macaron", {"macaron": True}),
    ("sandwich_norm", {"sandwich_norm": True}),
    ("gate_residual", {"gate_residual": True}),
    ("gate_values", {"attn_gate_values": True}),
    ("memory_kv", {"attn_num_mem_kv": 2}),
    ("xpos", {"rotary_xpos": True}),
    ("dynamic_pos_bias", {"dynamic_pos_bias": True}),
    ("laser", {"attn_laser": True}),
    ("relu_squared", {"ff_relu_squared": True}),
    ("unet", {"unet_skips": True}),
    ("forgetting", {"attn_data_dependent_alibi": True}),
):  # fmt: skip
    add(f"x_transformers/Decoder_{_label}", lambda o=_options: _x(**dict(o)), (1, 16, 4), time=1)

# transformers: language models


def _plain(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Call(of(f"{name}Model", f"{name}Config", **(SMALL | options)),
                        lambda m, x: m(x, use_cache=False).last_hidden_state)  # fmt: skip


for _name, _options in (
    ("Mamba2", {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 4}),
    ("RecurrentGemma", {"num_key_value_heads": 1, "attention_window_size": 4, "lru_width": 16,
                        "block_types": ["recurrent", "attention"]}),
    ("Falcon", {}),
    ("GPTBigCode", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    ("GPTNeo", {"hidden_size": 16, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 2,
                "window_size": 4, "max_position_embeddings": 64}),
    ("CodeGen", {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 2, "n_positions": 64}),
    ("CTRL", {"n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 32, "n_positions": 64}),
    ("Mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}),
    ("Persimmon", {"num_key_value_heads": 2}),
    ("Olmo", {"num_key_value_heads": 2}),
    ("Glm", {"num_key_value_heads": 2, "head_dim": 8}),
    ("Helium", {"num_key_value_heads": 2, "head_dim": 8}),
    ("SmolLM3", {"num_key_value_heads": 2}),
    ("Gemma3Text", {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4,
                    "layer_types": ["sliding_attention", "full_attention"]}),
    ("Cohere2", {"num_key_value_heads": 2, "sliding_window": 4}),
    ("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 2}),
    ("Qwen3Next", {"num_key_value_heads": 1, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                   "linear_key_head_dim": 4, "linear_value_head_dim": 4, "num_experts": 2, "num_experts_per_tok": 1,
                   "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}),
    ("Bamba", {"num_key_value_heads": 1, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4,
               "attn_layer_indices": [1], "mamba_chunk_size": 4}),
    ("Zamba2", {"num_key_value_heads": 2, "mamba_headdim": 8, "n_mamba_heads": 4, "mamba_d_state": 4,
                "chunk_size": 4, "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid"]}),
):  # fmt: skip
    entry(f"transformers/{_name}", (1, 16), time=1, tokens=20)(_plain(_name, **_options))


# torch's own: what people write by hand around them


@entry("torch/GRU_residual_stack", (1, 24, 8), time=1)
def _() -> nn.Module:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.ModuleList(nn.GRU(8, 8, batch_first=True) for _ in range(2))
            self.norm = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for rnn, norm in zip(self.rnn, self.norm, strict=True):
                x = x + rnn(norm(x))[0]
            return x

    return Stack()
