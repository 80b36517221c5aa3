"""The contract's own test: it accepts a slow oracle, and rejects each way to be wrong by the check meant for it."""

import math

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from contract import CHECKS, ContractError, check_contract, compile_case, run_check
from models import SAMPLES, Sample
from models.sample import Net
from oracle import Oracle
from streaming import spoil

NAMES = {sample.name: sample for sample in SAMPLES}
CONV = Sample("conv", lambda: nn.Conv1d(2, 3, 4, padding=1), (2, 2, 9))
MEAN = Sample("mean", lambda: Net(lambda m, x: m.conv(x).mean(2), conv=nn.Conv1d(2, 3, 3)), (2, 2, 6), kind="clip",
              output_time_dim=None)  # fmt: skip
MEMORY = Sample("memory", lambda: Net(lambda m, x: m.memory(x)[1][0], memory=nn.GRU(2, 3, batch_first=True)), (2, 6, 2),
                time_dim=1, kind="prefix", output_time_dim=None)  # fmt: skip


class WrongFirstFrame(Oracle):
    def advance(self, chunk, *arguments, **options):
        output = super().advance(chunk, *arguments, **options)
        if not self.sent and output is not None:
            self.sent = True
            output = pytree.tree_map(lambda leaf: leaf * 1.01, output)
        return output

    def clean_state(self):
        super().clean_state()
        self.sent = False


class OneFrameLate(Oracle):
    def __init__(self, sample):
        super().__init__(sample)
        self.due = {i: [due + 1 for due in dues] for i, dues in self.due.items()}
        for i, dues in self.due.items():
            self.outputs[i].delay = dues[0]


class TooEarly(Oracle):
    """Guesses what comes: right in the middle of the stream only if the guess is."""

    def __init__(self, sample):
        super().__init__(sample)
        self.due = {i: [max(0, due - 1) for due in dues] for i, dues in self.due.items()}


class ChunkLosesFrame(Oracle):
    def forward_steps(self, *chunk, **options):
        output = super().forward_steps(*chunk, **options)
        return output if output is None or output.shape[2] < 3 else output[:, :, 1:]


class ChunkWithoutTimeAxis(Oracle):
    def forward_steps(self, *chunk, **options):
        output = super().forward_steps(*chunk, **options)
        return output.squeeze(2) if output is not None and output.shape[2] == 1 else output


class FlushLosesTail(Oracle):
    def flush(self):
        super().flush()


class FlushEndsStream(Oracle):
    def flush(self):
        output = super().flush()
        self.state = {name: tensor * 0 for name, tensor in self.state.items()}
        return output


class PadEndLeavesTrace(Oracle):
    def forward_steps(self, *chunk, pad_end=False, update_state=True):
        output = super().forward_steps(*chunk, pad_end=pad_end, update_state=update_state)
        if pad_end:
            self.state = {name: tensor * 0 for name, tensor in self.state.items()}
        return output


class StepLeavesTrace(Oracle):
    def forward_step(self, *frames, update_state=True):
        return super().forward_step(*frames)


class EndedPeekLeavesTrace(Oracle):
    def forward_steps(self, *chunk, pad_end=False, update_state=True):
        return super().forward_steps(*chunk, pad_end=pad_end, update_state=update_state or pad_end)


class OfflineLeavesTrace(Oracle):
    def __call__(self, *clips):
        self.clean_state()
        return super().__call__(*clips)


class WrongOffline(Oracle):
    def __call__(self, *clips):
        return super().__call__(*clips) + 1e-3


class CleanKeepsOneFrame(Oracle):
    def clean_state(self):
        self.state = {name: tensor[:, :, -1:] for name, tensor in getattr(self, "state", {}).items()}


class LiveSnapshot(Oracle):
    """One buffer, written in place; the snapshot is that buffer."""

    def advance(self, chunk, pad_end, update_state, single=False):
        before = dict(self.state)
        output = super().advance(chunk, pad_end, update_state, single)
        for name in before if update_state else ():
            kept = before[name]
            kept.resize_(self.state[name].shape).copy_(self.state[name])
            self.state[name] = kept
        return output

    def get_state(self):
        return dict(self.state)


class LiveRestore(Oracle):
    def set_state(self, state):
        self.state = dict(state)


class PoisonedStart(Oracle):
    """A buffer that is read before it was written, and multiplied by nought."""

    def clean_state(self):
        old = getattr(self, "state", {})
        self.state = {"buffer": old.get("buffer", torch.zeros(()))}

    def advance(self, chunk, *arguments, **options):
        buffer = self.state["buffer"]
        chunk = [x + 0 * buffer for x in chunk]
        output = super().advance(chunk, *arguments, **options)
        self.state.setdefault("buffer", buffer)
        return output


class OldFramesShow(Oracle):
    """NaN of the stream before is still there after clean_state."""

    def clean_state(self):
        old = self.clips() if getattr(self, "state", None) else []
        self.remains = 0 * old[0].sum() if old else 0

        super().clean_state()

    def advance(self, chunk, *arguments, **options):
        return super().advance([x + self.remains for x in chunk], *arguments, **options)


class FixedBatch(Oracle):
    def advance(self, chunk, *arguments, **options):
        output = super().advance(chunk, *arguments, **options)
        return None if output is None else output[: self.sample.batch]


class OutputsShareMemory(Oracle):
    def forward_step(self, *frames, **options):
        output = super().forward_step(*frames, **options)
        if output is not None:
            self.memory = getattr(self, "memory", output)
            output = self.memory.copy_(output) if self.memory.shape == output.shape else output
        return output


