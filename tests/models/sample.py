"""What a test net is: a plain PyTorch module, the inputs it takes and the equivalence it has to stream with."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["stream", "clip", "prefix", "first-clip"]
Shape = tuple[int, ...]
Draw = Callable[[Shape, torch.Generator], Tensor]


@dataclass(frozen=True)
class Sample:
    """One net of the collection.

    A *step* is one frame of the slowest input; a faster input has ``rates[i]`` frames per step. Lengths are in steps.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: Shape | Sequence[Shape]
    """The example's shapes (one tuple, or one per input); their time sizes are the clip length and the rates."""
    time_dim: int | tuple[int | None, ...] = 2
    kind: Kind | tuple[Kind, ...] = "stream"
    """The equivalence, of every output or one per output."""
    or_kind: Kind | None = None
    """Another equivalence that is as true and may be declared instead."""
    length: int = 0
    """Steps in the test stream (default: 2 T + 5), different from the example's."""
    multiple: int = 1
    """The net takes only lengths that are multiples of this."""
    dtype: torch.dtype = torch.float32
    output_time_dim: int | None | tuple[int | None, ...] | Literal["same"] = "same"
    """Where each output has its time axis (``None``: nowhere), by default where the first timed input has it."""
    batch_dim: int | None = 0
    draws: Mapping[int, Draw] = field(default_factory=dict)
    """How to draw input i, where it is not standard normal."""
    stride: int = 1
    """Steps between the outputs of a Window net."""
    unbounded: bool | tuple[bool, ...] = False
    """The receptive field is infinite, of every output or one by one."""
    exact: bool = True
    """The declared receptive field is the measured one, not only a bound of it."""
    lag: int = 0
    """Steps by which outputs may come later than the earliest possible, for the sake of a periodic schedule."""
    grows: bool = False
    """Everything that came before is kept: the state grows with the stream, by a half at a time."""
    before: int = 0
    """Entries of its own that the net puts before the frames, and keeps with them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments for ``cofx.compile``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", self.whole(self.length or 2 * self.clip_length + 5))

    @property
    def input_shapes(self) -> list[Shape]:
        nested = not isinstance(self.shapes[0], int)
        return [tuple(s) for s in self.shapes] if nested else [tuple(self.shapes)]  # type: ignore[arg-type]

    @property
    def time_dims(self) -> list[int | None]:
        """One time axis per input, counted from the front."""
        shapes = self.input_shapes
        dims = self.time_dim if isinstance(self.time_dim, tuple) else (self.time_dim,) * len(shapes)
        return [d if d is None else d % len(s) for d, s in zip(dims, shapes, strict=True)]

    @property
    def stack_dim(self) -> int:
        """The time axis of the first input that has one."""
        return next(d for d in self.time_dims if d is not None)

    @property
    def clip_length(self) -> int:
        return min(s[d] for s, d in zip(self.input_shapes, self.time_dims, strict=True) if d is not None)

    @property
    def rates(self) -> list[int]:
        """Frames per step of each input (0: the input has no time)."""
        pairs = zip(self.input_shapes, self.time_dims, strict=True)
        return [0 if d is None else s[d] // self.clip_length for s, d in pairs]

    @property
    def batch(self) -> int:
        return 1 if self.batch_dim is None else self.input_shapes[0][self.batch_dim]

    def whole(self, steps: int) -> int:
        """The least length the net takes that is no shorter than this."""
        return -(-steps // self.multiple) * self.multiple

    def output_time_dims(self, count: int) -> list[int | None]:
        dims = self.stack_dim if self.output_time_dim == "same" else self.output_time_dim
        return list(dims) if isinstance(dims, tuple) else [dims] * count

    def kinds(self, count: int) -> list[Kind]:
        return list(self.kind) if isinstance(self.kind, tuple) else [self.kind] * count

    def is_unbounded(self, i: int) -> bool:
        return self.unbounded[i] if isinstance(self.unbounded, tuple) else self.unbounded

    def model(self) -> nn.Module:
        """The net in eval mode, with the same random parameters and running statistics each time."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = self.build().to(self.dtype).eval()
            for parameter in model.parameters():  # norms start at 1 and 0, which would hide many mistakes
                if parameter.is_floating_point() and parameter.numel() and (parameter == parameter.flatten()[0]).all():
                    parameter += 0.3 * torch.randn_like(parameter)
            for module in model.modules():
                if isinstance(getattr(module, "running_mean", None), Tensor):
                    module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr, operator]
                    module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
        return model

    def inputs(self, steps: int, seed: int = 0, batch: int | None = None, scale: float = 1.0) -> list[Tensor]:
        """A stream of so many steps, the same for the same seed."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + seed)
        clips = []
        for i, (shape, dim, rate) in enumerate(zip(self.input_shapes, self.time_dims, self.rates, strict=True)):
            sizes = list(shape)
            if dim is not None:
                sizes[dim] = steps * rate
            if batch is not None and self.batch_dim is not None:
                sizes[self.batch_dim] = batch
            if i in self.draws:
                clips.append(self.draws[i](tuple(sizes), generator))
            else:
                clips.append((torch.randn(sizes, generator=generator) * scale).to(self.dtype))
        return clips

    def steps(self, clips: Sequence[Tensor]) -> int:
        """How many steps these inputs are."""
        triples = zip(clips, self.time_dims, self.rates, strict=True)
        return next(clip.shape[d] // rate for clip, d, rate in triples if d is not None)

    def chunk(self, clips: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        """Steps start..stop of each input, as ``forward_steps`` takes them."""
        return [
            x if d is None else x.narrow(d, start * r, (stop - start) * r).contiguous()
            for x, d, r in zip(clips, self.time_dims, self.rates, strict=True)
        ]

    def frames(self, clips: Sequence[Tensor], step: int) -> list[Tensor]:
        """One step of each input, as ``forward_step`` takes it: no time axis, unless the input has several frames."""
        dims = zip(self.chunk(clips, step, step + 1), self.time_dims, self.rates, strict=True)
        return [x.squeeze(d) if r == 1 and d is not None else x for x, d, r in dims]


class Net(nn.Module):
    """A net in one line: ``Net(lambda m, x: m.conv(x) + x, conv=nn.Conv1d(...))``."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Net2(Net):
    """The same with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y)


def integers(high: int) -> Draw:
    """Draws tokens 0..high-1."""
    return lambda shape, generator: torch.randint(high, shape, generator=generator)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.5)
