"""Crash points: named places at which a test may kill the process, to prove that nothing is lost there.

``UNCLIP_CRASH=NAME@FILE`` kills the first process that reaches NAME, with SIGKILL, and leaves FILE behind, so that
the workers that replace it live. Several pairs, separated by commas, kill once each. If FILE is a folder, NAME kills
once for each object that it is reached with, and leaves a file there for each. Without the variable a point costs one
dictionary look-up.
"""

import os
import signal


def crash_point(name: str, about: str = "") -> None:
    """Kills this process if the environment says so; ``about`` names the object."""
    wanted = os.environ.get("UNCLIP_CRASH")
    if not wanted:
        return
    markers = dict(part.split("@", 1) for part in wanted.split(","))
    if name not in markers:
        return
    marker = markers[name]
    if os.path.isdir(marker):
        marker = os.path.join(marker, f"{name} {about.replace('/', ' ')}".strip())
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)  # not an exception, which handlers would see
