"""Starts the Ray of this machine in a folder that no other user may enter, and notices when a process of it ends."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

PREFIX = "unclip-ray-"
# Processes without which Ray does nothing.
WATCHED = {"gcs_server": "head process (gcs_server)", "raylet": "node process (raylet)"}
REMOVALS = 20  # attempts
SIGNALLED_S = 10.0  # from the end of Ray's processes to the signal that ends this one, at most; 3 s were too few once
interrupted = threading.Event()  # this process ends by a signal, which its whole group may have
log = logging.getLogger("unclip")


class PrivateFolder:
    """Makes a folder below ``base`` that no other user may enter; it is removed when this process ends.

    Ray's own folders, which have mode 777, lie in it. It is locked while its process lives, so that the next process of
    this user removes the folders of killed ones.

    Attributes:
        path: Path of the folder.
        keep: The folder stays until the next process removes it, because an error names a log in it.
    """

    def __init__(self, base: str):
        self.keep, self._process = False, os.getpid()
        for other in Path(base).glob(PREFIX + "*"):
            with suppress(OSError):  # it belongs to another user, or its process is alive
                handle = _lock(other)
                shutil.rmtree(other, ignore_errors=True)
                os.close(handle)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            with suppress(OSError):  # another process took it for an abandoned one before it was locked
                self._lock = _lock(self.path)
                break
        atexit.register(self._remove)

    @property
    def logs(self) -> Path:
        return self.path / "ray/session_latest/logs"

    def _remove(self) -> None:
        if os.getpid() != self._process:  # a fork inherits atexit handlers, and the folder is its parent's
            return
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        for _ in range(0 if self.keep else REMOVALS):
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                break
            time.sleep(0.1)  # a worker that is about to end wrote a file meanwhile


def _lock(folder: Path) -> int:
    """Locks a folder of this user. Raises OSError where that is not possible at once, and if the folder is gone."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(handle).st_uid != os.getuid():
            raise PermissionError
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)  # raises where another process removed the folder between opening and locking it
    except BaseException:
        os.close(handle)
        raise
    return handle


_folders: dict[str, PrivateFolder] = {}  # of this process, by the folder above; its next Ray starts in the same one


def start_local_ray(ray: Any, **options: Any) -> None:
    """Starts a Ray that ends with this process, with the options of ``ray.init``.

    Where Ray's head process or node process dies, this process logs an error and ends with code 1: Ray's own core would
    end it after 15 to 61 seconds, without a message. Nothing is lost by it that is not lost by a kill.

    Raises:
        UserError: Ray does not start, or the folder of temporary files has too long a name for it.
    """
    # macOS has a long name for it (/var/folders/...), and Ray's sockets are limited to 107 bytes.
    base = os.environ.get("RAY_TMPDIR") or (tempfile.gettempdir() if sys.platform == "linux" else "/tmp")
    try:
        folder = _folders[base] = _folders.get(base) or PrivateFolder(base)
    except OSError as e:
        raise UserError(
            f"Ray's files cannot be written below {base} (RAY_TMPDIR, else TMPDIR): {e.strerror}; name another folder"
        ) from e
    for last in (False, True):  # on a machine that is too busy, Ray gives up on itself within half a minute
        try:
            ray.init(address="local", _temp_dir=str(folder.path / "ray"), **options)
            break
        except (TypeError, ValueError):  # wrong options, which are a fault of ours
            raise
        except Exception as e:  # Ray raises many types, Exception itself among them
            if "AF_UNIX" in str(e):
                raise UserError(
                    "the path of the temporary folder (TMPDIR) is too long for Ray's sockets there, whose paths have "
                    f"at most 107 bytes; set RAY_TMPDIR=/tmp ({e})"
                ) from e
            why = (str(e).strip().splitlines() or [type(e).__name__])[0].partition(". ")[0]
            if last:
                raise UserError(
                    f"Ray did not start ({why}), most likely because this machine is too busy: run the same command "
                    f"again, or lower run.ray.cpus; see {ray_logs()}"
                ) from e
            log.warning("Ray did not start (%s); trying once more", why)
            ray.shutdown()
    node = ray._private.worker._global_node  # Ray has no public name for its processes
    for name, what in WATCHED.items():
        for started in node.all_processes.get(name, ()):
            watch = (ray, node, started.process, what)
            threading.Thread(target=_watch, args=watch, name=f"watch {name}", daemon=True).start()


def ray_logs() -> str:
    """Returns words for Ray's logs in an error; those of this machine stay until another process starts a Ray."""
    for folder in _folders.values():
        folder.keep = True
    return "Ray's logs" + "".join(f" in {folder.logs}" for folder in _folders.values())


def local_logs() -> list[Path]:
    """Returns the folders of the logs of each Ray that this process has started."""
    return [folder.logs for folder in _folders.values()]


def _watch(ray: Any, node: Any, process: subprocess.Popen[bytes], what: str) -> None:
    """Waits for the end of a process of Ray, and ends this process unless Ray was told to shut down."""
    code = process.wait()
    if not ray.is_initialized() or ray._private.worker._global_node is not node:
        return
    if interrupted.wait(SIGNALLED_S):
        return
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    log.error(
        "the local Ray's %s %s, so this command ends; look for the cause in %s, or in the kernel's log if memory ran "
        "out; run the same command again: finished work is kept",
        *(what, how, ray_logs()),
    )
    with suppress(Exception):  # another thread may be in the middle of a write
        sys.stdout.flush()
    os._exit(1)  # sys.exit would end this thread alone
