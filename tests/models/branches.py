"""Branches that part and meet: residual, dense, inception, gated, multi-rate and U-shaped nets."""

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Sample, parameter


class ResidualCrop(nn.Module):
    """A valid convolution beside its input, cropped at the centre, at the start or at the end."""

    def __init__(self, crop: slice) -> None:
        super().__init__()
        self.conv, self.crop = nn.Conv1d(3, 3, 5), crop

    def forward(self, x):
        return F.relu(self.conv(x)) + x[:, :, self.crop]


class DenseBlock(nn.Module):
    def __init__(self, layers: int = 3, growth: int = 2) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(3 + growth * i, growth, 3, padding=2**i, dilation=2**i) for i in range(layers)
        )

    def forward(self, x):
        for conv in self.convs:
            x = torch.cat((x, F.elu(conv(x))), 1)
        return x


class Inception(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 2, 1, stride)
        self.three = nn.Sequential(nn.Conv1d(3, 2, 1), nn.ReLU(), nn.Conv1d(2, 3, 3, stride, 1))
        self.five = nn.Sequential(nn.Conv1d(3, 2, 3, padding=1), nn.ReLU(), nn.Conv1d(2, 2, 3, stride, 1))
        self.pool = nn.Sequential(nn.MaxPool1d(3, stride, 1), nn.Conv1d(3, 2, 1))

    def forward(self, x):
        return torch.cat([branch(x) for branch in (self.one, self.three, self.five, self.pool)], dim=1)


class GatedSkips(nn.Module):
    """Dilated gated layers whose skips are summed; causal, or without padding and cropped to the shortest."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.enter = nn.Conv1d(2, 4, 1)
        self.layers = nn.ModuleList(nn.Conv1d(4, 8, 3, dilation=d) for d in (1, 2, 3))
        self.skips = nn.ModuleList(nn.Conv1d(4, 3, 1) for _ in self.layers)
        self.causal = causal

    def forward(self, x):
        x, total = self.enter(x), None
        for layer, skip in zip(self.layers, self.skips, strict=True):
            reach = layer.dilation[0] * 2
            value, gate = layer(F.pad(x, (reach, 0)) if self.causal else x).chunk(2, dim=1)
            z = value.tanh() * gate.sigmoid()
            total = skip(z) if total is None else total[:, :, -z.size(2) :] + skip(z)
            x = z + x[:, :, -z.size(2) :]
        return total


class StridesMeet(nn.Module):
    """Two branches come down to a quarter of the rate in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.steep = nn.Conv1d(2, 4, 7, stride=4, padding=3)
        self.gentle = nn.Sequential(nn.Conv1d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv1d(4, 4, 3, 2, 1))

    def forward(self, x):
        return self.steep(x) + self.gentle(x) * F.avg_pool1d(x, 4, ceil_mode=True).mean(1, keepdim=True)


class DownAndUp(nn.Module):
    """A branch that goes down and comes up meets one that stayed."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(2, 3, 3, 3, 1), nn.ConvTranspose1d(3, 2, 3, 3)
        self.stay = nn.Conv1d(2, 2, 5, padding=2)

    def forward(self, x):
        return F.gelu(self.up(F.relu(self.down(x)))) + self.stay(x)


class UNet(nn.Module):
    """Two levels; down by convolution or pool, up by transposed convolution or nearest; joined by cat."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.encode = nn.ModuleList([nn.Conv1d(2, 3, 3, padding=1), nn.Conv1d(3, 4, 3, padding=1)])
        self.bottom = nn.Conv1d(4, 4, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv1d(c, c, 4, 2, 1) if learned else nn.MaxPool1d(2) for c in (3, 4))
        self.up = nn.ModuleList(
            nn.ConvTranspose1d(c, c, 2, 2) if learned else nn.Upsample(scale_factor=2) for c in (4, 4)
        )
        self.decode = nn.ModuleList([nn.Conv1d(8, 4, 3, padding=1), nn.Conv1d(7, 2, 3, padding=1)])

    def forward(self, x):
        skips = []
        for encode, down in zip(self.encode, self.down, strict=True):
            skips.append(F.relu(encode(x)))
            x = down(skips[-1])
        x = F.relu(self.bottom(x))
        for up, decode in zip(self.up, self.decode, strict=True):
            x = decode(torch.cat([skips.pop(), up(x)], 1))
        return x


