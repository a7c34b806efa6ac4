"""Keys that sign releases."""

import subprocess
from pathlib import Path


def make_key(folder: Path, name: str = "release.key", kind: str = "ed25519", passphrase: str = "") -> Path:
    """Makes a pair of keys as the documentation says."""
    file = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(file)], check=True)
    return file


def public(file: Path) -> str:
    return file.with_name(f"{file.name}.pub").read_text().strip()
