"""Measures how near DPM-Solver++ in 25 steps and DDIM in 100 come to DDIM in 1,000, from the same noise.

On data of which the best prediction is known, a mixture of normal distributions, and on a nano decoder that has learned
drawn faces for some seconds. A sample's distance is the root mean square over its components; the ratio is that of
the medians over samples. Among modes far apart a few trajectories run so close to a divide that any two solvers may
send them to different modes: they decide every mean, and are counted apart as strays.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import begin, finish, parser
from models.decoder import Decoder, decoder_denoise, decoder_loss
from models.diffusion.process import Prediction, predict
from models.diffusion.samplers import Denoise, ddim, dpm_solver
from models.diffusion.schedules import Schedule, log_snr_grid, make_schedule, strided_grid
from models.random_streams import RandomStreams
from pipeline.config import preset_config
from pipeline.cost.flops import text_tower
from pipeline.training.state import update_ema

EMBED_DIM = 64
STEPS = 1000
STRAY = 0.3
"""The distance from which a sample counts as another one."""


def mixture(schedule: Schedule) -> Denoise:
    """Returns the best prediction for equally many data around each of eight points, with deviations of 0.05 to 0.3."""
    g = torch.Generator().manual_seed(0)
    means = torch.randn(8, 16, generator=g, dtype=torch.float64)
    stds = torch.linspace(0.05, 0.3, 8, dtype=torch.float64)[:, None]

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        level = schedule.at(t)
        share = level[:, None, None]
        variance = share * stds**2 + 1 - share
        distance = x_t[:, None] - share.sqrt() * means
        log_density = -(distance**2 / variance + variance.log()).sum(-1) / 2
        x0 = means + share.sqrt() * stds**2 / variance * distance
        return predict("x0", (log_density.softmax(1)[..., None] * x0).sum(1), x_t, level)

    return denoise


def faces(rows: int, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Returns round faces with two eyes, uint8 [rows, 3, size, size], and their colour, place and radius, [rows, 6]."""
    facts = torch.rand(rows, 6, generator=generator)
    colour, place, radius = facts[:, :3], 0.4 + 0.2 * facts[:, 3:5], 0.25 + 0.15 * facts[:, 5]
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")

    def disc(dx: float, dy: float, share: float) -> Tensor:
        across = x - (place[:, 0] + dx * radius)[:, None, None]
        down = y - (place[:, 1] + dy * radius)[:, None, None]
        return ((across**2 + down**2).sqrt() < (share * radius)[:, None, None])[:, None]

    image = torch.where(disc(0, 0, 1), colour[:, :, None, None], 1.0)
    for dx in (-0.4, 0.4):
        image = torch.where(disc(dx, -0.2, 0.15), 0.0, image)
    return (image * 255).to(torch.uint8), facts


def trained_decoder(steps: int) -> tuple[Decoder, Callable[[Tensor], Tensor]]:
    """Returns a nano decoder that has seen ``steps`` batches of faces, and the map from facts to image embeddings.

    Its weights are an average, as those of every trained model are: the last ones alone jump with the timestep.
    """
    torch.manual_seed(0)
    config = preset_config("nano")
    sizes = config.decoder.model
    model = Decoder(sizes, EMBED_DIM, text_tower(sizes, config.clip))
    average = deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    g = torch.Generator().manual_seed(1)
    projection = torch.randn(6, EMBED_DIM, generator=g)

    def embed(facts: Tensor) -> Tensor:
        return F.normalize((facts - 0.5) @ projection, dim=1)

    for step in range(steps):
        image, facts = faces(16, g, model.config.image_size)
        batch = {"image": image, "image_embedding": embed(facts), "tokens": captions(16)}
        loss = decoder_loss(model, batch, RandomStreams([(step, 16)])).total.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(average, model, 1, steps / 10)
        if step % 100 == 99 or step == steps - 1:
            print(f"  decoder after {step + 1} batches: loss {loss:.3f}")
    return average.eval(), embed


def captions(rows: int) -> Tensor:
    """Returns empty captions, [rows, 77]."""
    return F.pad(torch.tensor([[49406, 49407]]), (0, 75)).repeat(rows, 1)


def compare(name: str, denoise: Denoise, noise: Tensor, schedule: Schedule, counts: tuple[int, int, int]) -> float:
    """Prints distances to DDIM in the last of ``counts`` steps; returns DPM-Solver++ over DDIM."""
    few, many, every = counts
    target = ddim(denoise, noise, strided_grid(schedule.steps, every), schedule)
    runs = {
        f"DPM-Solver++ {few}": dpm_solver(denoise, noise, log_snr_grid(schedule, few), schedule),
        f"DDIM {few}": ddim(denoise, noise, strided_grid(schedule.steps, few), schedule),
        f"DDIM {many}": ddim(denoise, noise, strided_grid(schedule.steps, many), schedule),
    }
    print(f"  {name}: {len(noise)} samples of deviation {target.std():.2f}")
    medians = {}
    for run, x in runs.items():
        distance = (x - target).flatten(1).square().mean(1).sqrt()
        medians[run] = float(distance.median())
        strays = int((distance > STRAY).sum())
        whole = float(distance.square().mean().sqrt())
        print(f"    {run:16} median {medians[run]:.5f}, root mean square {whole:.4f}, {strays} strays")
    return medians[f"DPM-Solver++ {few}"] / medians[f"DDIM {many}"]


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__).parse_args()
    begin(__doc__, options)
    rows, batches, counts = (2, 2, (5, 10, 20)) if options.quick else (16, 800, (25, 100, 1000))
    ratios = {}
    for name in ("cosine", "linear"):
        schedule = make_schedule(name, STEPS)
        noise = torch.randn(32 * rows, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        ratios[f"mixture_{name}"] = compare(f"mixture, {name}", mixture(schedule), noise, schedule, counts)
    model, embed = trained_decoder(batches)
    schedule, side = make_schedule(model.config.schedule, STEPS), model.config.image_size
    _, facts = faces(rows, torch.Generator().manual_seed(3), side)
    noise = torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(4))
    for guidance in (0.0, 1.0):
        denoise = decoder_denoise(model, embed(facts), captions(rows), guidance)
        name = f"decoder_guidance_{guidance:.0f}"
        ratios[name] = compare(name.replace("_", " "), denoise, noise, schedule, counts)
    finish(ratios)


if __name__ == "__main__":
    main()
