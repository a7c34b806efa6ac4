import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
# Tests run side by side: OpenMP's threads must not spin while they wait for each other on cores that others use.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from pipeline.progress import say_once
from pipeline.store import Store, open_store
from tests.seaweed import Server, serving

# The same examples every time, and no clock: a busy machine fails no test.
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("seeded")
# What starts the tests in the background may ignore Ctrl-C, and then so would every command that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# What is written outlives its process without it, and no machine is switched off: tests need not wait for their disk.
os.fsync = lambda handle: None
# One place for what the libraries read at import; nothing in a test may look for an account or a cluster outside it.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
# Ray gives its workers a nice value of 15: beside other tests they would get a thirtieth of a core.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so
for name in ("RAY_ADDRESS", "AWS_PROFILE", "AWS_ENDPOINT_URL", "UNCLIP_CRASH"):
    os.environ.pop(name, None)
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull


# Folders whose tests start commands, servers and clusters, or look at a whole chain.
INTEGRATION = {"cluster", "jobs", "machine", "serve"}
# Fixtures that start such, and names in a test's module that start processes which read lists, open images or train.
STARTING = {"cluster", "ray", "s3", "two_cores", "Bench", "ImageDecoder", "ListReader", "read_rows", "train_together"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what make unit leaves out. Tests that start such by themselves have the mark already."""
    for item in items:
        folder, *_ = item.path.relative_to(Path(__file__).parent).parts
        names = {*getattr(item, "fixturenames", ()), *vars(getattr(item, "module", None) or object)}
        if folder in INTEGRATION or STARTING & names:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(autouse=True)
def _as_at_the_start() -> None:
    """Our log, what it has said, and Ray's token are as at the start of a process, whatever ran before has set."""
    say_once.cache_clear()
    log, root = logging.getLogger("unclip"), logging.getLogger()
    log.disabled, log.propagate = False, True
    log.setLevel(logging.NOTSET)
    root.setLevel(logging.WARNING)
    if "ray" in sys.modules:  # it keeps the first token that it has been given, and tests know several clusters
        from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

        AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture(scope="module", autouse=True)
def _ray_ends_with_its_module() -> Iterator[None]:
    """Ends a Ray that a test has left: tests of another file would take it for theirs, with another token."""
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The S3 server, and the environment that reaches it for as long as the session lasts."""
    with serving(tmp_path_factory.mktemp("seaweed")) as server:
        os.environ.update(server.environment)
        yield server


@pytest.fixture(scope="session")
def pictures() -> Iterator[str]:
    """The address of a server of drawings."""
    from pipeline.data.source.drawings.server import serving

    with serving() as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    from tests.browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.integration)])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Makes empty stores, in a folder or on S3; where a folder of tests asks for it, by the library of other clouds."""
    count = itertools.count()
    if request.param == "folder":
        return lambda: open_store(str(tmp_path / f"store-{next(count)}"))
    server = request.getfixturevalue("s3")
    make: Callable[[str], Store] = open_store
    if request.param == "cloud":
        from tests.pipeline.store.over_s3 import OverS3 as make  # loads its library
    return lambda: make(f"{server.url}/{tmp_path.name}-{os.getpid()}-{next(count)}")


@pytest.fixture
def folder_store(tmp_path: Path) -> Store:
    """An empty store in a folder."""
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def store(make_store: Callable[[], Store]) -> Store:
    """An empty store; tests that use it run on a folder and on S3."""
    return make_store()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight H100 that torch says it finds. No test machine has any."""
    import torch

    for name, answer in {
        "is_available": True, "device_count": 8, "get_device_name": "NVIDIA H100 80GB HBM3",
        "mem_get_info": (80 * 10**9, 80 * 10**9),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
