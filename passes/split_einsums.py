"""Pass 2j: an einsum of several tensors as a chain of einsums of two, from left to right, their letters made explicit.

Rules and backends then see products of two tensors alone, such as queries times keys.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import fx

from .graph_edits import call_at, take_place

aten = torch.ops.aten


def split_einsums(graph: fx.Graph) -> None:
    """Rewrite a canonical graph so."""
    for node in list(graph.nodes):
        if node.target is aten.einsum.default and len(node.meta["samples"][0]["tensors"]) > 2:
            take_place(node, _chain(graph, node))
    graph.eliminate_dead_code()


MATMUL = "...ik,...kj->...ij"  # a product of matrices as an einsum


def spelled_out(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The terms and the result of an einsum, a letter for each dimension: ``...`` and a missing result made explicit.

    An ellipsis stands for the dimensions that a term's letters leave over, counted from the last one (torch.einsum).
    """
    terms, arrow, result = equation.replace(" ", "").partition("->")
    free = [x for x in string.ascii_letters if x not in equation]
    parts = terms.split(",")
    over = [
        rank - len(part.replace("...", "")) if "..." in part else 0 for part, rank in zip(parts, ranks, strict=True)
    ]
    wide = "".join(free[: max(over)])
    letters = [part.replace("...", wide[len(wide) - n :]) for part, n in zip(parts, over, strict=True)]
    if arrow:
        return letters, result.replace("...", wide)
    once = sorted(x for x in set(terms) - set(".,") if terms.count(x) == 1)
    return letters, wide + "".join(once)


def _chain(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The einsums of two tensors each that take the place of one."""
    tensors: list[fx.Node] = list(node.meta["samples"][0]["tensors"])
    terms, result = spelled_out(node.meta["samples"][0]["equation"], [len(n.meta["sizes"][0]) for n in tensors])
    so_far, left = tensors[0], terms[0]
    for i in range(1, len(tensors)):
        later = set(result).union(*terms[i + 1 :])
        kept = "".join(x for x in dict.fromkeys(left + terms[i]) if x in later) if i < len(tensors) - 1 else result
        so_far = _pair(graph, node, (so_far, tensors[i]), (left, terms[i]), kept)
        left = kept
    return so_far


def _pair(
    graph: fx.Graph, like: fx.Node, given: tuple[fx.Node, fx.Node], terms: tuple[str, str], result: str
) -> fx.Node:
    """An einsum of two tensors, before the node `like`."""
    sizes = []
    for shapes in zip(*(n.meta["sizes"] for n in given), strict=True):
        size_of = _sizes(terms, shapes)
        sizes.append(tuple(size_of[x] for x in result))
    size_of = _sizes(terms, [n.meta["val"].shape for n in given])
    value = given[0].meta["val"].new_empty([size_of[x] for x in result], dtype=like.meta["val"].dtype)
    equation = f"{','.join(terms)}->{result}"
    return call_at(graph, like, aten.einsum.default, [((equation, list(given)), {})] * len(sizes), sizes, value)


def _sizes(terms: tuple[str, str], shapes: Any) -> dict[str, Any]:
    """How large each letter is: a dimension of size 1 is broadcast along the other's."""
    found: dict[str, Any] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            if letter not in found or (isinstance(found[letter], int) and found[letter] == 1):
                found[letter] = size
    return found
