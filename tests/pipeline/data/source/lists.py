"""Small lists of rows."""

import json
from pathlib import Path

from hypothesis import strategies as st

from pipeline.data.source.source import ListRow
from tests.pipeline.data.bench import write_list


def table(folder: Path, name: str, *numbers: int) -> Path:
    folder.mkdir(exist_ok=True)
    write_list(folder / name, [(f"http://h/{i}.png", f"picture {i}") for i in numbers])
    return folder


URLS = ["", *(f"http://h/{i}" for i in range(8))]
ROWS = st.builds(
    ListRow,
    st.sampled_from(URLS),
    st.lists(st.sampled_from(["a cat", "a dog"]), max_size=2).map(tuple),
    st.sampled_from(["", "group"]),
    st.sampled_from(["", "test"]),
    reject=st.sampled_from([None, None, None, "malformed_row"]),
)


def lines(*urls: str) -> bytes:
    return "".join(json.dumps({"url": url, "caption": f"picture of {url}"}) + "\n" for url in urls).encode()
