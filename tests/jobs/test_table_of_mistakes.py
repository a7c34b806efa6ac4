"""Mistakes that people make: each is one line, exit code 2, and says what to type instead. Some are no mistakes here.

Others in values are in tests/pipeline/test_config.py, and in lists in tests/pipeline/data/source/test_stage.py.
"""

import base64
import json
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.chain import MICRO, done, here, refused
from tests.jobs.mistakes import DONE, ROWS
from tests.pipeline.data.bench import picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("none", "photos", "apart/captions", "suffixes", "coco/annotations", "10_dog", "twice", "CAPITALS"):
        (folder / name).mkdir(parents=True)
    for name in ("bare", "tiny", "numbers"):
        (folder / name).mkdir()
    row = "http://closed.test/a.png"
    coco = {"images": [{"id": 1, "file_name": "a.png", "coco_url": row}]}
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat"}]
    texts = {
        "list.csv": f"url,caption\n{row},a\n",
        "rows.csv": "numbers/000.jpg;a dog, number 0\n",
        "bare.csv": f"url\n{row}\n",
        "bare.tsv": f"{row}\ta cat\n",
        "links.csv": f"link,TEXT\n{row},a cat\n",
        "TRAIN.csv": f"url,caption,split\n{row},a cat,TRAIN\n",
        "two.csv": f"url,prompt,text\n{row},a cat,a dog\n",
        "header.csv": "url,caption\n",
        "tab.yaml": "project: p\n\tstore: s\n",
        "empty.yaml": "",
        "cat.gif": "GIF89a",
        "array.jsonl": '[{"url": "a.png", "caption": "a"}]\n',
        "book.xlsx": "PK\3\4",
        "book.docx": "PK\3\4",
        "photos/readme.md": "nothing",
        "fold1.csv": f"url,caption,split\n{row},a cat,fold1\n",
        "pairs.zip": "PK\3\4",
        "drawing.svg": "<svg/>",
        "apart/captions/a.txt": "a cat",
        "suffixes/a.jpg.txt": "a cat",
        "semicolons.csv": f"url;caption\n{row};a cat\n",
        "tabs.txt": f"url\tcaption\n{row}\ta cat\n",
        "laion.csv": f"URL,TEXT\n{row},a cat\n",
        "numbers.csv": f"url,caption\n{row},1\nhttp://closed.test/b.png,2\n",
        "five.csv": "url,caption\n" + "".join(f"{row},cat {i}\n" for i in range(5)),
        "coco/annotations/captions_val2017.json": json.dumps(
            {**coco, "annotations": [{"image_id": 1, "id": i, "caption": f"cat {i}"} for i in range(5)]}
        ),
        "llava.json": json.dumps([{"id": "1", "image": "numbers/a.png", "conversations": turns}]),
        "kohya.json": json.dumps({"numbers/a": {"caption": "a cat", "tags": "cat"}}),
        "10_dog/a.caption": "a dog",
        "twice/a.txt": "a cat",
        "CAPITALS/A.TXT": "a cat",
        "bare/b.txt": "a cat",
        "tiny/a.txt": "a cat",
        "long.csv": f"url,caption\n{row},{'a cat ' * 200}\n",
        "windows.csv": "url,caption\nnumbers\\a.png,a cat\n",
        "cells.csv": f"url,caption\n{base64.b64encode(picture(0, 16, 16)).decode()},a cat\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    images = "apart/a.jpg suffixes/a.jpg 10_dog/a.png twice/a.jpg twice/a.png CAPITALS/A.PNG bare/a.png bare/b.png"
    for i, name in enumerate([*images.split(), "numbers/a.png"]):
        (folder / name).write_bytes(picture(i, kind="JPEG" if name.endswith("jpg") else "PNG"))
    (folder / "tiny/a.png").write_bytes(picture(0, 1, 1))
    (folder / "utf16.csv").write_text(f"url,caption\n{row},a cat\n", encoding="utf-16")
    inside = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(2)]
    pq.write_table(pa.table({"image": inside, "text": ["a cat", "a dog"]}), folder / "hub.parquet")
    (folder / "old.csv").write_bytes(f"url;caption\n{row};Mädchen\n".encode("cp1252"))
    values = {**MICRO, "store": "store", "source": {"paths": ["list.csv"]}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.mark.parametrize(("words", "says"), ROWS, ids=[words for words, _ in ROWS])
def test_one_line_says_what_to_type_and_nothing_is_written(words: str, says: str, folder: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    refused(*shlex.split(words), says=says.split("~"), cwd=folder)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


@pytest.mark.parametrize(("words", "says"), DONE, ids=[words for words, _ in DONE])
def test_what_other_tools_write_is_taken_or_said(words: str, says: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    printed = done(here(*shlex.split(words), cwd=tmp_path / "copy"))
    for text in says.split("~"):
        assert text.strip() in printed
