"""Generated programs: one file per target, all from the same schedule."""
