"""Gives up what a process does not need to read strangers' files, on Linux: network, rights, files, memory and time.

Each part is given up where the machine lets it: a container may forbid namespaces, and then the rest still holds.
Messages on the pipes are a line of JSON and bytes, nothing that could be executed.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import site
import stat
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "TMPDIR")  # of the environment
OPEN_FILES = 64
MOST_TEXT, MOST_BYTES = 1000, 1 << 30  # of a message
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # of <linux/sched.h>
_NO_NEW_PRIVS = 38  # of <linux/prctl.h>
_OF_PROCESS = 2  # clock of all threads of a process, as clock_getcpuclockid makes it of a pid
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # of <sys/syscall.h>, the same on all machines
_PATH_BENEATH, _WRITE_FILE, _READ_FILE, _READ_FOLDER = 1, 1, 2, 3  # of <linux/landlock.h>: a rule, and bits of rights
_READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/proc/self")
_CAPABILITIES_3 = 0x20080522  # of <linux/capability.h>


def bare_environment(**more: str) -> dict[str, str]:
    """Returns the variables that Python needs to start, and ``more``: no credentials, whatever else this process has.

    Numerical libraries start no threads in it: a process with threads cannot enter a namespace of its own.
    """
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"} | more


def python_path() -> str:
    """Returns PYTHONPATH for a child that imports this code: its folder, unless it is installed, before what is there.

    Installed packages are found without it. Their folder would come before the standard library, some modules of which
    it may hold as packages of old: img2dataset brings ``dataclasses``.
    """
    root = str(Path(__file__).parents[1])
    installed = root in (*site.getsitepackages(), site.getusersitepackages())
    return os.pathsep.join(filter(None, ["" if installed else root, os.environ.get("PYTHONPATH")]))


def give_up_rights() -> None:
    """Leaves this process without network, without new rights, and without files but those that programs are made of.

    A namespace of its own has no network, and a process in it cannot read the environment of those outside. In it the
    process would be its own root, which reaches more of the kernel; so all capabilities are dropped.
    """
    for what, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, OPEN_FILES)):
        _limit(what, most)
        with suppress(OSError, ValueError):  # for good: code in this process could raise it again
            resource.setrlimit(what, (resource.getrlimit(what)[0],) * 2)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
        # Landlock, of Linux 5.13: no path is opened, made, moved, removed or, since 6.2, truncated but for those below.
        version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
        handled = ctypes.c_uint64(sum(1 << right for right in (*range(1, 13), *([14] if version >= 3 else []))))
        ruleset = libc.syscall(_LANDLOCK_CREATE, ctypes.byref(handled), ctypes.c_size_t(8), 0) if version > 0 else -1
        if ruleset >= 0:
            # Python may import later what it has not yet: its own files and those of packages stay readable. Files of
            # the user, with credentials among them, do not: what is read here could be sent back as a caption.
            for path in {*_READABLE, sys.prefix, sys.base_prefix, *filter(None, sys.path)}:
                _allow(libc, ruleset, path, 1 << _READ_FILE, 1 << _READ_FOLDER)
            # img2dataset's resizer sends what OpenCV says there.
            _allow(libc, ruleset, os.devnull, 1 << _READ_FILE | 1 << _WRITE_FILE)
            libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0)
            os.close(ruleset)
        libc.unshare(_NEW_USER | _NEW_NET)
        libc.capset((ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)())


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int, of_folder: int = 0) -> None:
    """Adds rights to a path, and to all below it, if it exists."""
    with suppress(OSError):
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            rights |= of_folder if stat.S_ISDIR(os.fstat(handle).st_mode) else 0
            beneath = struct.pack("=Qi", rights, handle)  # struct landlock_path_beneath_attr, which is packed
            libc.syscall(_LANDLOCK_ADD, ruleset, _PATH_BENEATH, beneath, 0)
        finally:
            os.close(handle)


def memory_mapped() -> int:
    """Returns the bytes that this process has mapped, used or not; 0 where the system does not say."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


def limit_memory(most: int) -> None:
    """Lets this process map at most this many bytes; then allocations fail."""
    _limit(resource.RLIMIT_AS, most)


def limit_time(seconds: float) -> None:
    """Lets this process use at most this much processor time from now on; then SIGXCPU ends it."""
    _limit(resource.RLIMIT_CPU, int(time.process_time() + seconds) + 1)


def processor_time(pid: int) -> float:
    """Returns the processor time that a child of this process has used so far, in seconds, also of one that has ended.

    The system counts it, whatever the child says. Where it does not tell, as on macOS, it is the time by the clock.
    """
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | _OF_PROCESS)
    return time.monotonic()


def _limit(what: int, value: int) -> None:
    """Sets a soft limit, which may be raised again up to the hard one."""
    _, hard = resource.getrlimit(what)
    with suppress(OSError, ValueError):
        resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def send(pipe: BinaryIO | Any, message: Any, data: bytes) -> None:
    """Writes a message, which JSON can hold, and bytes."""
    pipe.write(json.dumps([message, len(data)]).encode() + b"\n")
    pipe.write(data)
    pipe.flush()


def receive(pipe: BinaryIO | Any, most: int = MOST_BYTES) -> tuple[Any, bytes]:
    """Returns a message of at most this many bytes.

    Raises EOFError if the other end is gone, ValueError for anything but a message.
    """
    line = pipe.readline(MOST_TEXT)
    if not line.endswith(b"\n"):
        raise EOFError
    try:
        message, size = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        raise ValueError("not a message") from None
    # A child that was taken over may send anything: a negative size would be read until memory ends.
    if type(size) is not int or not 0 <= size <= most:
        raise ValueError(f"a message of {size} bytes")
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return message, data
