"""The commands: one screen each."""
