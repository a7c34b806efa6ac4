"""Captions as tokens of CLIP's own BPE, by open_clip's tokenizer."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.prior_configs import VOCABULARY

CONTEXT = 77  # tokens made for every model, start and end included
START, END = VOCABULARY - 2, VOCABULARY - 1
# 26 characters a token: nothing 77 tokens can hold is cut, and a hostile megabyte costs no minutes of merging pairs.
CAPTION_CHARACTERS = 2000
WORDS = 1 << 16  # in the cache, some 20 MB
log = logging.getLogger("unclip")


class EmptyCache(dict[str, str]):
    """Keeps nothing."""

    def __setitem__(self, key: str, value: str) -> None:
        pass


class Bpe:
    """Tokenizes as open_clip does, faster and in bounded memory; any thread may use it.

    open_clip's cache keeps every word that it ever saw, and a worker may read a billion captions. Here it stays empty,
    and ``words`` has the tokens of the last words.
    """

    def __init__(self) -> None:
        # Here, because open_clip takes seconds to import: trainings that read no captions do without.
        from open_clip.tokenizer import SimpleTokenizer

        self._theirs = SimpleTokenizer()
        self._theirs.cache = EmptyCache()
        self.words = self._special()

    def _special(self) -> dict[str, list[int]]:
        return {self._theirs.decoder[token]: [token] for token in self._theirs.all_special_ids}

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text of any length, without start and end."""
        if text.isascii() and text.isprintable() and "&" not in text:
            text = " ".join(text.split()).lower()  # in which ftfy finds nothing to mend, and html no entity
        else:
            text = self._theirs.clean_fn(text)
        theirs, words, tokens = self._theirs, self.words, list[int]()
        for word in theirs.pat.findall(text):
            found = words.get(word)
            if found is None:
                if len(words) > WORDS:  # a new dictionary, never clear(): other threads may be reading the old one
                    words = self.words = self._special()
                spelt = "".join(theirs.byte_encoder[byte] for byte in word.encode())
                found = words[word] = [theirs.encoder[piece] for piece in theirs.bpe(spelt).split(" ")]
            tokens += found
        return tokens


@functools.cache
def tokenizer() -> Bpe:
    """Returns the tokenizer of this process."""
    return Bpe()


def shortened(captions: Sequence[str]) -> list[str]:
    """Returns captions with single spaces, cut where no tokenizer would read on."""
    return [" ".join(caption.split())[:CAPTION_CHARACTERS] for caption in captions]


def tokenize(captions: Sequence[str]) -> Tensor:
    """Returns captions as int64 [b, 77]: start, at most 75 BPE tokens, end, then zeros. Longer captions are cut."""
    rows = np.zeros((len(captions), CONTEXT), np.int64)
    for row, caption in zip(rows, shortened(captions), strict=True):
        tokens = [START, *tokenizer().encode(caption)[: CONTEXT - 2], END]
        row[: len(tokens)] = tokens
    return torch.from_numpy(rows)


def caption_lengths(captions: Sequence[str]) -> list[int]:
    """Returns the number of BPE tokens of each caption, start and end not counted, as far as ``tokenize`` would read.

    This count alone decides what is cut from captions of data, and which prompts are refused.
    """
    return [len(tokenizer().encode(caption)) for caption in shortened(captions)]


def check_captions(captions: Sequence[str]) -> None:
    """Raises ValueError for the first caption that ``tokenize`` would cut. For prompts; captions of data are cut."""
    for i, length in enumerate(caption_lengths(captions), 1):
        if length > CONTEXT - 2:
            raise ValueError(f"caption {i} has {length} tokens and CLIP reads {CONTEXT - 2}: shorten it")


def cut_captions(captions: Sequence[str], context: int = CONTEXT) -> int:
    """Returns how many of these captions have more tokens than ``context`` holds, start and end included."""
    return sum(length > context - 2 for length in caption_lengths(captions))


def cut_note(captions: Sequence[str], context: int) -> str:
    """Returns a sentence about captions of which models that read ``context`` tokens cut a part, "" for none."""
    cut = cut_captions(captions, context)
    what = f"{cut} of {len(captions)} captions have" if len(captions) > 1 else "the caption has"
    return f"{what} more than the {context - 2} tokens that these models read; the rest is cut" if cut else ""


def text_context(bundle: Any) -> int:
    """Returns how many tokens of a caption at least one model of an UnCLIP reads, start and end included."""
    models = (bundle.decoder, bundle.diffusion_prior, bundle.ar_prior)
    return min(CONTEXT, max(bundle.clip.context_length, *(each.config.text_context for each in models if each)))


def prompt_tokens(captions: Sequence[str], context: int) -> Tensor:
    """Returns ``tokenize`` of prompts, and logs where models that read ``context`` tokens cut them.

    Raises ValueError as ``check_captions`` does.
    """
    check_captions(captions)
    if said := cut_note(captions, context):
        log.warning(said)
    return tokenize(captions)


def cut_tokens(tokens: Tensor, context: int, end: int = END) -> Tensor:
    """Returns the first ``context`` columns of ``tokens``, the last one ``end`` in rows that had none left."""
    cut = tokens[:, :context]
    unended = (cut != end).all(1)
    last = torch.where(unended, end, cut[:, -1])
    return torch.cat([cut[:, :-1], last[:, None]], dim=1)


def text_ends(tokens: Tensor, end: int = END) -> Tensor:
    """Returns how many tokens of each row of ``tokenize`` a caption takes, start and end included: int64 [b]."""
    return (tokens == end).int().argmax(1) + 1