class UNetFitted(nn.Module):
    """One level; the upsampled half is padded on to the length of the other, whatever that is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 3, 3, padding=1), nn.Conv1d(3, 3, 3, padding=1), nn.Conv1d(6, 2, 1)

    def forward(self, x):
        fine = self.a(x)
        coarse = F.interpolate(self.b(F.max_pool1d(fine, 2)), scale_factor=2.0)
        coarse = F.pad(coarse, (0, fine.shape[2] - coarse.shape[2]))
        return self.c(torch.cat([fine, coarse], 1))


class UNetOdd(nn.Module):
    """What comes up is padded, or the skip cropped, where the length is odd: by a branch in Python."""

    def __init__(self, crop: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 3, 3, padding=1), nn.Conv1d(3, 3, 3, padding=1), nn.Conv1d(6, 2, 1)
        self.down, self.up, self.crop = nn.Conv1d(3, 3, 4, 2, 1), nn.ConvTranspose1d(3, 3, 4, 2, 1), crop

    def forward(self, x):
        fine = F.relu(self.a(x))
        coarse = self.up(F.relu(self.b(self.down(fine))))
        if coarse.shape[2] != fine.shape[2]:
            if self.crop:
                fine = fine[:, :, : coarse.shape[2]]
            else:
                coarse = F.pad(coarse, (0, fine.shape[2] - coarse.shape[2]))
        return self.c(torch.cat([fine, coarse], 1))


class ToMultiple(nn.Module):
    """Zeros up to a multiple of all strides together, and cut off again at the end."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv1d(2, 3, 2, 2), nn.Conv1d(3, 3, 3, 3)])
        self.up, self.how = nn.ConvTranspose1d(3, 2, 6, 6), how

    def forward(self, x):
        n = x.shape[2]
        if self.how == "pad":
            y = F.pad(x, (0, -n % 6))
        elif n % 6 == 0:
            y = x
        elif self.how == "pad_if":
            y = F.pad(x, (0, 6 - n % 6))
        else:
            y = torch.cat([x, x.new_zeros(x.shape[0], 2, 6 - n % 6)], 2)
        for down in self.down:
            y = torch.tanh(down(y))
        return self.up(y)[:, :, :n]


class GroupsOfThree(nn.Module):
    """Every three frames as one; what is left over is dropped, or filled up."""

    def __init__(self, fill: bool) -> None:
        super().__init__()
        self.linear, self.fill = nn.Linear(6, 4), fill

    def forward(self, x):
        rest = x.shape[1] % 3
        if rest:
            x = F.pad(x, (0, 0, 0, 3 - rest)) if self.fill else x[:, :-rest]
        return self.linear(x.reshape(x.shape[0], -1, 6))


class UNetValid(nn.Module):
    """Without padding: the skip is cropped to the length of what comes up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 3, 3), nn.Conv1d(3, 3, 3)
        self.down, self.up = nn.MaxPool1d(2), nn.ConvTranspose1d(3, 3, 2, 2)

    def forward(self, x):
        fine = F.relu(self.a(x))
        coarse = self.up(F.relu(self.b(self.down(fine))))
        margin = (fine.shape[2] - coarse.shape[2]) // 2
        return torch.cat([fine[:, :, margin : margin + coarse.shape[2]], coarse], dim=1)


class Pyramid(nn.Module):
    """Features of three rates, the coarser ones added on the way up; every level is an output's share."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv1d(2, 3, 3, 1, 1), nn.Conv1d(3, 3, 3, 2, 1), nn.Conv1d(3, 3, 3, 2, 1)])
        self.lateral = nn.ModuleList(nn.Conv1d(3, 4, 1) for _ in range(3))

    def forward(self, x):
        levels = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = F.relu(stage(x))
            levels.append(lateral(x))
        top = levels[2]
        for level in (levels[1], levels[0]):
            top = level + F.interpolate(top, scale_factor=2, mode="nearest")
        return top


