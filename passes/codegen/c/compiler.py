"""The C compiler of this machine: what it compiles for, and shared objects that are compiled once."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ....runtime.cache import cache_folder
from ....runtime.errors import InputError
from .products import Target

FLAGS = ("-std=gnu11", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
         "-fwrapv", "-fPIC", "-shared")  # fmt: skip
NATIVE = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes


def c_compiler() -> str | None:
    """The C compiler: the one that $CC names, or cc, gcc, clang; None if there is none."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _run(command: list[str], given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False)


@functools.lru_cache(maxsize=8)
def _native(compiler: str) -> tuple[tuple[str, ...], Target, str]:
    """The flags for this very machine, what that is, and the compiler's version."""
    version = _run([compiler, "--version"]).stdout
    for flags in NATIVE:
        found = _run([compiler, *flags, "-dM", "-E", "-x", "c", "-"])
        if found.returncode == 0:
            return flags, _target(found.stdout), version + found.stdout
    raise InputError(f"{compiler} does not run: {found.stderr[:500]}")


def _target(macros: str) -> Target:
    defined = set(re.findall(r"#define (\w+)", macros))
    if "__AVX512F__" in defined:
        return Target(64, 32)
    if "__AVX__" in defined:
        return Target(32, 16)
    return Target(16, 32 if "__aarch64__" in defined else 16)


def native_target() -> Target:
    """What steps are compiled for.

    Raises:
        InputError: there is no compiler.
    """
    return _native(_compiler())[1]


def _compiler() -> str:
    compiler = c_compiler()
    if compiler is None:
        raise InputError("backend='c' needs a C compiler (cc, gcc, clang, or the one that $CC names)")
    return compiler


def compile_shared(source: str) -> Path:
    """The shared object of a C file, compiled for this machine unless it has been before.

    Raises:
        InputError: there is no compiler, or it does not compile it.
    """
    compiler = _compiler()
    native, _, version = _native(compiler)
    flags = [*FLAGS, *native]
    key = hashlib.sha256("\0".join([source, compiler, *flags, version]).encode()).hexdigest()[:32]
    try:
        folder = cache_folder() / "c"
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{key}.so"
        if not made.exists():
            _compile(compiler, flags, source, folder, made)
        return made
    except OSError:  # a cache that cannot be written
        folder = Path(tempfile.mkdtemp(prefix="cofx-"))
        return _compile(compiler, flags, source, folder, folder / f"{key}.so")


def _compile(compiler: str, flags: list[str], source: str, folder: Path, made: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file, out = Path(scratch) / "step.c", Path(scratch) / "step.so"
        file.write_text(source)
        done = _run([compiler, *flags, "-o", str(out), str(file), "-lm"])
        if done.returncode:
            raise InputError(f"the C compiler does not take the step program: {done.stderr[:2000]}")
        os.replace(file, made.with_suffix(".c"))  # to be looked at
        os.replace(out, made)
    return made
