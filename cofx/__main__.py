"""``python -m cofx``: the command line."""

from .cli import entry

entry()
