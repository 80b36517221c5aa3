"""Causal and banded attention in the many ways in which it is written: streams, whatever the style."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Sample, parameter


def attention(name, build, shape=(2, 9, 4), **fields):
    fields = {"time_dim": 1, "unbounded": True} | fields
    fields = {"grows": bool(fields["unbounded"])} | fields
    return Sample(f"attention_{name}", build, shape, **fields)


def banded(name, build, shape=(2, 9, 4), **fields):
    return attention(name, build, shape, unbounded=False, **fields)


class Heads(nn.Module):
    """Queries, keys and values of two heads, and what becomes of them: `attend` is what differs."""

    def __init__(self, heads: int = 2, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size // heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(b, t, c))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class ByTril(Heads):
    def attend(self, q, k, v):
        t = q.shape[2]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.masked_fill(torch.ones(t, t).tril() == 0, -torch.inf).softmax(-1) @ v


class ByBuffer(Heads):
    """A registered mask, sliced, and the lowest number instead of minus infinity: GPT-2's way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(256, 256, dtype=torch.bool)).view(1, 1, 256, 256))

    def attend(self, q, k, v):
        t = q.shape[-2]
        scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        mask = self.bias[:, :, :t, :t]
        scores = torch.where(mask, scores, torch.full([], torch.finfo(scores.dtype).min))
        return torch.matmul(F.softmax(scores, dim=-1), v)


class ByAddition(Heads):
    """A float mask of minus infinities, added."""

    def attend(self, q, k, v):
        t = q.shape[2]
        mask = torch.triu(torch.full((t, t), float("-inf")), diagonal=1)
        return torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) + mask, -1) @ v


class ByLowest(Heads):
    """``(1 - mask) * -10000``: BERT's way."""

    def attend(self, q, k, v):
        t = q.shape[2]
        mask = (torch.arange(t)[None, :] <= torch.arange(t)[:, None]).to(q.dtype)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) + (1.0 - mask[None, None]) * -10000.0
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


class Alibi(Heads):
    """Slopes of heads times distances, given to the fused kernel."""

    def attend(self, q, k, v):
        t = q.shape[2]
        i = torch.arange(t)
        distance = i[None, :] - i[:, None]
        bias = torch.tensor([0.5, 0.25]).view(1, 2, 1, 1) * distance
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(distance > 0, -torch.inf))


