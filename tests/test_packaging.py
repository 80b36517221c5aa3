"""The packages listed in pyproject.toml against the tree, and the built distributions against both."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def library_files() -> set[str]:
    """Every file of the library, by the path it has once installed."""
    return {
        (Path(*package.split(".")) / file.relative_to(ROOT / folder)).as_posix()
        for package, folder in SETUPTOOLS["package-dir"].items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_every_package_is_listed() -> None:
    in_tree = {Path(file).parent.as_posix().replace("/", ".") for file in library_files() if file.endswith(".py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(in_tree)


@pytest.mark.parametrize("folder", ["passes", "runtime"])
def test_folder_is_a_committed_relative_symlink(folder: str) -> None:
    link = f"cofx/{folder}"
    assert os.readlink(ROOT / link) == f"../{folder}"
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    staged = subprocess.run(["git", "ls-files", "--stage", link], cwd=ROOT, check=True, capture_output=True, text=True)
    assert staged.stdout.startswith("120000 "), f"git does not hold {link} as a symlink"


@pytest.mark.slow
def test_wheel_built_from_sdist_installs_and_imports(tmp_path: Path) -> None:
    built = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    tree = shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=built)
    builder, user = make_venv(tmp_path / "builder"), make_venv(tmp_path / "user")

    run(builder, "-m", "pip", "install", "build")
    run(builder, "-m", "build", "--outdir", tmp_path, tree)  # the wheel is built from the sdist, not from the tree
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.startswith("cofx/")} == library_files()

    run(user, "-m", "pip", "install", "--no-deps", wheel)
    run(user, "-c", "import cofx, cofx.passes, cofx.runtime", cwd=tmp_path)  # no torch here: none may be needed


def make_venv(folder: Path) -> Path:
    """Make an empty virtual environment and return its interpreter."""
    run(Path(sys.executable), "-m", "venv", folder)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str | Path, cwd: Path = ROOT) -> None:
    done = subprocess.run([python, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
