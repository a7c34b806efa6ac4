"""JSON files as COCO, LLaVA, kohya's sd-scripts and BLIP write them, beside folders of images."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.source.lists import read_rows
from pipeline.data.source.recipe import SourceRecipe
from pipeline.data.source.source import ListRow
from pipeline.errors import UserError
from pipeline.local import local_path
from tests.pipeline.data.bench import picture

COCO = {
    "info": {"year": 2017},
    "licenses": [{"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}],
    "images": [
        {"license": 4, "file_name": f"{i:012}.png", "coco_url": f"http://closed.test/{i:012}.png", "id": i}
        for i in (9, 25, 30)
    ],
    "annotations": [
        {"image_id": image, "id": i, "caption": f"caption {i} of {image}.\n"}
        for i, image in enumerate((25, 9, 25, 9, 77))
    ],
}


def images(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i))


def rows_of(path: Path, found: Any = None, **recipe: Any) -> list[ListRow]:
    if found is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return list(read_rows(str(path), SourceRecipe((str(path),), **recipe)))


def names_of(folder: Path, rows: list[ListRow]) -> list[str]:
    return [str(Path(local_path(row.url) or "").relative_to(folder)) if row.url else "" for row in rows]


def test_coco_has_all_captions_of_an_image_in_one_row(tmp_path: Path) -> None:
    """Images are taken from COCO's layout of folders, and else from COCO's server."""
    path = tmp_path / "coco/annotations/captions_train2017.json"
    rows = rows_of(path, COCO)
    assert [row.url for row in rows] == [*(image["coco_url"] for image in COCO["images"]), ""]
    images(tmp_path / "coco", "train2017/000000000009.png", "train2017/000000000025.png")
    rows = rows_of(path)
    assert names_of(tmp_path / "coco/train2017", rows) == [*(image["file_name"] for image in COCO["images"]), ""]
    assert [row.captions for row in rows] == [
        ("caption 1 of 9.", "caption 3 of 9."),
        ("caption 0 of 25.", "caption 2 of 25."),
        (),
        ("caption 4 of 77.",),
    ]
    assert {row.license for row in rows[:3]} == {"http://creativecommons.org/licenses/by/2.0/"}
    with pytest.raises(UserError, match=r"its annotations have no captions; COCO's are in captions_\*\.json"):
        rows_of(path, {**COCO, "annotations": [{"image_id": 9, "bbox": [0, 0, 1, 1]}]})


def test_llava_has_the_answer_of_each_conversation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "unclip")
    human = {"from": "human", "value": "<image>\nDescribe it."}

    def said(*answers: str) -> list[dict[str, str]]:
        return [turn for answer in answers for turn in (human, {"from": "gpt", "value": answer})]

    images(tmp_path, "pretrain/00453/a.png", "pretrain/00453/b.png")
    found = [
        {"id": "a", "image": "00453/a.png", "conversations": said("a red bird\non a branch")},
        {"id": "b", "image": "00453/b.png", "conversations": said("Yes.", "Two.")},
        {"id": "c", "conversations": said("Text alone.")},
    ]
    rows = rows_of(tmp_path / "chat.json", found, image_folder=str(tmp_path / "pretrain"))
    assert names_of(tmp_path / "pretrain", rows) == ["00453/a.png", "00453/b.png", ""]
    assert [row.captions for row in rows] == [("a red bird on a branch",), (), ("Text alone.",)]
    assert {row.reject for row in rows} == {None}
    assert "chat.json: 1 conversation with several answers left out" in caplog.text
    assert rows_of(tmp_path / "pretrain/chat.json", found)[0] == rows[0]


def test_kohya_has_captions_with_tags_by_image(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "inner/b.webp", "c.png")
    found = {
        "a": {"caption": "a red bird", "tags": "bird, red", "train_resolution": [512, 512]},
        "inner/b": {"tags": "solo, hat"},
        str(tmp_path / "c.png"): {"caption": ["one", "two"]},
        "gone": {"caption": "a cat"},
        "../up": {"caption": "a cat"},
    }
    rows = rows_of(tmp_path / "meta_lat.json", found)
    assert names_of(tmp_path, rows[:4]) == ["a.png", "inner/b.webp", "c.png", "gone"]
    assert [row.captions for row in rows[:3]] == [("a red bird, bird, red",), ("solo, hat",), ("one", "two")]
    assert rows[4].reject == "forbidden_reference"
    assert rows_of(tmp_path / "b.json", {"c.png": "a dog"})[0].captions == ("a dog",)


def test_a_list_of_objects_is_a_table(tmp_path: Path) -> None:
    """As BLIP's lists are; captions of one image are merged."""
    images(tmp_path, "images/a.png")
    found = [{"image": "a.png", "caption": text, "image_id": "a"} for text in ("one", "two")]
    (row,) = rows_of(tmp_path / "flickr30k_train.json", found)
    assert (names_of(tmp_path, [row]), row.captions) == (["images/a.png"], ("one", "two"))
    odd: list[Any] = [
        *found[:1],
        7,
        {"image": ["a.png"], "caption": "x"},
        {"image": "b.png", "caption": "\ud800"},
        {"image": "b.png", "caption": {"en": "x"}},
    ]
    rows = rows_of(tmp_path / "odd.json", odd)
    bad = "malformed_row"
    assert [row.reject for row in rows] == [None, bad, bad, "not_utf8", bad]
    assert rows[1].flaw.startswith("object 2 has a list")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"), ("7", "unsupported JSON; give captions of COCO"), ("[]", "unsupported JSON"),
        ('{"data": [1]}', "unsupported JSON"), ("[" * 100_000, "not JSON"), ('[{"a": 1}]', "no column url; it has a"),
        ('{"url": "http://h/a", "caption": "a"}\n' * 2, "with an object a line is called .jsonl"),
        ('{"images": 1, "annotations": [1]}', "unsupported JSON"),
        ('{"images": [{"id": [], "license": []}], "annotations": [{"image_id": [], "caption": 1}]}', "no captions"),
    ],
)  # fmt: skip
def test_any_other_json_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        rows_of(tmp_path / "a.json")
    assert "\n" not in str(error.value)
    assert "Error:" not in str(error.value)


def test_a_folder_without_texts_is_told_of_the_file_that_may_have_them(tmp_path: Path) -> None:
    images(tmp_path, "train2017/a.png")
    rows_of(tmp_path / "annotations/captions_train2017.json", COCO)
    with pytest.raises(UserError, match=r"if \S+/captions_train2017\.json has them, name that file"):
        rows_of(tmp_path)
