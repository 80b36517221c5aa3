"""The models of the zoo, by where they come from."""

from . import audio, own, sequences, series, sound, speech, video, windows  # noqa: F401
from .entry import ENTRIES, Entry, prepare_imports

__all__ = ["ENTRIES", "Entry", "prepare_imports"]
