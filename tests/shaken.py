"""A step model that is disturbed at random between and within its calls, by what must leave no trace.

`Shaken` has the surface of a step model. Before a call it may let the same call fail in its middle, run it without
keeping it, go astray and come back by a snapshot, exchange lanes through snapshots of their own, go through a file, or
move to another runtime; a lane's `start` may become a `clean_state` of that lane. What comes out must not change.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cofx.lanes import POSITION
from cofx.runtime import OnnxStep
from streaming import require


class Boom(Exception):
    """What a kernel raises here."""


class FailsAt(TorchDispatchMode):
    """Every op from a number on raises."""

    def __init__(self, number: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = number, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return func(*args, **(kwargs or {}))


def numpy(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.numpy() if isinstance(x, torch.Tensor) else x, tree)


def tensors(tree: Any) -> Any:
    return pytree.tree_map(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, tree)


def equal(a: Any, b: Any) -> bool:
    """Two results are the same, NaN included."""
    (xs, s), (ys, t) = (pytree.tree_flatten(r, is_leaf=lambda x: x is None) for r in (a, b))
    pairs = zip(xs, ys, strict=s == t)
    same = [(x is None) == (y is None) and (x is None or np.array_equal(x, y, equal_nan=x.dtype.kind == "f"))
            for x, y in (numpy(p) for p in pairs)]  # fmt: skip
    return s == t and all(same)


class Shaken:
    """A step model on tensors, disturbed.

    Args:
        step: a `StepModule` or an `OnnxStep`.
        rng: what is done, and when.
        folder: for files.
        other: the same model in the other runtime; lanes move between the two.
        often: the probability of each disturbance.
    """

    def __init__(self, step: Any, rng: random.Random, folder: Path, other: Any = None, often: float = 0.08) -> None:
        self.step, self.rng, self.path, self.other, self.often = step, rng, folder / "state", other, often

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def forward_step(self, *frames: torch.Tensor, **options: Any) -> Any:
        return self._call("forward_step", frames, options)

    def forward_steps(self, *chunks: torch.Tensor, **options: Any) -> Any:
        return self._call("forward_steps", chunks, options)

    def flush(self) -> Any:
        return self._raw("flush", (), {})

    def _raw(self, name: str, inputs: Any, options: Any) -> Any:
        if isinstance(self.step, OnnxStep):
            return tensors(getattr(self.step, name)(*numpy(inputs), **numpy(options)))
        return getattr(self.step, name)(*inputs, **options)

    def _call(self, name: str, inputs: Any, options: Any) -> Any:
        rng, lanes = self.rng, "ready" in options
        if lanes and self.other is not None and rng.random() < self.often:
            self._move()
        if rng.random() < self.often:
            self._through_a_file()
        if lanes and rng.random() < 0.5:
            options = self._cleaned(options)
        if lanes and rng.random() < self.often and self._begun():
            count = len(options["ready"])
            order = rng.sample(range(count), rng.randint(1, count))
            self.step.set_state(self.step.get_state(order), order)
        if rng.random() < self.often and self._begun():
            snapshot = self.step.get_state()
            kept = {k: np.array(v) if isinstance(v, np.ndarray) else v.clone() for k, v in snapshot.items()}
            for _ in range(rng.randint(1, 3)):
                astray = [torch.full_like(x, float("nan")) if x.is_floating_point() else x for x in inputs]
                self._raw(name, astray, options)
            self.step.set_state(snapshot)
            require(equal(kept, snapshot), "a snapshot has changed")
        peeked = rng.random() < self.often and not options.get("pad_end")
        peek = self._raw(name, inputs, {**options, "update_state": False}) if peeked else None
        if rng.random() < 2 * self.often:
            try:
                result = self._failing(name, inputs, options)
            except Boom:
                result = self._raw(name, inputs, options)
        else:
            result = self._raw(name, inputs, options)
        require(not peeked or equal(peek, result), f"{name} with update_state=False gives something else")
        return result

    def _begun(self) -> bool:
        return any(k not in ("count", "batch") for k in self.step.get_state())

    def _failing(self, name: str, inputs: Any, options: Any) -> Any:
        """The call with an op of it that raises, if it has that many."""
        if isinstance(self.step, OnnxStep):
            session = self.step.session
            run, left = session.run_with_iobinding, self.rng.choice((0, 0, 1, 2))

            def failing(*arguments: Any) -> None:
                nonlocal left
                run(*arguments)  # what it writes to is spoilt
                left -= 1
                if left < 0:
                    raise Boom

            session.run_with_iobinding = failing
            try:
                return self._raw(name, inputs, options)
            finally:
                session.run_with_iobinding = run
        with FailsAt(self.rng.choice((0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89)), Boom()):
            return self._raw(name, inputs, options)

    def _cleaned(self, options: Any) -> Any:
        """Lanes that start are cleaned instead."""
        start, ready = (np.asarray(options[k]) for k in ("start", "ready"))
        begins = start & ready
        if not begins.any() or not self._begun():
            return options
        self.step.clean_state(np.flatnonzero(begins).tolist())
        return {**options, "start": torch.from_numpy(start & ~begins)}

    def _through_a_file(self) -> None:
        self.step.save_state(self.path)
        self.step.clean_state()
        self.step.load_state(self.path)

    def _move(self) -> None:
        """The streams go on in the other runtime."""
        if not self._begun():
            return
        if self.rng.random() < 0.5:
            self.step.save_state(self.path)
            self.other.load_state(self.path)
        else:
            state = self.step.get_state()
            if POSITION not in state:
                return
            self.other.clean_state()
            self.other.set_state(tensors(state) if isinstance(self.step, OnnxStep) else numpy(state))
        self.step, self.other = self.other, self.step
