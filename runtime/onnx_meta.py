"""What a step graph says of itself (``metadata_props["cofx"]``), read without trust: it must fit the graph it is in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from .errors import InputError

FORMAT = 1
CONTROLS = {"start": "bool", "ready": "bool", "length": "int64"}
DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
NUMBERS = ("delay", "receptive_field", "stride", "padding")


def number(value: int | str) -> int | float | Fraction:
    """A delay, stride, ... as it was: fractions and infinity are strings in JSON."""
    if isinstance(value, int):
        return value
    _require(isinstance(value, str) and re.fullmatch(r"inf|-?\d{1,18}(/\d{1,18})?", value) is not None, "a number")
    return float(value) if value == "inf" else Fraction(value)


def read_meta(session: Any, path: str) -> dict[str, Any]:
    """The metadata of a step graph that ONNX Runtime has opened.

    Raises:
        InputError: there is none, it is of another format, or it does not describe this graph.
    """
    text = session.get_modelmeta().custom_metadata_map.get("cofx")
    if text is None:
        raise InputError(f"{path} was not made by StepModule.to_onnx: it has no metadata of cofx")
    try:
        meta = json.loads(text)
        _require(isinstance(meta, dict), "an object")
        if _whole(meta, "format", 0) != FORMAT:
            raise InputError(f"{path} has format {meta['format']}; this version reads {FORMAT}")
        _check(meta, session)
    except (ValueError, KeyError, TypeError, RecursionError, ArithmeticError) as error:
        if isinstance(error, InputError):
            raise
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise InputError(
            f"{path} was not made by StepModule.to_onnx: its metadata does not fit: {what[:300]}"
        ) from error
    found: dict[str, Any] = meta
    return found


def may_end(meta: Mapping[str, Any], length: int) -> bool:
    """Whether a stream of so many ticks ends as the model, run on all of it, does (see `Compiled.known_ends`)."""
    if "ends" not in meta or length == 0:
        return True
    first, last, every, refused = (meta["ends"][n] for n in ("first", "last", "every", "refused"))
    if not first <= length <= last:
        if not every:
            return False
        length = last - (last - length) % every if length > last else first + (length - first) % every
    return length not in refused


def _check(meta: Mapping[str, Any], session: Any) -> None:
    """Raise unless everything that is used of the metadata is there, and fits the graph."""
    ticks, period = _whole(meta, "frames_per_step", 1), _whole(meta, "period", 1)
    _require(ticks % period == 0, f"frames_per_step: a multiple of {period}")
    _whole(meta, "flush_calls", 0)
    _require(meta["limit"] is None or _whole(meta, "limit", 0) >= 0, "limit: a number")
    if "ends" in meta:
        first, last, every = (_whole(meta["ends"], n, 0) for n in ("first", "last", "every"))
        _require(every <= last - first + 1, "ends: every within first to last")
        refused = meta["ends"]["refused"]
        _require(isinstance(refused, list) and all(type(n) is int for n in refused), "ends: lengths")
    _require(isinstance(meta["fingerprint"], str), "fingerprint: text")
    _require(isinstance(meta["controls"], bool), "controls: true or false")
    for part in ("inputs", "outputs", "states"):
        _require(isinstance(meta[part], list) and all(isinstance(e, dict) for e in meta[part]), f"{part}: objects")
    _require(bool(meta["inputs"] and meta["outputs"] and meta["states"]), "inputs, outputs and states: some")
    taken = [(i["name"], i["shape"], i["dtype"]) for i in (*meta["inputs"], *meta["states"])]
    taken += [(n, ["batch", 1], d) for n, d in CONTROLS.items() if meta["controls"]]
    _alike("inputs", session.get_inputs(), taken)
    results = session.get_outputs()
    given: list[tuple[str, Any, Any]] = [(o["name"], ..., ...) for o in meta["outputs"]]
    given += [
        (o["valid"], ["batch"] if o["time_axis"] is None else ["batch", o["frames"]], "bool") for o in meta["outputs"]
    ]
    given += [(s["out"], s["shape"], s["dtype"]) for s in meta["states"]]
    _alike("outputs", results, given)
    for info in meta["inputs"]:
        rate = _whole(info, "frames_per_tick", 0)
        rank = len(info["shape"])
        _axes(info, rank - (info["shape"][0] == "batch" and info["model_axes"]["batch"] is None))
        _require((rate == 0) == (info["model_axes"]["time"] is None), "frames_per_tick: 0 without a time axis")
        if rate:
            at = _axis(info["time_axis"], rank)
            _require(at is not None and info["shape"][at] == rate * ticks, "frames_per_tick: as the graph has them")
    for info, value in zip(meta["outputs"], results, strict=False):
        rank = len(value.shape)
        _axes(info, rank - (info["model_axes"]["batch"] is None))
        _require(all(isinstance(info[n], bool) for n in ("timed", "single")), "timed, single: true or false")
        for at in (info["model_axes"]["time"], _axis(info["time_axis"], rank)):
            _require(info["timed"] == (at is not None), "timed: whether there is a time axis")
        _require(info["time_axis"] != 0, "time_axis: behind the batch")
        _require(isinstance(info["equivalence"], str), "equivalence: text")
        for name in NUMBERS:
            number(info[name])
    _require(meta["states"][0]["shape"] == ["batch", 2] and meta["states"][0]["dtype"] == "int64", "position: first")
    for state in meta["states"]:
        _require(isinstance(state["key"], str), "key: text")
        _require(_axis(state.get("grows"), len(state["shape"])) != 0, "grows: behind the batch")
    leaves = sorted(_leaves(meta["structure"]))
    _require(leaves == list(range(len(meta["outputs"]))), "structure: each output once")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"expected {what}")


def _whole(about: Mapping[str, Any], name: str, least: int) -> int:
    value = about[name]
    _require(type(value) is int and least <= value < 2**31, f"{name}: a whole number from {least} on")
    return int(value)


def _alike(what: str, values: Sequence[Any], described: Sequence[tuple[Any, Any, Any]]) -> None:
    """The graph's inputs or outputs are those that are described, in this order; `...` is anything."""
    names = [v.name for v in values]
    _require(names == [n for n, _, _ in described], f"{what}: {', '.join(names)}")
    for value, (name, shape, dtype) in zip(values, described, strict=True):
        _require(value.type in DTYPES, f"{name}: not {value.type}")
        for d in value.shape:  # None, or a name: open
            _require(not isinstance(d, int) or d > 0, f"{name}: sizes above zero")
        if dtype is not ...:
            _require(DTYPES[value.type] == dtype, f"{name}: {DTYPES[value.type]}")
        if shape is not ...:
            fits = isinstance(shape, list) and len(shape) == len(value.shape)
            _require(fits and all(map(_same, shape, value.shape)), f"{name}: shape {list(value.shape)}")


