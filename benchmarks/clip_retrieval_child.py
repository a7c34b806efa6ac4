"""Runs clip-retrieval in an interpreter of its own: one task for every line on standard input.

Run by benchmarks.embeddings; imports nothing of ours, which its environment may lack.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import open_clip
import torch
from all_clip import load_clip
from clip_retrieval.clip_inference.mapper import ClipMapper
from clip_retrieval.clip_inference.reader import WebdatasetReader
from clip_retrieval.clip_inference.runner import Runner
from clip_retrieval.clip_inference.writer import NumpyWriter


class Silent:
    """A logger for the runner that logs nothing: its own starts a process."""

    def start(self) -> None:
        pass

    def end(self) -> None:
        pass

    def __call__(self, stats: dict) -> None:
        pass


def main() -> None:
    """Runs the benchmark."""
    told = json.loads(sys.argv[1])
    os.sched_setaffinity(0, {told["core"]})
    torch.set_num_threads(1)
    open_clip.add_model_config(told["models"])
    name, batch = f"open_clip:{told['name']}/{told['weights']}", told["batch"]
    pipe, sys.stdout = sys.stdout, sys.stderr  # what it prints must not get between answers
    _, preprocess, tokenizer = load_clip(name, use_jit=False, warmup_batch_size=batch)
    mapper = ClipMapper(True, True, False, False, name, False, "", batch)

    def reader(tars: list[str], text: bool) -> WebdatasetReader:
        return WebdatasetReader(lambda urls: urls, preprocess, tokenizer, tars, batch, 1, text, True)

    def infer(tars: list[str]) -> str:
        with tempfile.TemporaryDirectory() as folder:

            def write(i: int) -> NumpyWriter:
                return NumpyWriter(i, folder, True, True, False, 1)

            Runner(lambda _: reader(tars, True), lambda: mapper, write, lambda _: Silent(), 1)(0)
            return f"{len(np.load(f'{folder}/img_emb/img_emb_0.npy'))} pairs"

    def read(tars: list[str]) -> str:
        return f"{sum(len(part['image_tensor']) for part in reader(tars, False))} pictures"

    def compare(views: str, captions: list[str], out: str) -> str:
        """Returns the embeddings of given views, in place of those that its own resizing makes."""
        *_, normalize = preprocess.transforms
        pixels = normalize(torch.from_numpy(np.load(views)).permute(0, 3, 1, 2) / 255)
        item = {"image_tensor": pixels, "image_filename": [], "text_tokens": tokenizer(captions), "text": captions}
        made = mapper(item)
        np.save(out, np.stack([made["image_embs"], made["text_embs"]]))
        return f"{version('clip-retrieval')}, open_clip {version('open-clip-torch')}, torch {torch.__version__}"

    tasks: dict[str, Callable[..., str]] = {"infer": infer, "read": read, "compare": compare}
    for line in sys.stdin:
        task, *arguments = json.loads(line)
        print(tasks[task](*arguments), file=pipe, flush=True)


if __name__ == "__main__":
    main()
