"""That it streams: no work is done twice, and the state stays as large as it was.

A step model that keeps all frames and runs the whole net again would pass every check of the contract.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from streaming import Case, require

SPAN = 60  # steps: a multiple of every period in the collection


def warm_up(case: Case) -> int:
    """Steps until every output flows, in whole lengths of the net."""
    finite = [output.receptive_field for output in case.step.outputs if output.receptive_field < SPAN]
    return case.sample.whole(int(max([case.sample.clip_length, *finite])) + 1)


@contextlib.contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Counts operations; fused attention is switched off, since the counter does not know it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def offline_work(case: Case, steps: int) -> int:
    """Operations of the module for a clip."""
    with counted() as counter:
        case.model(*case.sample.inputs(steps))
    return counter.get_total_flops()


def check_work(case: Case) -> None:
    """Operations per step, averaged over whole periods past the warm-up, are at most the offline net's per step.

    What depends on a condition alone is allowed once per step: each step may bring another.
    """
    start = warm_up(case)
    short, long = offline_work(case, start + SPAN), offline_work(case, start + 2 * SPAN)
    offline = long - short
    if None in case.sample.time_dims:
        offline += SPAN * short - (start + SPAN) * (long - short)
    run = case.run(case.sample.inputs(start + SPAN)).steps_to(start)
    with counted() as counter:
        run.steps_to(start + SPAN)
    stepping = counter.get_total_flops()
    require(stepping <= offline, f"{stepping / SPAN:.1f} operations per step, offline {offline / SPAN:.1f}")


def check_state_size(case: Case, steps: int = 40) -> None:
    """Names, shapes and types of the state are those after the first step.

    Where everything that came before is needed, the state holds at most half as much again as was taken.
    """
    grows = case.sample.grows

    def sizes() -> dict[str, tuple[torch.Size | int, torch.dtype]]:
        state = case.step.get_state()
        return {name: (tensor.dim() if grows else tensor.shape, tensor.dtype) for name, tensor in state.items()}

    run = case.run(case.sample.inputs(steps)).steps_to(1)
    first = sizes()
    while run.position < steps:
        run.forward_step()
        require(sizes() == first, f"the state is {sizes()} after step {run.position}, {first} after the first")
        longest = max([0, *(size for tensor in case.step.get_state().values() for size in tensor.shape)])
        room = max(16, 1.5 * run.position) + case.sample.before
        require(not grows or longest <= room, f"the state holds {longest} frames after step {run.position}")
