"""Tokens against open_clip's, which finds them another way."""

import random
from contextlib import nullcontext

import open_clip
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from models import tokens
from models.tokens import (
    CONTEXT,
    Bpe,
    caption_lengths,
    check_captions,
    cut_captions,
    cut_tokens,
    tokenize,
    tokenizer,
)

OPEN_CLIP = open_clip.SimpleTokenizer()
PARTS = ["a", "é", "Z", "7", " ", "'s", "'LL", "&amp;", "&", "<b>", "!", "\t", "\x1b[1m", "<start_of_text>"]
TEXT = st.text(st.characters(codec="utf-8"), max_size=60) | st.lists(st.sampled_from(PARTS)).map("".join)
ASCII = st.text(st.characters(codec="ascii"), max_size=60)  # of which most is cleaned by a shorter way


def test_a_tokenizer_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("socket.socket.connect", "socket.getaddrinfo"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("the network was asked"))
    assert Bpe().encode("a cat") == [320, 2368]


def test_tokens_are_open_clips() -> None:
    captions = ["a red fox", "", "!!!", "two\n  lines\tand 😀", "A fox I", "cats &amp; dogs", "ÅÉ", "cafÃ©"]
    captions.append("word " * 200)
    assert torch.equal(tokenize(captions), open_clip.get_tokenizer("ViT-L-14")(captions))


def test_a_hostile_caption_is_cut_quickly() -> None:
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))
    tokens = tokenize([letters[:10_000], letters])
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[:1], open_clip.tokenize([letters[:3_000]]))
    assert tokens[0, -1] == 49407


def test_cut_tokens_equal_those_made_shorter() -> None:
    captions = ["a cat", "word " * 10, "word " * 11, "word " * 30, ""]
    assert torch.equal(cut_tokens(tokenize(captions), 12), open_clip.tokenize(captions, context_length=12))
    assert torch.equal(cut_tokens(tokenize(captions), 77), tokenize(captions))


@given(TEXT | ASCII)
@example("<END_OF_TEXT> a<start_of_text>")
@example("&lt;b&gt; &amp;amp;")
@example("a\x7fb caf\u00c3\u00a9 isn't it's I'LL")
def test_tokens_of_any_text_are_open_clips(text: str) -> None:
    assert tokenizer().encode(text) == OPEN_CLIP.encode(text)


def test_words_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker remembers of a billion captions is bounded."""
    monkeypatch.setattr(tokens, "WORDS", 8)
    bpe = Bpe()
    for number in range(100):
        word = "word" + "abcdefghij"[number // 10] + "abcdefghij"[number % 10]
        text = f"{word} {word * 20} <end_of_text>"
        assert bpe.encode(text) == OPEN_CLIP.encode(text)
        assert len(bpe.words) <= 8 + 3
        assert not bpe._theirs.cache


def test_a_caption_that_would_be_cut_is_refused() -> None:
    check_captions(["a " * 75, ""])
    with pytest.raises(ValueError, match="caption 2 has 76 tokens and CLIP reads 75: shorten it"):
        check_captions(["a", "a " * 76])


@pytest.mark.parametrize("caption", ["word " * 75, "word " * 76, "  word  " * 75, "\n".join(["word"] * 76), "x" * 5000])
def test_what_is_cut_from_data_and_what_is_refused_of_a_prompt_is_counted_alike(caption: str) -> None:
    cut = caption_lengths([caption]) > [CONTEXT - 2]
    assert cut == bool(cut_captions([caption]))
    with pytest.raises(ValueError, match="75: shorten it") if cut else nullcontext():
        check_captions([caption])
