import functools
import io

import pytest

from tests.seaweed import Server


@pytest.fixture(scope="session")
def s3(s3: Server) -> Server:
    """The server; botocore parses its description of S3 once, not for every store (a tenth of a second each)."""
    import botocore.session

    botocore.session.create_loader = functools.cache(botocore.session.create_loader)
    return s3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
