"""Faults that were found, each as the smallest net that shows it."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cofx


class Of(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


X = torch.randn(1, 3, 30, generator=torch.Generator().manual_seed(0))


def test_a_table_that_runs_out_is_an_error_and_the_stream_is_unharmed() -> None:
    model = Of(lambda m, x: x + m.table.weight.t()[:, : x.shape[2]], table=nn.Embedding(12, 3))
    step = cofx.compile(model, X[:, :, :8])
    step.forward_steps(X[:, :, :11])
    with pytest.raises(cofx.InputError, match="table"):
        step.forward_steps(X[:, :, 11:14])
    torch.testing.assert_close(step.forward_step(X[:, :, 11]), model(X[:, :, :12])[:, :, 11])


def test_an_end_at_which_the_model_does_otherwise_is_refused() -> None:
    """Nearest interpolation back to the input's length repeats whole frames only at even lengths."""
    model = Of(lambda m, x: F.interpolate(m.conv(x), size=x.shape[2]), conv=nn.Conv1d(3, 3, 3, 2, 1))
    step = cofx.compile(model, X[:, :, :20])
    step.forward_steps(X[:, :, :21])
    with pytest.raises(cofx.InputError, match="cannot end here"):
        step.flush()
    rest = step.forward_steps(X[:, :, 21:24], pad_end=True)
    torch.testing.assert_close(rest, model(X[:, :, :24])[:, :, -rest.shape[2] :])


@pytest.mark.parametrize(
    "draw",
    [
        lambda m, x: F.dropout(x, 0.5, training=True),
        lambda m, x: x + torch.randn_like(x),
        lambda m, x: x + torch.rand(x.shape),
        lambda m, x: torch.normal(x, 1.0),
    ],
)
def test_random_numbers_are_refused(draw) -> None:
    with pytest.raises(cofx.RefusedError, match="random numbers"):
        cofx.compile(Of(draw), X)


def test_a_word_that_does_not_fit_says_so() -> None:
    with pytest.raises(cofx.NonLocalError, match="'prefix' was asked for"):
        cofx.compile(nn.Conv1d(3, 3, 3), X, equivalence="prefix")


def test_nothing_compared_is_not_exact() -> None:
    step = cofx.compile(nn.AdaptiveAvgPool1d(1), X)
    with pytest.raises(cofx.InputError, match="nothing was compared"):
        step.verify(X[:, :, :5])


def test_a_slope_for_each_channel_is_no_table() -> None:
    model = nn.Sequential(nn.PReLU(3), nn.Conv1d(3, 3, 3, padding=1))
    model[0].weight.copy_(torch.rand(3))
    assert cofx.compile(model, X[:, :, :9]).verify(X).exact


def test_frames_cut_off_before_padding_are_waited_for() -> None:
    model = Of(lambda m, x: m.conv(x[:, :, :-1]), conv=nn.Conv1d(3, 3, 1, padding=2))
    assert cofx.compile(model, X[:, :, :9]).verify(X).exact


def test_a_condition_expanded_along_time_streams() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = nn.Linear(2, 3), nn.Conv1d(6, 3, 3, padding=1)

        def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.cat([x, self.embed(c)[:, :, None].expand(-1, -1, x.shape[2])], 1))

    condition = torch.randn(1, 2)
    step = cofx.compile(Conditioned(), (X[:, :, :9], condition), time_dim=(2, None))
    assert step.equivalence == "stream" and step.verify(X, condition).exact


@pytest.mark.parametrize("other", [lambda x: x * 2, lambda x: x + 2])
def test_a_branch_on_the_length_that_the_trace_did_not_take_is_an_error(other) -> None:
    model = Of(lambda m, x: x + 1 if x.shape[2] < 20 else other(x))
    step = cofx.compile(model, X[:, :, :8])
    torch.testing.assert_close(step.forward_steps(X[:, :, :19]), model(X[:, :, :19]))
    with pytest.raises(cofx.InputError, match="more than 19 frames"):
        step.forward_steps(X[:, :, 19:])
    assert cofx.compile(model, X[:, :, :24]).verify(X).exact


