"""``python -m serve FILE``: what a job of ``unclip serve --to`` runs on its cluster."""

import json
import logging
import sys
from functools import partial
from pathlib import Path

from pipeline.errors import UserError
from pipeline.parse import parse
from pipeline.terminal import printable_streams
from serve.address import listen
from serve.app import run_server
from serve.bundle import ServedBundle
from serve.settings import ServeSettings

if __name__ == "__main__":
    values = json.loads(Path(sys.argv[1]).read_text())
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("unclip").setLevel(logging.INFO)
    with printable_streams():
        try:
            settings = parse(ServeSettings, values["settings"], "serve")
            run_server(
                ServedBundle(**values["served"]),
                settings,
                values["tokens"],
                listen(settings),
                partial(print, flush=True),
            )
        except UserError as e:
            sys.exit(f"unclip: {e}")