class SharedTower(nn.Module):
    """One convolution used three times in a row and once beside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv(self.conv(x).relu()).relu()) + self.conv(-x)


class MobileBlock(nn.Module):
    """Inverted residual in space and time with a gate per frame."""

    def __init__(self, c: int = 3) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv3d(c, 2 * c, 1, bias=False), nn.BatchNorm3d(2 * c), nn.Hardswish())
        self.depth = nn.Sequential(nn.Conv3d(2 * c, 2 * c, 3, padding=1, groups=2 * c), nn.BatchNorm3d(2 * c))
        self.gate = nn.Sequential(nn.Conv3d(2 * c, 2, 1), nn.ReLU(), nn.Conv3d(2, 2 * c, 1), nn.Hardsigmoid())
        self.project = nn.Conv3d(2 * c, c, 1)

    def forward(self, x):
        z = self.depth(self.expand(x))
        return x + self.project(F.hardswish(z * self.gate(z.mean(dim=(3, 4), keepdim=True))))


class Factored(nn.Module):
    """Spatial, then temporal convolution, with a strided shortcut and an in-place sum."""

    def __init__(self, c: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.spatial = nn.Conv3d(c, 4, (1, 3, 3), padding=(0, 1, 1))
        self.temporal = nn.Conv3d(4, 4, (3, 1, 1), (stride, 1, 1), (1, 0, 0))
        self.norm = nn.BatchNorm3d(4)
        self.shortcut = nn.Conv3d(c, 4, 1, (stride, 1, 1))

    def forward(self, x):
        z = self.norm(self.temporal(F.relu(self.spatial(x), inplace=True)))
        z += self.shortcut(x)
        return z.relu_()


class GraphConv(nn.Module):
    """Joints of a skeleton: an einsum with the adjacency, a strided convolution over time, a residual."""

    def __init__(self, stride: int = 1, joints: int = 5, k: int = 5) -> None:
        super().__init__()
        self.adjacency = parameter(2, joints, joints)
        self.spatial = nn.Conv2d(3, 8, 1)
        self.temporal = nn.Conv2d(4, 4, (k, 1), (stride, 1), (k // 2, 0))
        self.norm, self.shortcut = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1, (stride, 1))

    def forward(self, x):
        n, _, t, v = x.size()
        z = self.spatial(x).view(n, 2, 4, t, v)
        z = torch.einsum("nkctv,kvw->nctw", z, self.adjacency).contiguous()
        return torch.relu(self.norm(self.temporal(z)) + self.shortcut(x))


class Chomp(nn.Module):
    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x):
        return x[..., : -self.frames].contiguous()


class ChompedBlock(nn.Module):
    """Padded on both sides by the reach, then chomped at the end: causal (TCN)."""

    def __init__(self, channels: int, width: int, dilation: int) -> None:
        super().__init__()
        reach = 2 * dilation
        self.layers = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv1d(channels, width, 3, padding=reach, dilation=dilation)),
            Chomp(reach),
            nn.ReLU(),
            nn.Dropout(0.1),
        )
        self.match = nn.Conv1d(channels, width, 1) if channels != width else None

    def forward(self, x):
        return F.relu(self.layers(x) + (x if self.match is None else self.match(x)))


class Codec(nn.Module):
    """A causal codec: everything padded in front, strided down, transposed up and trimmed at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv1d(1, 3, 5), nn.Conv1d(3, 1, 5)
        self.narrow, self.widen = nn.Conv1d(3, 2, 3), nn.Conv1d(2, 3, 1)
        self.down, self.up = nn.Conv1d(3, 6, 6, 3), nn.ConvTranspose1d(6, 3, 6, 3)

    def forward(self, x):
        x = self.enter(F.pad(x, (4, 0)))
        x = x + self.widen(F.elu(self.narrow(F.pad(F.elu(x), (2, 0)))))
        x = self.down(F.pad(F.elu(x), (3, 0)))
        return self.leave(F.pad(F.elu(self.up(F.elu(x))[..., :-3]), (4, 0)))


