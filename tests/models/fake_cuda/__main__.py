"""Runs cases in a process of its own, on a CPU build of torch, and prints what it found as JSON.

python -m tests.models.fake_cuda LIBRARY NAME ...
"""

import ctypes
import importlib.util
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path


def load(library: Path) -> None:
    """Builds the library of the device, where it is missing, and loads it. torch must not be imported yet."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert "torch" not in sys.modules
    folder = Path(str(torch.origin)).parent
    if not library.exists():
        source = Path(__file__).with_name("device.cpp")
        flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{folder}/include", str(source), "-o", str(library)]
        links = [f"-L{folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}/lib"]
        subprocess.run(["g++", *flags, *links], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


load(Path(sys.argv[1]))
print(json.dumps(import_module("tests.models.fake_cuda.cases").run(sys.argv[2:])))
