"""Compile time: the passes that turn a captured model into a scheduled step program."""
