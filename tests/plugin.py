"""Installs plug-ins as pip would: a module on the path, and its metadata beside it."""

import importlib
import sys
from pathlib import Path

from pipeline.plugins import plugins
from tests.chain import Finished, here


def install(folder: Path, group: str, name: str, value: str, code: str) -> Path:
    """Installs a package with one entry point, whose module has this code, into a folder; returns the folder."""
    module = value.partition(":")[0]
    about = folder / f"{module}-of-mine-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}-of-mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    return folder


def run_with(site: Path, *words: object) -> Finished:
    """Runs a command in this process, in which the packages of a folder are installed until it ends."""
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    plugins.cache_clear()
    try:
        return here(*words)
    finally:
        sys.path.remove(str(site))
        plugins.cache_clear()
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").is_relative_to(site):
                del sys.modules[name]
