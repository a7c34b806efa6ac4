import asyncio
import inspect
import subprocess
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from serve import queue
from serve.app import Service
from serve.bundle import ServedBundle
from serve.guard import requests_log
from serve.settings import ServeSettings
from tests.asgi import running
from tests.faults import Running, start
from tests.models.small_models import make
from tests.pipeline.data.bench import Bench
from tests.serve.trained import make_trained


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test that is a coroutine, for some minutes at most."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    given = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**given), 300))
    return True


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No batch waits for more requests, and what a server in this process has set for its log ends with the test."""
    monkeypatch.setattr(queue, "WAIT_S", 0.0)
    yield
    requests_log.handlers, requests_log.propagate = [], True


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights, of 16, 64 and 256 px, whose name has a space."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny fox"
    make().save(folder)
    return folder


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[str]:
    """The address of a server of that bundle, in a thread."""
    service = Service(named(bundle), ServeSettings(replicas=1), {}, None)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        await service.pool.open(1)
        yield
        await service.pool.close()

    service.api.router.lifespan_context = lifespan
    with running(service.api) as url:
        yield url


def named(bundle: Path) -> ServedBundle:
    return ServedBundle(bundle.name, key="b" * 64, folder=str(bundle))


@pytest.fixture(scope="module")
def client(served: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client, of that server."""
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A run's output folder, and a store with the rows that its bundle was trained on."""
    return make_trained(tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="session")
def server(trained: Bench) -> Iterator[str]:
    """The address of a server of that folder."""
    yield from serving(Path(trained.store.url).parent / "out")


@pytest.fixture
def studio(browser: Any, server: str) -> Iterator[Any]:
    """The studio's page, ready to draw small, which nothing may complain about."""
    from tests.serve.studio import open_studio

    shown = open_studio(browser, server)
    yield shown.page
    assert shown.complaints == []
    assert all(url.startswith((server, "blob:", "data:")) for url in shown.requested)
    shown.page.context.close()


def serving(*words: object) -> Generator[str]:
    """Starts ``unclip serve`` on a free port, yields its address when it is ready, and ends it."""
    process = start("serve", *words, "port=0")
    try:
        yield address(process)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=300)
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
    raise AssertionError(f"not ready: {said} {process.communicate(timeout=300)}")
