"""References: one form to compare, in which spellings of one URL are equal, and one to show, which lets nobody in."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.fetch import references
from pipeline.data.fetch.references import comparable, shown
from pipeline.data.source.imported import embedding_reference

SPELLINGS = [
    "http://bücher.example.test/A~b/c.jpg?q=%C3%A9&x=1",
    "https://bücher.example.test/A~b/c.jpg?q=%C3%A9&x=1",
    " http://BÜCHER.EXAMPLE.test/A~b/c.jpg?q=%C3%A9&x=1 ",
    "HTTP://xn--bcher-kva.example.test:80/A~b/c.jpg?q=%C3%A9&x=1",
    "https://xn--bcher-kva.example.test.:443/A%7Eb/c.jpg?q=%c3%a9&x=1#part",
    "http://bücher.example.test\u3002/A~b/c.jpg?q=é&x=1",
    "http://bücher.example.test/A%7eb/./c.jpg?q=é&x=1",
    "http://bücher.example.test/x/../A~b/y/%2E%2e/c.jpg?q=é&x=1#",
]
OTHERS = [
    "http://bücher.example.test/a~b/c.jpg?q=%C3%A9&x=1",
    "http://bücher.example.test/A~b/c.jpg?x=1&q=%C3%A9",
    "http://bücher.example.test:8080/A~b/c.jpg?q=%C3%A9&x=1",
    "http://bücher.example.test/A~b%2Fc.jpg?q=%C3%A9&x=1",
    "http://bücher.example.test/A~b/c.jpg?q=%C3%A9&x=1&",
    "http://example.test/A~b/c.jpg?q=%C3%A9&x=1",
    "s3://bücher.example.test/A~b/c.jpg?q=%C3%A9&x=1",
]


def test_spellings_of_a_url_compare_equal_and_other_urls_do_not() -> None:
    assert len({*map(comparable, SPELLINGS)}) == 1
    assert comparable(SPELLINGS[0]) not in map(comparable, OTHERS)


@pytest.mark.parametrize(
    "reference",
    ["", "s3://bucket/a%2f/../b", "file://server/a.jpg", "tar:///t?offset=1&size=2#a", "http://", "http://***@h.test/a"],
)  # fmt: skip
def test_what_is_no_url_is_as_it_stands(reference: str) -> None:
    assert comparable(f" {reference}\n") == reference


@pytest.mark.parametrize(
    "spelled", ["/data/Ann Lee.jpg", "file:///data/Ann Lee.jpg", "file://localhost/data/x/..//Ann%20Lee.jpg"]
)
def test_a_file_is_one_reference_however_it_is_spelled(spelled: str) -> None:
    assert comparable(spelled) == "file:///data/Ann%20Lee.jpg"
    assert comparable(spelled.replace("L", "l")) != comparable(spelled)


def test_a_signature_is_masked_behind_an_embedding_too() -> None:
    url = "https://h.test/a.jpg?X-Amz-Signature=abc&n=1"
    assert shown(embedding_reference(Path("/lists/a b"), "0", 3, url)) == (
        "embedding:///lists/a%20b?part=0&row=3#https://h.test/a.jpg?X-Amz-Signature=***&n=1"
    )


def test_a_password_makes_no_other_reference() -> None:
    """A list is stored with the password masked; who asks to forget the row names it as it was."""
    assert comparable("http://ana:hunter2@h.test/a") == comparable("http://***@h.test/a")


@given(
    st.builds(
        "{}://{}/{}{}".format,
        st.sampled_from(["http", "https"]),
        st.lists(st.text("ab1", min_size=1, max_size=3), min_size=1, max_size=3).map(".".join),
        st.text("aA0./-_~", max_size=8),
        st.sampled_from(["", "?", "?a=1", "?a.b/c", "?a=~", "??"]),
    )
)
def test_the_short_way_leads_to_the_same_form(url: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "_PLAIN", re.compile("(?!)"))
        slow = comparable(url)
    assert comparable(url) == slow


@pytest.mark.parametrize(
    ("reference", "secret"),
    [
        ("https://b.s3.test/a.png?X-Amz-Algorithm=AWS4&X-Amz-Credential=AKIA9&X-Amz-Signature={}", "abcd1234"),
        ("https://b.test/a.png?AWSAccessKeyId=AKIA9&Expires=17{}&Signature=abc", "00000001"),
        ("https://b.test/a.png?sv=2024&sp=r&se=2027&sig={}", "ab%2Bc%3D"),
        ("https://b.test/a.png?w=1&token={}#x", "t0k3n"),
        ("https://b.test/a.png?api_key={}&w=2", "k3y"),
        ("https://b.test/a.png?Policy=a&Key-Pair-Id={}", "KPI9"),
        ("https://b.test/a.png?w=1;access_token={}", "t0k3n"),
        ("https://b.test/a.png#access_token={}", "t0k3n"),
        ("https://b.test/a.png?X%2DGoog-Signature={}", "abcd1234"),
        ("https://b.test/a.png?u={}", "Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4"),
        ("https://ana:{}@b.test/a.png", "hunter2"),
    ],
)
def test_what_signs_a_url_is_not_shown(reference: str, secret: str) -> None:
    said = shown(reference.format(secret))
    assert secret not in said
    assert "***" in said
    assert "b.s3.test/a.png" in said or "b.test/a.png" in said


@pytest.mark.parametrize(
    "reference",
    ["https://b.test/photo.php?id=123&width=640&lang=en&v=2", "s3://bucket/a=b/c.png", "file:///a/b.png", "", "?",
     "/a=b", "tar:///data/t.tar?offset=1536&size=2048#a.jpg", "https://b.test/a?keyword=cats&monkeys"],
)  # fmt: skip
def test_the_rest_is_shown_as_it_stands(reference: str) -> None:
    assert shown(reference) == reference
