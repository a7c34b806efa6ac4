"""Readers of the files of lists, which run in the child process that ``child`` is: they import little."""
