"""Scores and weights of one head from those of all: a convolution of single entries over heads (talking heads)."""

from __future__ import annotations

import torch
from torch import nn

from ..layout import dim
from ..registry import Call, Fact, Pair, Sample, overloads, pair_rule
from .pairs import make


@pair_rule(*overloads("conv2d.default"))
def over_heads(call: Call) -> Fact:
    """Each entry of each head is a sum over the heads' entries for the same two frames."""
    args = call.samples[0]
    fact = call.facts[args["input"]]
    call.require(isinstance(fact, Pair) and call.node.all_input_nodes[0] is args["input"], "a kernel of pairs")
    assert isinstance(fact, Pair)
    x, kernel = fact.value, args["weight"].meta["val"].shape
    ones = all(s == 1 for s in (*kernel[2:], *call.arg("stride", [1]))) and not any(call.arg("padding", [0]))
    call.require(ones and len(x.layout) == 4, "a convolution over pairs of frames")
    call.require({x.layout.time, x.layout.key} == {2, 3}, "a convolution over pairs of frames")
    return make(call, x.layout.replace(1, dim(kernel[0])), [x], nodes=[args["input"]], rows=x)


class _TalkingHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.scores, self.weights = nn.Linear(4, 12), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 4): causal attention of two heads, mixed before and after the softmax."""
        q, k, v = (y.unflatten(-1, (2, 2)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = self.scores(q @ k.transpose(2, 3))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = self.weights(scores.masked_fill(mask, -1e9).softmax(-1))
        return (weights @ v).transpose(1, 2).flatten(2)


SAMPLES = [Sample("talking_heads", _TalkingHeads, (2, 9, 4), 1, unbounded=True)]