def _same(described: Any, size: Any) -> bool:
    """A size that is open, or that of a file for one batch size; or the same number."""
    return described == "batch" or (isinstance(size, int) and described == size)


def _axes(info: Mapping[str, Any], rank: int) -> None:
    batch, time = (_axis(info["model_axes"][n], rank) for n in ("batch", "time"))
    _require(batch is None or batch != time, "model_axes: batch and time apart")


def _axis(value: Any, rank: int) -> int | None:
    _require(value is None or (type(value) is int and 0 <= value < rank), f"an axis below {rank}")
    return None if value is None else int(value)


def _leaves(node: Any) -> list[int]:
    """The numbers of the outputs in the description of their structure."""
    if type(node) is int:
        return [node]
    _require(isinstance(node, dict) and len(node) == 1, "structure: a number or a container")
    ((kind, entries),) = node.items()
    _require(kind in ("list", "tuple", "dict") and isinstance(entries, list), "structure: list, tuple or dict")
    if kind == "dict":
        _require(all(isinstance(e, list) and len(e) == 2 for e in entries), "structure: pairs in a dict")
        _require(all(isinstance(k, (str, int)) for k, _ in entries), "structure: names in a dict")
        entries = [v for _, v in entries]
    return [leaf for e in entries for leaf in _leaves(e)]
