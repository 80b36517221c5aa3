"""What can go wrong at run time.

::

    CofxError
    ├── InputError        the frames of a call do not fit the model; nothing has changed
    │   └── LaneError     one lane of a batch cannot go on; nothing has changed
    ├── StateError        a state does not belong to this model; nothing has changed
    └── CompileError      (cofx.passes.errors) the model could not be compiled
"""


class CofxError(Exception):
    """Base of every error that cofx raises on purpose."""


class InputError(CofxError, ValueError):
    """The arguments of a call do not fit the model (shape, dtype, device, number, length).

    Raised before anything is computed: the stream goes on as if the call had not been made.
    """


class LaneError(InputError):
    """One lane of a batch cannot go on: its stream is longer than a table of the model. `lane` tells which."""

    def __init__(self, lane: int, message: str) -> None:
        super().__init__(f"lane {lane}: {message}")
        self.lane = lane


class StateError(CofxError, ValueError):
    """A state handed to `set_state` does not belong to this model."""
