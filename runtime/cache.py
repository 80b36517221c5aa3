"""Where cofx keeps what takes long to find out or to make."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder, which need not be there yet: ``$COFX_CACHE``, or ``cofx`` in the user's cache."""
    folder = os.environ.get("COFX_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cofx"
    return Path(folder)
