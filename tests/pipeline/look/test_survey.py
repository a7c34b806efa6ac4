"""What is counted over a whole list, and what is drawn from it."""

import pytest

from pipeline.data.curation.row_filter import FilterRecipe
from pipeline.data.source.source import ListRow
from pipeline.look import captions, survey
from pipeline.look.captions import look_at_captions, script_of
from pipeline.look.survey import ListSurvey


def surveyed(rows: list[ListRow]) -> ListSurvey:
    found = ListSurvey(FilterRecipe())
    for row in rows:
        found.add(row)
    return found


def rows_to(stop: int) -> list[ListRow]:
    return [ListRow(f"http://h/{i}.png", (f"picture {i}",), split="train") for i in range(stop)]


def test_rows_are_drawn_from_the_whole_list_and_the_same_ones_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "DRAWN", 100)
    rows = rows_to(5000)
    drawn = surveyed(rows).drawn
    assert drawn == surveyed(rows).drawn
    places = sorted(rows.index(row) for row in drawn)
    assert len(set(places)) == 100
    # Of 100 drawn by chance from ten tenths of a list, hardly ever fewer than 2 or more than 25 are from one.
    assert all(2 <= sum(place // 500 == tenth for place in places) <= 25 for tenth in range(10))


def test_what_is_kept_of_a_long_list_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "DRAWN", 10)
    monkeypatch.setattr(survey, "HASHED", 20)
    monkeypatch.setattr(survey, "LICENSES", 2)
    rows = [ListRow(f"http://h/{i}", ("same",) * 40, split="train", license=str(i)) for i in range(50)]
    found = surveyed(rows)
    assert (found.rows, found.kept, len(found.drawn)) == (50, 50, 10)
    assert (found.hashed, found.repeated) == (20, 19)
    assert found.licenses == {"0": 1, "1": 1, "others": 48}
    assert {len(row.captions) for row in found.drawn} == {16}


def test_a_list_without_rows_that_can_be_used_has_no_sample() -> None:
    found = surveyed([ListRow("", (), reject="malformed_row", flaw="line 2")])
    assert (found.kept, found.repeated, found.pictured(10)) == (0, 0, [])
    assert found.lost == {"malformed_row": 1}
    nothing = look_at_captions(found.drawn)
    assert (nothing.captions, nothing.quantile(0.5), nothing.quantile(1)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("caption", "script"),
    [
        ("a red heart", "Latin"),
        ("ein schönes Bild", "Latin"),
        ("красное сердце, CC0", "Cyrillic"),
        ("赤いハート", "Japanese kana"),
        ("红心", "Chinese characters"),
        ("빨간 하트", "Korean"),
        ("قلب أحمر", "Arabic"),
        ("123 ❤ 4:5", "no letters"),
        ("", "no letters"),
    ],
)
def test_a_caption_has_the_script_of_most_of_its_letters(caption: str, script: str) -> None:
    assert script_of(caption) == script


def test_endless_words_of_a_stranger_end_the_count_and_not_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "COUNTING_S", -1.0)
    found = look_at_captions(rows_to(20))
    assert (found.rows, found.captions) == (0, 0)


def test_quantiles_are_of_the_captions() -> None:
    found = look_at_captions(rows_to(9))
    assert found.tokens == {2: 9}
    assert found.quantile(0.5) == found.quantile(1) == 2
