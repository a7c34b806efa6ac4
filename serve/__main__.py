"""``python -m serve FILE``: what a job of ``unclip serve --to`` runs on its cluster."""

import json
import sys
from pathlib import Path

from pipeline.errors import UserError
from pipeline.parse import parse
from pipeline.terminal import printable_streams
from serve.app import hold
from serve.bundle import Served
from serve.settings import ServeSettings

if __name__ == "__main__":
    values = json.loads(Path(sys.argv[1]).read_text())
    with printable_streams():
        try:
            hold(Served(**values["served"]), parse(ServeSettings, values["settings"], "serve"), values["tokens"])
        except UserError as e:
            print(f"unclip: {e}", file=sys.stderr)
            sys.exit(1)
