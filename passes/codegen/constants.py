"""Tensors that depend on parameters alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ..changes import content, version


class Constants:
    """Tensors that depend on parameters alone, computed once and renewed when asked."""

    def __init__(self, tensors: dict[str, torch.Tensor], batched: set[fx.Node]) -> None:
        self.tensors = tensors
        self.batched = batched
        self.folded: dict[int, tuple[torch.Tensor, int, str]] = {}  # what was computed from: version, content then
        self.made: dict[Any, Any] = {}  # by lowerings
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The value of a node of the traced graph that depends on parameters alone."""
        waiting = [node]
        while waiting:
            n = waiting[-1]
            if n in self._values or n.op == "get_attr":
                waiting.pop()
            elif missing := [m for m in n.all_input_nodes if m not in self._values and m.op != "get_attr"]:
                waiting += missing
            else:
                waiting.pop()
                self.note(self.tensors[str(m.target)] for m in n.all_input_nodes if m.op == "get_attr")
                with torch.no_grad():
                    args, kwargs = map_arg((n.args, n.kwargs), self._known)
                    self._values[n] = n.target(*args, **kwargs)  # type: ignore[operator]
        return self._known(node)

    def _known(self, node: fx.Node) -> Any:
        return self.tensors[str(node.target)] if node.op == "get_attr" else self._values[node]

    def note(self, sources: Iterable[torch.Tensor | None]) -> None:
        """Constants were computed from these: programs that hold them are stale once one of these changes."""
        for tensor in sources:
            if tensor is not None and id(tensor) not in self.folded:
                self.folded[id(tensor)] = tensor, version(tensor), content(tensor)

    def outdated(self) -> bool:
        """Whether what was computed from has changed since."""
        return any((version(t), content(t)) != (v, c) for t, v, c in self.folded.values())

    def rewritten(self) -> bool:
        """Whether something else was written to what was computed from; if the same was, that counts no longer."""
        if any(content(t) != c for t, _, c in self.folded.values()):
            return True
        self.folded = {i: (t, version(t), c) for i, (t, _, c) in self.folded.items()}
        return False

    def known(self, node: fx.Node) -> bool:
        """Whether a node depends on parameters alone."""
        return node not in self.batched

    def renew(self, tensors: dict[str, torch.Tensor]) -> None:
        """Forget what was computed: the parameters have changed."""
        self.tensors = tensors
        self._values.clear()
        self.folded.clear()
        self.made.clear()
