"""An ASGI application on loopback, served by a thread."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from threading import Thread
from typing import Any

import uvicorn


@contextmanager
def running(application: Any, **options: Any) -> Iterator[str]:
    """The address of an application; ``options`` are uvicorn's."""
    with closing(socket.create_server(("127.0.0.1", 0))) as port:
        server = uvicorn.Server(uvicorn.Config(application, log_level="error", **options))
        thread = Thread(target=server.run, kwargs={"sockets": [port]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