class Hierarchical(nn.Module):
    """Each group of channels also sees the result of the group before (Res2Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x):
        groups = torch.split(x, 2, dim=1)
        done = [groups[0]]
        for conv, group in zip(self.convs, groups[1:], strict=True):
            done.append(conv(group if len(done) == 1 else group + done[-1]))
        return torch.cat(done, 1) + x


class ConvNeXt(nn.Module):
    def __init__(self, c: int = 4) -> None:
        super().__init__()
        self.depth = nn.Conv1d(c, c, 7, padding=3, groups=c)
        self.norm, self.widen, self.narrow = nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(3 * c, c)
        self.scale = parameter(c)

    def forward(self, x):
        z = self.depth(x).permute(0, 2, 1)
        return x + (self.scale * self.narrow(F.gelu(self.widen(self.norm(z))))).permute(0, 2, 1)


class Conformer(nn.Module):
    def __init__(self, c: int = 4) -> None:
        super().__init__()
        self.feed = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 8), nn.SiLU(), nn.Dropout(0.2), nn.Linear(8, c))
        self.norm, self.open, self.close = nn.LayerNorm(c), nn.Conv1d(c, 2 * c, 1), nn.Conv1d(c, c, 1)
        self.depth, self.batch = nn.Conv1d(c, c, 5, padding=2, groups=c), nn.BatchNorm1d(c)

    def forward(self, x):
        x = x + self.feed(x) / 2
        z = F.glu(self.open(self.norm(x).mT), dim=1)
        return x + self.close(F.silu(self.batch(self.depth(z)))).mT


SAMPLES = [
    Sample("residual_padded", lambda: Net(lambda m, x: x + m.conv(x), conv=nn.Conv1d(3, 3, 5, padding=2)), (2, 3, 10)),
    Sample("residual_centre", lambda: ResidualCrop(slice(2, -2)), (1, 3, 11)),
    Sample("residual_lagging", lambda: ResidualCrop(slice(None, -4)), (1, 3, 11)),
    Sample("residual_leading", lambda: ResidualCrop(slice(4, None)), (1, 3, 11)),
    Sample(
        "residual_of_residuals",
        lambda: Net(
            lambda m, x: x + m.outer(F.relu(x + m.inner(x))),
            inner=nn.Conv1d(2, 2, 3, padding=1),
            outer=nn.Conv1d(2, 2, 5, padding=2),
        ),
        (1, 2, 10),
    ),
    Sample("dense_block", DenseBlock, (1, 3, 12)),
    Sample("inception", Inception, (2, 3, 9)),
    Sample("inception_strided", lambda: Inception(2), (1, 3, 12), length=31),
    Sample("gated_skips_causal", lambda: GatedSkips(causal=True), (1, 2, 14)),
    Sample("gated_skips_valid", lambda: GatedSkips(causal=False), (1, 2, 18)),
    Sample(
        "gate_of_other_reach",
        lambda: Net(
            lambda m, x: m.wide(x) * torch.sigmoid(m.narrow(x)),
            wide=nn.Conv1d(2, 3, 7, padding=3),
            narrow=nn.Conv1d(2, 3, 2, padding="same"),
        ),
        (1, 2, 11),
    ),
    Sample(
        "join_maximum",
        lambda: Net(lambda m, x: torch.maximum(m.a(x), m.b(x)[:, :, 1:-1]), a=nn.Conv1d(2, 2, 5), b=nn.Conv1d(2, 2, 3)),
        (1, 2, 12),
    ),
    Sample("join_strides", StridesMeet, (1, 2, 16), length=44),
    Sample("join_down_and_up", DownAndUp, (1, 2, 12), length=33, multiple=3),
    Sample("unet_learned", lambda: UNet(learned=True), (1, 2, 16), length=44, multiple=4),
    Sample("unet_pooled", lambda: UNet(learned=False), (1, 2, 16), length=44, multiple=4),
    Sample("unet_fitted", UNetFitted, (1, 2, 12), length=33),
    Sample("unet_padded_where_odd", UNetOdd, (1, 2, 16), length=37),
    Sample("unet_traced_where_odd", UNetOdd, (1, 2, 15), length=36, lag=3),
    Sample("unet_cropped_where_odd", lambda: UNetOdd(crop=True), (1, 2, 16), length=37),
    Sample("padded_to_a_multiple", lambda: ToMultiple("pad"), (1, 2, 18), length=40, exact=False),
    Sample("padded_where_no_multiple", lambda: ToMultiple("pad_if"), (1, 2, 18), length=40, exact=False),
    Sample("zeros_joined_to_a_multiple", lambda: ToMultiple("cat"), (1, 2, 18), length=40, exact=False),
    Sample("groups_without_the_rest", lambda: GroupsOfThree(fill=False), (2, 12, 2), 1, length=32),
    Sample("groups_filled_up", lambda: GroupsOfThree(fill=True), (2, 12, 2), 1, length=32, exact=False),
    Sample("unet_valid", UNetValid, (1, 2, 16), length=34, multiple=2),
    Sample("pyramid", Pyramid, (1, 2, 16), length=40, multiple=4),
    Sample(
        "aspp",
        lambda: Net(
            lambda m, x: m.out(torch.cat([c(x) for c in m.rates] + [x], 1)),
            rates=nn.ModuleList(nn.Conv1d(2, 2, 3, padding=d, dilation=d) for d in (1, 3, 5)),
            out=nn.Conv1d(8, 2, 1),
        ),
        (1, 2, 14),
    ),
    Sample("shared_tower", SharedTower, (1, 3, 11)),
    Sample("mobile_block_3d", MobileBlock, (1, 3, 7, 4, 4)),
    Sample("factored_3d_strided", Factored, (1, 3, 8, 4, 4), length=23),
    Sample("graph_conv", GraphConv, (2, 3, 10, 5)),
    Sample("graph_conv_strided", lambda: nn.Sequential(GraphConv(), nn.Conv2d(4, 3, 1), GraphConv(2)), (1, 3, 12, 5)),
    Sample(
        "tcn_chomped",
        lambda: nn.Sequential(ChompedBlock(2, 4, 1), ChompedBlock(4, 4, 2), ChompedBlock(4, 3, 4)),
        (1, 2, 18),
    ),
    Sample("codec_causal", Codec, (1, 1, 18), length=42, multiple=3),
    Sample("hierarchical_groups", Hierarchical, (1, 8, 11)),
    Sample("convnext", lambda: nn.Sequential(ConvNeXt(), ConvNeXt()), (1, 4, 14)),
    Sample("conformer_convolution", Conformer, (2, 10, 4), time_dim=1),
    Sample(
        "shuffle_half",
        lambda: Net(
            lambda m, x: torch.stack([x[:, ::2], m.conv(x[:, 1::2])], 2).flatten(1, 2),
            conv=nn.Conv1d(2, 2, 3, padding=1),
        ),
        (1, 4, 9),
    ),
]
