"""Tells where a page of the documentation lies, for messages that point to one."""

from pathlib import Path

INSTALLED = Path(__file__).parent / "docs"  # where the wheel puts those of the checkout


def page(name: str) -> str:
    """Returns the file of the page ``docs/NAME.md``: of the installed package, or else by its path in a checkout."""
    file = INSTALLED / f"{name}.md"
    return str(file) if file.is_file() else f"docs/{name}.md"
