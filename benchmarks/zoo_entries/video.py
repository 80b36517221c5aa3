"""Video: torchvision and pytorchvideo; images of timm and vit-pytorch frame by frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .entry import Call, add, entry, load


def tv(name: str) -> Any:
    """A video model of torchvision."""
    return load("torchvision.models.video", name)


CLIP = (1, 3, 8, 32, 32)
for _name in ("r3d_18", "mc3_18", "r2plus1d_18"):
    add(f"torchvision/{_name}", lambda n=_name: tv(n)(num_classes=5), CLIP)
add("torchvision/s3d", lambda: tv("s3d")(num_classes=5), (1, 3, 16, 224, 224))
add("torchvision/s3d_features", lambda: tv("s3d")(num_classes=5).features, (1, 3, 16, 32, 32))


@entry("torchvision/swin3d", (1, 3, 8, 32, 32))
def _() -> nn.Module:
    return tv("SwinTransformer3d")([2, 4, 4], 8, [1, 1], [1, 2], [4, 2, 2], num_classes=5)


@entry("torchvision/mvit", (1, 3, 8, 32, 32))
def _() -> nn.Module:
    config = load("torchvision.models.video.mvit", "MSBlockConfig")
    settings = [
        config(num_heads=1, input_channels=8, output_channels=16, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3],
               stride_q=[1, 1, 1], stride_kv=[1, 2, 2]),
        config(num_heads=2, input_channels=16, output_channels=16, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3],
               stride_q=[1, 2, 2], stride_kv=[1, 1, 1]),
    ]  # fmt: skip
    return tv("MViT")((32, 32), 8, settings, residual_pool=False, residual_with_cls_embed=True, rel_pos_embed=False,
                      proj_after_attn=False, num_classes=5)  # fmt: skip


class PerFrame(nn.Module):
    """An image model on each frame, and the mean over the clip or a recurrent head."""

    def __init__(self, image: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.image, self.head = image, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, frames, height, width = x.shape
        y = self.image(x.transpose(1, 2).reshape(batch * frames, channels, height, width))
        y = y.reshape(batch, frames, -1)
        return y if self.head is None else self.head(y)


for _name in ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "efficientnet_b0",
              "mnasnet0_5", "regnet_y_400mf", "convnext_tiny"):  # fmt: skip
    add(f"torchvision/{_name}_frames", lambda n=_name: PerFrame(load("torchvision.models", n)(num_classes=5)),
        (1, 3, 6, 32, 32))  # fmt: skip


@entry("torchvision/CRNN", (1, 3, 6, 32, 32))
def _() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0][:, -1]

    return PerFrame(load("torchvision.models", "resnet18")(num_classes=5), Last())


# pytorchvideo


def ptv(module: str, name: str) -> Any:
    """A builder of pytorchvideo."""
    return load(f"pytorchvideo.models.{module}", name)


@entry("pytorchvideo/x3d_xs", (1, 3, 4, 64, 64))
def _() -> nn.Module:
    return ptv("x3d", "create_x3d")(input_clip_length=4, input_crop_size=64, model_num_class=5, depth_factor=1.0)


@entry("pytorchvideo/slow_r50", (1, 3, 8, 32, 32))
def _() -> nn.Module:
    return ptv("resnet", "create_resnet")(model_num_class=5, stem_dim_out=8, stage1_pool=None,
                                          head_pool_kernel_size=(8, 1, 1))  # fmt: skip


@entry("pytorchvideo/i3d_r50", (1, 3, 8, 32, 32))
def _() -> nn.Module:
    return ptv("resnet", "create_resnet")(
        model_num_class=5, stem_dim_out=8, stem_conv_kernel_size=(5, 7, 7), stage1_pool=nn.MaxPool3d,
        stage_conv_a_kernel_size=((3, 1, 1), [(3, 1, 1), (1, 1, 1)], [(3, 1, 1), (1, 1, 1)], [(1, 1, 1), (3, 1, 1)]),
        stage1_pool_kernel_size=(2, 1, 1), head_pool_kernel_size=(4, 1, 1),
    )  # fmt: skip


@entry("pytorchvideo/r2plus1d", (1, 3, 8, 32, 32))
def _() -> nn.Module:
    return ptv("r2plus1d", "create_r2plus1d")(model_num_class=5, stem_dim_out=8,
                                              head_pool_kernel_size=(1, 1, 1))  # fmt: skip


@entry("pytorchvideo/csn", (1, 3, 8, 64, 64))
def _() -> nn.Module:
    return ptv("csn", "create_csn")(model_num_class=5, stem_dim_out=8, stem_pool=None,
                                    head_pool_kernel_size=(1, 2, 2))  # fmt: skip


@entry("pytorchvideo/slowfast", (1, 3, 2, 32, 32), (1, 3, 8, 32, 32))
def _() -> nn.Module:
    model = ptv("slowfast", "create_slowfast")(model_num_class=5, slowfast_channel_reduction_ratio=(4,),
        slowfast_fusion_conv_stride=(4, 1, 1), model_depth=50, stem_dim_outs=(8, 2),
        head_pool_kernel_sizes=((2, 1, 1), (8, 1, 1)))  # fmt: skip
    return Call(model, lambda m, slow, fast: m([slow, fast]))


@entry("pytorchvideo/acoustic_resnet", (1, 1, 64, 1, 32))
def _() -> nn.Module:
    return ptv("resnet", "create_acoustic_resnet")(model_num_class=5, stem_dim_out=8,
        head_pool_kernel_size=(8, 1, 2))  # fmt: skip


@entry("pytorchvideo/mvit", (1, 3, 4, 32, 32))
def _() -> nn.Module:
    return load("pytorchvideo.models.vision_transformers", "create_multiscale_vision_transformers")(
        spatial_size=32, temporal_size=4, depth=2, patch_embed_dim=8, conv_patch_embed_kernel=(3, 7, 7),
        conv_patch_embed_stride=(2, 4, 4), conv_patch_embed_padding=(1, 3, 3), head_num_classes=5,
        embed_dim_mul=[[1, 2.0]], atten_head_mul=[[1, 2.0]], pool_kv_stride_size=[[0, 1, 2, 2]],
        pool_kvq_kernel=[3, 3, 3],
    )  # fmt: skip


# vit-pytorch and timm


@entry("vit_pytorch/ViViT", (1, 3, 8, 32, 32))
def _() -> nn.Module:
    return load("vit_pytorch.vivit", "ViViT")(image_size=32, image_patch_size=16, frames=8, frame_patch_size=2,
        num_classes=5, dim=16, spatial_depth=1, temporal_depth=1, heads=2, mlp_dim=16, dim_head=8)  # fmt: skip


@entry("vit_pytorch/ViViT_factorized", (1, 3, 8, 32, 32))
def _() -> nn.Module:
    return load("vit_pytorch.vivit", "ViViT")(image_size=32, image_patch_size=16, frames=8, frame_patch_size=2,
        num_classes=5, dim=16, spatial_depth=1, temporal_depth=1, heads=2, mlp_dim=16, dim_head=8,
        variant="factorized_self_attention")  # fmt: skip


@entry("vit_pytorch/ViT_3d", (1, 3, 8, 32, 32))
def _() -> nn.Module:
    return load("vit_pytorch.vit_3d", "ViT")(image_size=32, image_patch_size=16, frames=8, frame_patch_size=2,
        num_classes=5, dim=16, depth=1, heads=2, mlp_dim=16, dim_head=8)  # fmt: skip


@entry("vit_pytorch/SimpleViT_3d", (1, 3, 8, 32, 32))
def _() -> nn.Module:
    return load("vit_pytorch.simple_vit_3d", "SimpleViT")(image_size=32, image_patch_size=16, frames=8,
        frame_patch_size=2, num_classes=5, dim=24, depth=1, heads=2, mlp_dim=16, dim_head=8)  # fmt: skip


@entry("vit_pytorch/CCT_3d", (1, 3, 8, 32, 32))
def _() -> nn.Module:
    return load("vit_pytorch.cct_3d", "CCT")(img_size=32, num_frames=8, embedding_dim=16, n_conv_layers=1,
        frame_kernel_size=3, kernel_size=7, stride=2, padding=3, pooling_kernel_size=3, pooling_stride=2,
        pooling_padding=1, num_layers=1, num_heads=2, mlp_ratio=1.0, num_classes=5)  # fmt: skip


@entry("vit_pytorch/ViT_1d", (1, 3, 32))
def _() -> nn.Module:
    return load("vit_pytorch.vit_1d", "ViT")(seq_len=32, patch_size=4, num_classes=5, dim=16, depth=1, heads=2,
                                             mlp_dim=16, channels=3, dim_head=8)  # fmt: skip


@entry("vit_pytorch/ViT_frames", (1, 3, 4, 32, 32))
def _() -> nn.Module:
    return PerFrame(load("vit_pytorch", "ViT")(image_size=32, patch_size=16, num_classes=5, dim=16, depth=1, heads=2,
                                               mlp_dim=16, dim_head=8))  # fmt: skip


for _name in ("resnet18", "mobilenetv3_small_050", "efficientnet_lite0", "resnext26ts", "ghostnet_050",
              "tf_efficientnet_b0", "mobilevit_xxs", "vit_tiny_patch16_224"):  # fmt: skip

    @entry(f"timm/{_name}_frames", (1, 3, 4, 64, 64))
    def _(name: str = _name) -> nn.Module:
        extra = {"img_size": 64} if "vit_tiny" in name else {}
        return PerFrame(load("timm", "create_model")(name, num_classes=5, pretrained=False, **extra))
