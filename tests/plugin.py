"""Installs plug-ins as pip would: a module on the path, and its metadata beside it."""

from pathlib import Path


def install(folder: Path, group: str, name: str, value: str, code: str) -> Path:
    """Installs a package with one entry point, whose module has this code, into a folder; returns the folder."""
    module = value.partition(":")[0]
    about = folder / f"{module}-of-mine-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}-of-mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    return folder