def test_padding_to_a_length_that_strides_divide_streams() -> None:
    """The number of frames to add is computed with ``int(math.ceil(...))``: a constant, for the trace."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[2]
        steps = int(math.ceil((length - 8) / 16)) + 1
        return m.up(m.down(F.pad(x, (0, (steps - 1) * 16 + 8 - length))))[:, :, :length]

    model = Of(forward, down=nn.Conv1d(3, 3, 8, 16), up=nn.ConvTranspose1d(3, 3, 16, 16))
    step = cofx.compile(model, torch.randn(1, 3, 64))
    assert step.equivalence == "stream" and step.verify(torch.randn(1, 3, 192)).exact


def test_strides_that_divide_only_long_lengths_stream() -> None:
    model = Of(lambda m, x: m.up(m.down(x))[:, :, : x.shape[2]], down=nn.Conv1d(3, 3, 64, 64),
               up=nn.ConvTranspose1d(3, 3, 64, 64))  # fmt: skip
    step = cofx.compile(model, torch.randn(1, 3, 128))
    assert step.equivalence == "stream" and step.verify(torch.randn(1, 3, 384)).exact


def test_values_that_follow_from_numbers_alone_are_known_while_tracing() -> None:
    """``x.mean(torch.arange(1, x.dim() - 1).tolist())``, and masks made of lengths."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        axes = torch.arange(1, x.dim() - 1).tolist()
        lengths = torch.full((x.shape[0],), 3)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return m.conv(x - x.mean(axes, keepdim=True)) * mask[:, :, None]

    assert cofx.compile(Of(forward, conv=nn.Conv1d(3, 3, 3, padding=1)), X).verify(X).exact


@pytest.mark.parametrize("value", [lambda x: x.sum(), lambda x: torch.rand(1)])
def test_a_value_that_follows_from_the_input_or_chance_is_not_known(value) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(2)
        total[0] = value(x)
        return x if total.sum() > 0.5 else -x

    with pytest.raises(cofx.CaptureError):
        cofx.compile(Of(forward), X)


