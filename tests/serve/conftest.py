import subprocess
from collections.abc import Iterator

from tests.faults import Running, start


def serving(*words: object) -> Iterator[str]:
    """Starts ``unclip serve`` on a free port, yields its address when it is ready, and ends it."""
    process = start("serve", *words, "port=0")
    try:
        yield address(process)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def address(process: Running) -> str:
    """Returns the address that a server prints when it is ready."""
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if line.startswith("the studio is at http://"):
            return line.partition(" at ")[2].split("/,")[0]
    raise AssertionError(f"not ready: {said} {process.communicate(timeout=60)}")