class Rotary(Heads):
    def attend(self, q, k, v):
        t, d = q.shape[-2:]
        angle = torch.outer(torch.arange(t, dtype=q.dtype), 0.3 ** torch.arange(d // 2, dtype=q.dtype))
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

        def turn(z):
            a, b = z.chunk(2, -1)
            return z * cos + torch.cat([-b, a], -1) * sin

        return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)


class Buckets(Heads):
    """T5's relative positions: distances in buckets, looked up in a table for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 2)

    def attend(self, q, k, v):
        t = q.shape[2]
        i = torch.arange(t)
        back = (i[:, None] - i[None, :]).clamp(min=0)
        bucket = torch.where(back < 4, back, (4 + torch.log2(back.float() / 4 + 1e-6)).long().clamp(max=7))
        scores = q @ k.transpose(2, 3) + self.table(bucket).permute(2, 0, 1).unsqueeze(0)
        return scores.masked_fill(i[None, :] > i[:, None], torch.finfo(q.dtype).min).softmax(-1) @ v


class RelativeTable(Heads):
    """A parameter indexed by the distance of the two frames."""

    def __init__(self) -> None:
        super().__init__()
        self.table = parameter(511, 2)

    def attend(self, q, k, v):
        t = q.shape[2]
        i = torch.arange(t)
        bias = self.table[i[None] - i[:, None] + 255].permute(2, 0, 1)
        mask = torch.ones(t, t, dtype=torch.bool).triu(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(mask, -torch.inf))


class Band(Heads):
    """So many frames back and ahead, by the fused kernel."""

    def __init__(self, back: int, ahead: int) -> None:
        super().__init__()
        self.back, self.ahead = back, ahead

    def attend(self, q, k, v):
        i = torch.arange(q.shape[2])
        near = (i[None] - i[:, None] <= self.ahead) & (i[:, None] - i[None] <= self.back)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near)


class Chunks(Heads):
    """Each frame attends to its own chunk of three and the one before: streaming conformers."""

    def attend(self, q, k, v):
        chunk = torch.arange(q.shape[2]) // 3
        mask = (chunk[None] <= chunk[:, None]) & (chunk[None] >= chunk[:, None] - 1)
        return (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v


class Grouped(nn.Module):
    """Four heads of queries share two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, 2).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, 2, 2).permute(2, 0, 3, 1, 4)
        k, v = (z.repeat_interleave(2, dim=1) for z in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Multihead(nn.Module):
    """The stock module, its mask and its layout."""

    def __init__(self, batch_first: bool = True, weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.time, self.weights = int(batch_first), weights

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[self.time])
        return self.attention(x, x, x, attn_mask=mask, need_weights=self.weights, is_causal=not self.weights)[0]


class Encoder(nn.Module):
    """Stock encoder layers under a causal mask."""

    def __init__(self, layers: int, norm_first: bool, activation: str = "relu") -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.1, activation, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.encoder(x, mask=mask, is_causal=True)


class LinearAttention(Heads):
    """Positive features, weights without softmax, divided by their sum."""

    def attend(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        weights = (q @ k.transpose(-1, -2)).tril()
        return weights @ v / weights.sum(-1, keepdim=True)


class BySteadySoftmax(Heads):
    """Softmax by hand: less the largest score, over the sum."""

    def attend(self, q, k, v):
        i = torch.arange(q.shape[2])
        scores = (q @ k.transpose(-1, -2)).masked_fill(i[None] > i[:, None], -torch.inf)
        e = torch.exp(scores - scores.amax(-1, keepdim=True))
        return (e / e.sum(-1, keepdim=True)) @ v


class ConvBetween(nn.Module):
    """Convolution with look-ahead, banded attention, convolution, a residual around all."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 5, padding=2)
        self.attention = Band(4, 0)

    def forward(self, x):
        y = self.before(x.transpose(1, 2)).transpose(1, 2)
        return x + self.after(self.attention(y).transpose(1, 2)).transpose(1, 2)


class Downsampled(nn.Module):
    """Attention at half the rate, upsampled again."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.attention = nn.Conv1d(4, 4, 4, 2, 1), ByTril()
        self.up = nn.ConvTranspose1d(4, 4, 2, 2)

    def forward(self, x):
        y = self.attention(self.down(x).transpose(1, 2)).transpose(1, 2)
        return self.up(y)


class Sinks(Heads):
    """The first two frames and the last three: what is kept of an endless context."""

    def attend(self, q, k, v):
        i = torch.arange(q.shape[2])
        mask = (i[None] <= i[:, None]) & ((i[:, None] - i[None] < 3) | (i[None] < 2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class KeysThatConvolve(nn.Module):
    """Keys see one frame further back than queries do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Conv1d(4, 4, 2), nn.Linear(4, 4)

    def forward(self, x):
        k = self.k(F.pad(x.transpose(1, 2), (1, 0)))
        i = torch.arange(x.shape[1])
        scores = torch.bmm(self.q(x), k).masked_fill(i[None] > i[:, None], -torch.inf)
        return torch.bmm(scores.softmax(2), self.v(x))


class Skewed(Heads):
    """Transformer-XL: queries times embeddings of distances, moved to where the keys lie by a pad and a reshape."""

    def __init__(self, ahead: int | None = 0, back: int | None = None) -> None:
        super().__init__()
        self.ahead, self.back = ahead, back
        self.position, self.u, self.v = nn.Linear(4, 4, bias=False), parameter(2, 1, 2), parameter(2, 1, 2)

    def rows(self, t):
        return torch.arange(t - 1, -1, -1.0)

    def move(self, scores):
        b, h, t, n = scores.shape
        return F.pad(scores, (1, 0)).view(b, h, n + 1, t)[:, :, 1:].view_as(scores)

    def attend(self, q, k, v):
        t = q.shape[2]
        angle = torch.outer(self.rows(t), torch.tensor([1.0, 0.1]))
        r = self.position(torch.cat([angle.sin(), angle.cos()], -1)).view(-1, 2, 2)
        moved = self.move(torch.einsum("bhid,jhd->bhij", q + self.v, r))
        scores = ((q + self.u) @ k.transpose(-1, -2) + moved[..., :t]) / math.sqrt(2)
        i = torch.arange(t)
        mask = torch.zeros(t, t, dtype=torch.bool)
        if self.ahead is not None:
            mask = mask | (i[None] - i[:, None] > self.ahead)
        if self.back is not None:
            mask = mask | (i[:, None] - i[None] > self.back)
        return scores.masked_fill(mask, -torch.inf).softmax(-1) @ v


class SkewedBothWays(Skewed):
    """ESPnet's and Conformers': distances to keys behind and ahead."""

    def rows(self, t):
        return torch.arange(t - 1, -t, -1.0)


class SkewedTable(Heads):
    """Music Transformer: a learned embedding of each distance, the last of them for distance 0."""

    def __init__(self) -> None:
        super().__init__()
        self.table = parameter(400, 2)

    def attend(self, q, k, v):
        b, h, t, _ = q.shape
        scores = q @ self.table[-t:].t()
        moved = torch.cat([scores.new_zeros(b, h, t, 1), scores], -1).reshape(b, h, t + 1, t)[:, :, 1:]
        mask = torch.full((t, t), -torch.inf).triu(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=moved + mask)


class KeysFirst(Heads):
    """Keys times queries: a column of scores for each query."""

    def attend(self, q, k, v):
        t = q.shape[2]
        scores = (k @ q.transpose(-1, -2)).masked_fill(torch.ones(t, t).tril(-1) == 1, -torch.inf)
        return scores.softmax(-2).transpose(-1, -2) @ v


class TurnedMask(Heads):
    """The mask of torch's older documentation: a triangle, turned around."""

    def attend(self, q, k, v):
        mask = (torch.triu(torch.ones(q.shape[2], q.shape[2])) == 1).transpose(0, 1)
        mask = mask.float().masked_fill(mask == 0, -torch.inf).masked_fill(mask == 1, 0.0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class AssignedMask(Heads):
    """A mask that is written where one position lies before another."""

    def attend(self, q, k, v):
        i = torch.arange(q.shape[2])
        bias = torch.zeros(q.shape[2], q.shape[2])
        bias[i[:, None] < i[None]] = -1e9
        return ((q @ k.transpose(-1, -2) + bias).softmax(-1)) @ v


class Retention(Heads):
    """RetNet: no softmax, weights that decay, normalized by sums over them and by sums over positions alone."""

    def attend(self, q, k, v):
        i = torch.arange(q.shape[2])
        decay = (i[:, None] >= i[None]) / (1 + (i[:, None] - i[None]).clamp(min=0))
        weights = q @ k.transpose(-1, -2) * (decay / decay.sum(-1, keepdim=True).sqrt())
        return (weights / weights.detach().abs().sum(-1, keepdim=True).clamp(min=1)) @ v


class MatrixMemory(nn.Module):
    """The parallel form of an xLSTM's matrix memory: sums of gates from each key on to its query."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gates = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x):
        b, t, _ = x.shape
        (q, k, v), (i, f) = self.qkv(x).chunk(3, -1), self.gates(x).split(1, -1)
        total = torch.cat([torch.zeros(b, 1, 1), F.logsigmoid(f).cumsum(1)], 1).repeat(1, 1, t + 1)
        since = torch.where(torch.ones(t, t).tril() == 1, (total - total.transpose(1, 2))[:, 1:, 1:], -torch.inf)
        since = since + i.transpose(1, 2)
        largest = since.max(-1, keepdim=True).values
        weights = q @ k.transpose(1, 2) * torch.exp(since - largest)
        return weights / torch.maximum(weights.sum(-1, keepdim=True).abs(), torch.exp(-largest)) @ v


class StateSpaceDual(nn.Module):
    """Mamba-2 as attention: an einsum of four tensors, one of them what has decayed from each key to its query."""

    def __init__(self) -> None:
        super().__init__()
        self.bc, self.a = nn.Linear(4, 6), nn.Linear(4, 1)

    def forward(self, x):
        b, c = self.bc(x).chunk(2, -1)
        total = -F.softplus(self.a(x))[..., 0].cumsum(-1)
        after = torch.ones(x.shape[1], x.shape[1]).tril() == 0
        decay = (total[:, :, None] - total[:, None]).masked_fill(after, -torch.inf).exp()
        return torch.einsum("btn,bsn,bts,bsp->btp", c, b, decay, x)


class StateSpaceStable(StateSpaceDual):
    """The same as it is published: decays are added up from each key on, and never subtracted ("segsum")."""

    def forward(self, x):
        (b, c), t = self.bc(x).chunk(2, -1), x.shape[1]
        steps = -F.softplus(self.a(x))[..., 0]
        since = steps[:, :, None].expand(-1, -1, t).masked_fill(torch.ones(t, t).tril(-1) == 0, 0).cumsum(1)
        decay = since.masked_fill(torch.ones(t, t).tril() == 0, -torch.inf).exp()
        return ((c @ b.transpose(1, 2)) * decay) @ x


class ToMemoryToo(Heads):
    """Learned keys and values before those of the frames, and the masks that go with them."""

    def __init__(self, mask) -> None:
        super().__init__()
        self.mask, self.keys, self.values = mask, parameter(2, 3, 2), parameter(2, 3, 2)

    def attend(self, q, k, v):
        k, v = (torch.cat([m.expand(len(q), -1, -1, -1), x], 2) for m, x in ((self.keys, k), (self.values, v)))
        hidden = self.mask(q.shape[2])
        if hidden.dtype == torch.bool:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)
        return (q @ k.mT / 2 + hidden).softmax(-1) @ v


def later(t):
    return torch.ones(t, t, dtype=torch.bool).triu(1)


MASKS_OF_MEMORY = {
    "padded": lambda t: F.pad(later(t), (3, 0)),
    "joined": lambda t: torch.cat([torch.zeros(t, 3, dtype=torch.bool), later(t)], 1),
    "triangle": lambda t: torch.full((t, t + 3), -torch.inf).triu(4),
    "positions": lambda t: torch.arange(t + 3) > torch.arange(t)[:, None] + 3,
    "band": lambda t: F.pad(later(t) | torch.ones(t, t, dtype=torch.bool).tril(-4), (3, 0)),
    "hidden": lambda t: F.pad(torch.ones(t, t, dtype=torch.bool).triu(), (3, 0), value=1),  # the first frame sees none
}


class ToThePastAlone(Heads):
    """Frames do not see themselves, so that the first sees nothing: fused attention gives zeros there."""

    def __init__(self, tokens: bool = False, lowest: float | None = None) -> None:
        super().__init__()
        self.tokens, self.lowest = parameter(1, 2, 3, 2) if tokens else None, lowest

    def attend(self, q, k, v):
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(-1)
        if self.lowest is not None:
            mask = torch.where(mask, 0.0, self.lowest)
        if self.tokens is not None:
            k, v = (torch.cat([self.tokens.expand(len(q), -1, -1, -1), x], 2) for x in (k, v))
            mask = F.pad(mask, (3, 0), value=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class BehindAToken(Heads):
    """Queries and keys alike begin with an entry of their own: one longer stream attends to itself."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.token = fused, parameter(1, 2, 1, 2)

    def attend(self, q, k, v):
        if self.fused:
            q, k, v = (F.pad(x, (0, 0, 1, 0)) for x in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=~later(q.shape[2]))
        else:
            q, k, v = (torch.cat([self.token.expand(len(x), -1, -1, -1), x], 2) for x in (q, k, v))
            y = (q @ k.mT / 2).masked_fill(later(q.shape[2]), -torch.inf).softmax(-1) @ v
        return y[:, :, 1:]


class SinkScores(Heads):
    """A score beside those of the keys that takes weight away from them."""

    def attend(self, q, k, v):
        scores = (q @ k.mT / 2).masked_fill(later(q.shape[2]), -torch.inf)
        sinks = self.out.bias[:2].view(1, 2, 1, 1).expand(len(q), 2, q.shape[2], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


class Beside(nn.Module):
    """The keys and values that `nn.MultiheadAttention` can add to those of the frames."""

    def __init__(self, weights: bool, **options) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(4, 2, batch_first=True, **options), weights

    def forward(self, x):
        return self.attention(x, x, x, attn_mask=later(x.shape[1]), need_weights=self.weights)[0]


SAMPLES = [
    attention("keys_first", KeysFirst),
    attention("turned_mask", TurnedMask),
    *(
        attention(f"to_memory_too_{name}", lambda m=mask: ToMemoryToo(m), unbounded=name != "band")
        for name, mask in MASKS_OF_MEMORY.items()
    ),
    attention("to_the_past_alone", ToThePastAlone),
    attention("to_the_past_alone_added", lambda: ToThePastAlone(lowest=-torch.inf)),
    attention("to_the_past_alone_or_tokens", lambda: ToThePastAlone(tokens=True)),
    # where all keys have the same low score the first frame reads them all
    Sample("attention_to_the_past_or_all", lambda: ToThePastAlone(lowest=-1e30), (2, 9, 4), 1, kind="clip"),
    attention("of_a_token_and_frames", lambda: BehindAToken(fused=False), before=1),
    attention("of_padded_frames", lambda: BehindAToken(fused=True), before=1),
    attention("sink_scores", SinkScores),
    attention("bias_kv", lambda: Beside(False, add_bias_kv=True)),
    attention("zero_attn", lambda: Beside(False, add_zero_attn=True)),
    attention("bias_kv_and_zero_attn", lambda: Beside(True, add_bias_kv=True, add_zero_attn=True)),
    attention("skewed", Skewed),
    banded("skewed_band", lambda: Skewed(back=3)),
    banded("skewed_both_ways", lambda: SkewedBothWays(ahead=2, back=3)),
    attention("skewed_table", SkewedTable),
    Sample("attention_skewed_over_the_clip", lambda: Skewed(ahead=None), (2, 9, 4), 1, kind="clip"),
    Sample("attention_skewed_past_its_distances", lambda: Skewed(ahead=1, back=3), (2, 9, 4), 1, kind="clip"),
    attention("assigned_mask", AssignedMask),
    attention("retention", Retention),
    attention("matrix_memory", MatrixMemory),
    attention("state_space_dual", StateSpaceDual),
    attention("state_space_stable", StateSpaceStable),
    attention("flag", Heads),
    attention("tril", ByTril),
    attention("buffer", ByBuffer),
    attention("added_mask", ByAddition),
    attention("lowest_number", ByLowest),
    attention("alibi", Alibi),
    attention("rotary", Rotary),
    attention("buckets", Buckets),
    attention("relative_table", RelativeTable),
    banded("band", lambda: Band(3, 0)),
    banded("look_ahead", lambda: Band(2, 2), multiple=1),
    banded("chunks", Chunks, exact=False, lag=2),
    attention("grouped_queries", Grouped, (2, 9, 8)),
    attention("multihead", Multihead),
    attention("multihead_weights", lambda: Multihead(weights=True)),
    attention("multihead_time_first", lambda: Multihead(batch_first=False), (9, 2, 4), time_dim=0, batch_dim=1),
    attention("encoder_post_norm", lambda: Encoder(2, norm_first=False)),
    attention("encoder_pre_norm", lambda: Encoder(3, norm_first=True, activation="gelu")),
    attention("linear", LinearAttention),
    attention("softmax_by_hand", BySteadySoftmax),
    banded("conv_around", ConvBetween),
    attention("half_rate", Downsampled, (2, 4, 10), time_dim=2, multiple=2),
    attention("sinks", Sinks),
    attention("keys_that_convolve", KeysThatConvolve),
    attention("double", Heads, dtype=torch.float64),
]
