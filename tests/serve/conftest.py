import subprocess
from collections.abc import Iterator

import openai
import pytest

from tests.faults import Running, start
from tests.models.test_cascade import make


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``unclip serve`` with a bundle of random weights, of 16, 64 and 256 px, whose name has a space."""
    folder = tmp_path_factory.mktemp("served") / "tiny fox"
    make().save(folder)
    with_port = serving(folder)
    yield next(with_port)
    next(with_port, None)


@pytest.fixture(scope="module")
def client(served: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client, of that server."""
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


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
