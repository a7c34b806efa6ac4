"""Looks at a list before anything is trained on it: what it holds, what later rules will reject, what it would take."""
