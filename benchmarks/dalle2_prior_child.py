"""Runs DALLE2-pytorch's prior in an interpreter of its own: a training step for every line on standard input.

Run by benchmarks.diffusion_prior_step; imports nothing of ours, which its environment may lack.
"""

import json
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork
from torch import nn


def main() -> None:
    """Runs the benchmark."""
    sizes = json.loads(sys.argv[1])
    torch.set_num_threads(sizes["threads"])
    torch.manual_seed(0)
    width, rows = sizes["width"], sizes["rows"]
    network = DiffusionPriorNetwork(
        dim=width,
        depth=sizes["depth"],
        heads=sizes["heads"],
        dim_head=width // sizes["heads"],
        max_text_len=sizes["context"],
    )
    prior = DiffusionPrior(network, image_embed_dim=width, timesteps=1000, cond_drop_prob=0.1)
    caption = nn.Embedding(sizes["vocabulary"], width)
    parameters = [*prior.parameters(), *caption.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    tokens = torch.randint(sizes["vocabulary"], (rows, sizes["context"]))
    text, image = (F.normalize(torch.randn(rows, width), dim=1) for _ in range(2))
    for line in sys.stdin:
        if line.strip() == "step":
            # It scales the image embedding where it lies, hence the copy.
            prior(text_embed=text, image_embed=image.clone(), text_encodings=caption(tokens)).backward()
            optimizer.step()
            optimizer.zero_grad()
        count = sum(p.numel() for p in parameters) / 1e6
        print(f"{version('dalle2-pytorch')}, torch {torch.__version__}, {count:.2f}M parameters", flush=True)


if __name__ == "__main__":
    main()
