"""Trains a prior on the embeddings of a project, in memory, and draws with it.

python examples/train_prior.py [CONFIG] [SAMPLES]
"""

import sys
from pathlib import Path

import unclip

config, samples = (*sys.argv[1:], *["configs/nano.yaml", "1024"][len(sys.argv) - 1 :])
project = unclip.open(config)
project.run()
model = project.model()

data = project.pairs("train", embeddings=True).tensors()
print({name: len(column) for name, column in data.items()})
prior, journal = unclip.train(
    "diffusion_prior",
    data,  # or tensors of your own, of unit norm
    preset="nano",
    clip=model.cascade.clip,  # whose text tower the prior reads
    samples=int(samples),
    model={"width": 96, "depth": 3},
)
print(f"loss {journal[0]['loss']:.3f} -> {journal[-1]['loss']:.3f}")

model = model.replace(diffusion_prior=prior)
to = Path("out/examples")
to.mkdir(parents=True, exist_ok=True)
model.generate("a square yellow monster", prior="diffusion", size=64).save(to / "monster-by-my-prior.png")