class KeepsFrame(Oracle):
    """Holds the newest frame by reference until the next call."""

    def advance(self, chunk, pad_end, update_state, single=False):
        kept = [x if x.shape[2] == 1 else None for x in chunk]
        for tensor in self.state.values():
            if (late := getattr(self, "late", None)) is not None and tensor.shape[2]:
                tensor[:, :, -1:] = late
        output = super().advance(chunk, pad_end, update_state, single)
        if update_state:
            self.late = kept[0]
        return output

    def clean_state(self):
        super().clean_state()
        self.late = None


class ModifiesFrame(Oracle):
    def forward_step(self, *frames, **options):
        output = super().forward_step(*frames, **options)
        for frame in frames:
            frame.mul_(2)
        return output


class WrongStructure(Oracle):
    def forward_step(self, *frames, **options):
        output = super().forward_step(*frames, **options)
        return output if output is None else (output,)


class RaggedRank(Oracle):
    def forward_step(self, *frames, **options):
        output = super().forward_step(*frames, **options)
        return output.unsqueeze(2) if output is not None and self.sample.steps(self.clips()) > 6 else output


class MeanOfAll(Oracle):
    """A running mean where the mean of the last clip is meant."""

    def window_frames(self, i, clips, t):
        self.outputs[i].equivalence = "prefix"
        frames = super().window_frames(i, clips, t)
        self.outputs[i].equivalence = "clip"
        return frames


def declares(**values):
    """An oracle whose first output declares something else."""

    class Declares(Oracle):
        def __init__(self, sample):
            super().__init__(sample)
            for name, value in values.items():
                setattr(self.outputs[0], name, value)

    return Declares


MUTANTS = [
    (CONV, WrongFirstFrame, "steps"), (CONV, WrongFirstFrame, "chunks"), (MEAN, WrongFirstFrame, "steps"),
    (CONV, OneFrameLate, "latency"), (CONV, TooEarly, "steps"),
    (CONV, ChunkLosesFrame, "chunks"), (CONV, ChunkWithoutTimeAxis, "chunks"),
    (CONV, FlushLosesTail, "flush"), (CONV, FlushEndsStream, "flush"), (CONV, PadEndLeavesTrace, "flush"),
    (CONV, StepLeavesTrace, "purity"), (CONV, EndedPeekLeavesTrace, "purity"), (CONV, OfflineLeavesTrace, "purity"),
    (MEAN, StepLeavesTrace, "purity"), (CONV, WrongOffline, "offline"), (CONV, CleanKeepsOneFrame, "clean"),
    (CONV, LiveSnapshot, "snapshot"), (CONV, LiveRestore, "snapshot"), (CONV, PoisonedStart, "poison"),
    (CONV, OldFramesShow, "poison"), (CONV, FixedBatch, "batch"), (CONV, OutputsShareMemory, "aliasing"),
    (CONV, KeepsFrame, "aliasing"), (CONV, ModifiesFrame, "aliasing"), (CONV, WrongStructure, "steps"),
    (CONV, RaggedRank, "steps"), (MEAN, MeanOfAll, "steps"), (CONV, declares(delay=1), "attributes"),
    (CONV, declares(stride=2), "attributes"), (CONV, declares(equivalence="clip"), "attributes"),
    (CONV, declares(receptive_field=3), "receptive_field"), (CONV, declares(receptive_field=5), "receptive_field"),
    (CONV, declares(receptive_field=math.inf), "receptive_field"), (MEAN, declares(delay=2), "attributes"),
    (MEMORY, declares(delay=6), "steps"),
]  # fmt: skip


@pytest.mark.parametrize("name", [
    "conv1d_valid", "conv1d_beyond_reach", "conv_unbatched", "transposed1d_gaps", "unet_pooled", "inputs_slow_and_fast",
    "inputs_condition", "outputs_nested", "recurrent_gru_with_hidden", "window_mean_of_conv", "window_encoder",
    "first_clip_padded_conv", "fold_tokens", "bfloat16_residual",
])  # fmt: skip
def test_accepts_the_oracle(name):
    with torch.no_grad():
        check_contract(NAMES[name], step=Oracle(NAMES[name]))


@pytest.mark.parametrize(("sample", "mutant", "check"), MUTANTS)
def test_rejects(sample, mutant, check):
    with torch.no_grad():
        case = compile_case(sample, step=mutant(sample))
    with pytest.raises(ContractError, match=f"{sample.name}, {check}: "):
        run_check(case, check)


def test_every_check_can_fail():
    assert {check for _, _, check in MUTANTS} == set(CHECKS)


def test_message_names_model_check_and_step():
    with torch.no_grad():
        case = compile_case(CONV, step=WrongFirstFrame(CONV))
    with pytest.raises(ContractError, match=r"^conv, steps: forward_step of frame 2: output 0, its frame 0, diff"):
        run_check(case, "steps")


def test_takes_a_module_and_an_example():
    model, clip = nn.Conv1d(2, 3, 3).eval(), torch.randn(1, 2, 8)
    sample = Sample("Conv1d", lambda: model, (1, 2, 8))
    with torch.no_grad():
        check_contract(model, clip, step=Oracle(sample, model))


def test_spoiled_integers_differ():
    tokens = torch.ones(3, dtype=torch.long)
    spoil(tokens)
    assert tokens.sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.name != "first_clip_squeezed_blocks"], ids=lambda s: s.name)
def test_every_sample_is_what_it_says(sample):
    """The collection is not wrong about its nets: the oracle, which knows nothing but the module, passes."""
    with torch.no_grad():
        check_contract(sample, step=Oracle(sample))