def test_an_error_of_a_submodule_may_be_caught() -> None:
    class Layer(nn.Conv1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        try:
            return m.layer(x, lengths=None)
        except TypeError:
            return m.layer(x)

    assert cofx.compile(Of(forward, layer=Layer(3, 3, 3)), X).verify(X).exact


def test_tracing_that_fails_says_nothing_but_its_error(capfd) -> None:
    with pytest.raises(cofx.CaptureError):
        cofx.compile(Of(lambda m, x: x if x.sum() > 0 else -x), X)
    assert capfd.readouterr().err == ""


def test_a_stride_that_is_kept_as_a_buffer_is_known() -> None:
    """The number of frames to pad with is computed from it (transformers' Encodec and Mimi)."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 5, 2)
            self.register_buffer("stride", torch.tensor(2))
            self.register_buffer("more", torch.tensor(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            frames = torch.ceil((x.shape[2] - 5 + self.more) / self.stride).to(torch.int64)
            extra = frames * self.stride + 5 - self.more - x.shape[2]
            left, right = self.more, extra
            return self.conv(F.pad(x, (left, right)))

    step = cofx.compile(Padded(), X[:, :, :16])
    assert step.equivalence == "stream" and step.verify(X).exact


def test_a_mask_made_of_lengths_of_a_batch_is_right_at_other_batch_sizes() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.ones(x.shape[0]) * x.shape[2]
        mask = torch.arange(x.shape[2]).expand(len(lengths), x.shape[2]) < lengths[:, None]
        return m.conv(x) * mask[:, None]

    model = Of(forward, conv=nn.Conv1d(3, 3, 3, padding=1))
    for batch in (1, 3):
        assert cofx.compile(model, X.expand(batch, -1, -1)).verify(X.expand(batch, -1, -1)).exact


def test_a_branch_on_a_flag_that_is_kept_as_a_buffer_is_taken() -> None:
    """Quantizers ask ``if self.initialised``; vocoders assert that their windows overlap."""

    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ready", torch.tensor([1.0]))
            self.register_buffer("window", torch.hann_window(8) + 0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert (self.window.square() > 1e-3).all()
            return x * self.window.sum() if self.ready else x

    model = Flagged()
    step = cofx.compile(model, X)
    assert step.verify(X).exact
    model.window.mul_(2)
    with pytest.raises(cofx.CompileError, match="'window' has changed"):
        step.clean_state()
    assert cofx.compile(model, X).verify(X).exact


def test_a_buffer_whose_value_decides_nothing_may_change() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((1, 3, 1), 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale.square()

    model = Scaled()
    step = cofx.compile(model, X)
    model.scale.mul_(2)
    step.refresh()
    assert step.verify(X).exact


def test_forward_that_writes_to_a_buffer_leaves_it_as_it_was() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return x if self.seen > 0 else -x

    model = Counts()
    with pytest.raises(cofx.CaptureError):
        cofx.compile(model, X)
    assert model.seen == 0


def test_a_forward_that_takes_further_arguments_is_given_none() -> None:
    class Open(nn.Module):
        def forward(self, x: torch.Tensor, *more: torch.Tensor, **options: object) -> torch.Tensor:
            return x + len(more)

    assert cofx.compile(Open(), X).verify(X).exact


def test_the_bytes_of_a_state_that_needs_no_warm_up() -> None:
    step = cofx.compile(nn.Conv1d(3, 4, 3), torch.randn(1, 3, 20))
    step.forward_step(torch.randn(1, 3))
    kept = [t for name, t in step.get_state().items() if name.startswith("state_")]
    assert step.report().state_bytes == sum(t.numel() * t.element_size() for t in kept) == 24


def in_lanes(step: cofx.StepModule, x: torch.Tensor, length: int) -> torch.Tensor:
    """All that a stream gives as a lane, a period at a time, its end told with its last frames."""
    period, parts = step.compiled.plan.schedule.period, []
    for t in range(0, length + 40, period):
        chunk = torch.full((1, x.shape[1], period), torch.nan)
        there = x[:, :, t : min(t + period, length)]
        chunk[:, :, : there.shape[2]] = there
        y, valid = step.forward_steps(chunk, ready=[True], length=[length if t + period >= length else -1])
        parts.append(y[:, :, valid[0]])
    return torch.cat(parts, 2)


def test_a_lane_does_not_end_where_the_model_does_otherwise() -> None:
    model = Of(lambda m, x: F.interpolate(m.conv(x), size=x.shape[2]), conv=nn.Conv1d(3, 3, 3, 2, 1))
    step = cofx.compile(model, X[:, :, :20])
    torch.testing.assert_close(in_lanes(step, X, 24), model(X[:, :, :24]))
    step.clean_state()
    with pytest.raises(cofx.InputError, match="lane 0: .*cannot end here"):
        in_lanes(step, X, 21)


def test_frames_before_the_first_do_not_come_the_short_way() -> None:
    """A second stream takes the steps that the first has made, and has to wait as it did."""
    model = Of(lambda m, x: x.tanh()[:, :, 1:-3])
    step = cofx.compile(model, X[:, :, :9])
    for _ in range(2):
        got = [step.forward_step(X[:, :, t]) for t in range(8)]
        assert [y is None for y in got] == [True] * 4 + [False] * 4
        step.clean_state()


@pytest.mark.parametrize("mode", ["replicate", "reflect"])
def test_a_pad_of_a_pad_at_the_end_of_a_lane(mode: str) -> None:
    """The frame that is repeated lies as far back as both pads together."""
    model = Of(lambda m, x: F.pad(F.pad(x, (0, 1), mode=mode), (0, 2), mode=mode))
    torch.testing.assert_close(in_lanes(cofx.compile(model, X[:, :, :9]), X, 14), model(X[:, :, :14]))


def test_two_slices_on_one_line_follow_the_length() -> None:
    """At different rates, in a model whose length is fixed in the trace."""

    def cut(x: torch.Tensor, end: int, step: int) -> torch.Tensor:
        return x[:, :, : x.shape[2] - end : step]

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        F.pad(cut(x, 2, 1), (0, 0), mode="replicate")  # fixes it
        return F.max_pool1d(cut(m.conv(x), 3, 2), 3, 1)

    model = Of(forward, conv=nn.Conv1d(3, 3, 2, 2, 4, 2))
    step = cofx.compile(model, X[:, :, :13])
    for length in (19, 26, 27):
        step.clean_state()
        torch.testing.assert_close(step.forward_steps(X[:, :, :length], pad_end=True), model(X[:, :, :length]))


def test_an_example_that_is_part_of_a_longer_clip() -> None:
    """torch.export takes the strides of such a tensor, and with them its length, for fixed."""
    model = Of(lambda m, x: x + m.table.weight.t()[:, : x.shape[2]], table=nn.Embedding(14, 3))
    step = cofx.compile(model, X[:, :, :12])
    torch.testing.assert_close(step.forward_steps(X[:, :, :14]), model(X[:, :, :14]))


def test_lane_programs_outlive_a_clean_state() -> None:
    step = cofx.compile(nn.Conv1d(3, 4, 3, padding=1), X[:, :, :9])
    step.forward_step(X[:, :, 0], ready=[True])
    programs = step._programs()
    step.clean_state()
    assert step._programs() is programs
    with torch.no_grad():
        step.model.weight.mul_(2)
    step.clean_state()
    torch.testing.assert_close(in_lanes(step, X, 9), step.model(X[:, :, :9]))


def test_an_output_whose_frames_lie_among_the_batch_is_given_for_clips() -> None:
    """Four frames make one row, so that longer clips have more rows than there are streams (Crepe)."""
    model = Of(lambda m, x: m.head(x.transpose(1, 2).reshape(-1, 12)), head=nn.Linear(12, 2))
    step = cofx.compile(model, X[:, :, :4])
    assert step.equivalence == "clip"
    assert step.verify(X[:, :, :9]).exact


def test_a_size_computed_in_floating_point_may_grow_with_the_length() -> None:
    """Two frames for every three, counted as torchaudio's resampling counts them."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        frames = m.conv(x).transpose(1, 2).reshape(x.shape[0], -1)
        return frames[:, : torch.ceil(torch.as_tensor(2 * x.shape[2] / 3)).long()]

    step = cofx.compile(Of(forward, conv=nn.Conv1d(3, 2, 6, 3, padding=3)), X[:, :, :12])
    assert step.equivalence == "stream"
    assert step.verify(X[:, :, :24]).exact
    with pytest.raises(cofx.InputError, match="cannot end here"):
        step.verify(X[:, :, :25])


def test_a_clip_begins_where_slower_frames_begin_also_those_that_were_sped_up_again() -> None:
    """Means of two frames, each given twice: a clip that begins between the two has others (Swin's windows)."""
    model = Of(lambda m, x: F.avg_pool1d(x, 2).repeat_interleave(2, 2).flip(2) * 2)
    step = cofx.compile(model, X[:, :, :8])
    assert (step.equivalence, step.stride) == ("clip", 2)
    assert step.verify(X[:, :, :14]).exact


def test_a_number_that_is_none_is_the_same_at_every_length() -> None:
    model = Of(lambda m, x: m.conv(torch.where(x > 1, torch.nan, x)).nan_to_num(), conv=nn.Conv1d(3, 2, 3))
    step = cofx.compile(model, X)
    assert step.equivalence == "stream" and step.verify(X).exact


def test_a_number_that_numpy_makes_of_the_length_is_none_of_a_stream() -> None:
    """The trace takes it for a constant: it was the traced clip's at every length."""
    model = Of(lambda m, x: x / torch.from_numpy(np.array([float(x.shape[2])], dtype=np.float32)))
    step = cofx.compile(model, X[:, :, :8])
    assert step.equivalence == "clip" and step.verify(X).exact


def test_positions_that_numpy_makes_stream() -> None:
    """The cumulative layer norm of Conv-TasNet counts its entries so."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        count = torch.from_numpy(np.arange(3, 3 * (x.shape[2] + 1), 3)).type(x.type())
        return x - x.sum(1).cumsum(1).div(count.view(1, -1).expand_as(x[:, 0])).unsqueeze(1)

    step = cofx.compile(Of(forward), X[:, :, :8])
    assert step.equivalence == "stream" and step.verify(X).exact


def test_spectra_back_to_the_length_of_the_input_end_anywhere() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        window = torch.hann_window(16)
        spectra = torch.stft(x, 16, 4, window=window, return_complex=True)
        return torch.istft(spectra * spectra.abs().sigmoid(), 16, 4, window=window, length=x.shape[-1])

    x = torch.randn(2, 99)
    step = cofx.compile(Of(forward), x[:, :64], time_dim=1)
    assert step.equivalence == "stream"
    assert all(step.verify(x[:, :n]).exact for n in (64, 97, 98, 99))


def test_a_length_that_is_rounded_up_to_strides_is_followed() -> None:
    """Demucs pads to a valid length: at lengths that are as far from one the model does the same."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[-1]
        frames = math.ceil((math.ceil((length - 8) / 4) + 1 - 8) / 4) + 1
        y = m.down(m.down(F.pad(x, (0, int(((frames - 1) * 4 + 8 - 1) * 4 + 8) - length))))
        for _ in range(2):
            y = m.up(y[..., : y.shape[-1]])
        return y[..., :length]

    model = Of(forward, down=nn.Conv1d(3, 3, 8, 4), up=nn.ConvTranspose1d(3, 3, 8, 4))
    step = cofx.compile(model, torch.randn(1, 3, 64))
    assert step.equivalence == "stream"
    assert all(step.verify(torch.randn(1, 3, n)).exact for n in (80, 128))


def test_a_net_with_too_many_phases_is_recomputed_over_clips() -> None:
    pools = nn.Sequential(*(nn.AvgPool1d(k, ceil_mode=True) for k in (125, 27, 11)))
    step = cofx.compile(Of(lambda m, x: m.conv(m.pools(x)).mean(2), pools=pools, conv=nn.Conv1d(3, 2, 3, padding=1)),
                        torch.randn(1, 3, 125 * 27 * 11 * 2))  # fmt: skip
    assert (step.equivalence, step.compiled.plan.schedule.period) == ("clip", 1)


@pytest.mark.parametrize("frames", [2, 3, 5, 8, 11])
def test_a_clip_that_is_padded_to_more_than_twice_its_length_is_flushed(frames: int) -> None:
    """Lengths that are rounded up repeat after as many frames as they are rounded to (Qwen3-Next's chunks)."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        y = F.pad(x, (0, 0, 2, 0))
        y = y[:, 2:] + 0.5 * y[:, 1:-1] + 0.2 * y[:, :-2]
        chunks = F.pad(y, (0, 0, 0, (8 - t % 8) % 8)).reshape(b, -1, 8, c)
        scores = (chunks @ chunks.transpose(-1, -2)).masked_fill(torch.ones(8, 8).triu(1) == 1, 0)
        return (scores @ chunks).reshape(b, -1, c)[:, :t]

    x = torch.randn(2, frames, 4)
    assert cofx.compile(Of(forward), x, time_dim=1).verify(x).exact


def test_what_is_assigned_to_part_of_a_tensor_of_the_clips_length_is_framewise() -> None:
    """A trace of one length has zeros of that length, beside which a frame is assigned."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        chunks = x.reshape(x.shape[0], -1, 8, x.shape[-1])
        state, out = torch.zeros(x.shape[0], 4, 4), torch.zeros_like(chunks)
        for i in range(chunks.shape[1]):
            out[:, i] = chunks[:, i] @ state + chunks[:, i]
            state = state + chunks[:, i].transpose(-1, -2) @ chunks[:, i]
        return out.reshape(x.shape)

    x = torch.randn(2, 8, 4)
    assert cofx.compile(Of(forward), x, time_dim=1).verify(x).exact


def test_the_last_frame_repeated_until_there_are_as_many_as_before() -> None:
    """How many that are follows from the length modulo the pool's; a state was as large as that expression (PANNs)."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = F.avg_pool1d(x, 4).repeat_interleave(4, -1)
        return torch.cat([y, y[..., -1:].repeat(1, 1, x.shape[-1] - y.shape[-1])], -1)

    step = cofx.compile(Of(forward), torch.randn(2, 3, 18))
    assert step.equivalence == "stream"
    assert all(step.verify(torch.randn(2, 3, n)).exact for n in (18, 34))


def test_running_sums_of_exponentials_of_complex_numbers() -> None:
    """Heinsen's scan by logarithms."""
    forward = lambda m, x: torch.view_as_complex(x).logcumsumexp(1).exp().real  # noqa: E731
    x = torch.randn(2, 9, 3, 2)
    assert cofx.compile(Of(forward), x, time_dim=1).equivalence == "stream"
    assert cofx.compile(Of(forward), x, time_dim=1).verify(x).exact
