"""Compares decoder and upsampler with diffusers' U-Nets of the same weights: steps, time and memory.

UNet2DConditionModel with SimpleCrossAttn blocks and UNet2DModel without attention hold our weights and give the same
output; everything around the U-Net (losses, text encoder) is ours in both. A training step is forward, loss, backward
and optimiser, a sampling step one prediction. Memory is what a step adds, at its highest, to a fresh process that
already holds weights, gradients and the optimiser's moments.
"""

import json
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import fill_zeros
from benchmarks.peers import with_peer_unet
from benchmarks.timing import begin, finish, interleave, memory_of, parser, ratio, show
from models.decoder import Decoder, decoder_denoise, decoder_loss
from models.image_configs import DecoderConfig, UpsamplerConfig
from models.random_streams import RandomStreams
from models.upsampler import Upsampler, upsampler_denoise, upsampler_loss

EMBED_DIM = 512
TEXT = {"text_context": 77, "text_width": 256, "text_depth": 1, "text_heads": 4, "vocabulary": 1024}
DECODER = DecoderConfig(channels=64, depth=2, dropout=0.0, **TEXT)  # type: ignore[arg-type]
UPSAMPLER = UpsamplerConfig(channels=64, depth=2, dropout=0.0)
SMALL = {"channels": 32, "depth": 1, "multipliers": (1, 2), "dropout": 0.0}
QUICK_DECODER = DecoderConfig(image_size=16, attention_resolutions=(8,), **SMALL, **TEXT)  # type: ignore[arg-type]
QUICK_UPSAMPLER = UpsamplerConfig(low_size=8, image_size=32, crop=0.5, **SMALL)  # type: ignore[arg-type]
SIDES = ("ours", "diffusers")
KINDS = ("decoder", "upsampler")
Model = Decoder | Upsampler


def make(kind: str, side: str, quick: bool) -> Model:
    """Returns a model with random weights, equal for both sides."""
    torch.manual_seed(0)
    model: Model
    if kind == "decoder":
        model = Decoder(QUICK_DECODER if quick else DECODER, EMBED_DIM)
    else:
        model = Upsampler(QUICK_UPSAMPLER if quick else UPSAMPLER)
    fill_zeros(model)
    return (model if side == "ours" else with_peer_unet(model)).train()


def examples(model: Model, rows: int) -> dict[str, Tensor]:
    """Returns random images, embeddings and captions of 20 tokens."""
    g = torch.Generator().manual_seed(1)
    side = model.config.image_size
    tokens = torch.randint(1, 1023, (rows, 77), generator=g)
    tokens[:, 19], tokens[:, 20:] = 1023, 0
    return {
        "image": torch.randint(256, (rows, 3, side, side), generator=g, dtype=torch.uint8),
        "image_embedding": F.normalize(torch.randn(rows, EMBED_DIM, generator=g), dim=1),
        "tokens": tokens,
    }


def training_step(model: Model, rows: int) -> Callable[[], None]:
    """Returns one step of training, ready to be called."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch, rng = examples(model, rows), RandomStreams([(0, rows)])
    loss = decoder_loss if isinstance(model, Decoder) else upsampler_loss

    def step() -> None:
        loss(model, batch, rng).total.mean().backward()  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients stay, so that they do not count as activations

    return step


def sampling_step(model: Model, rows: int) -> Callable[[], Tensor]:
    """Returns one prediction of the clean image, ready to be called."""
    batch, side = examples(model, rows), model.config.image_size
    x_t = torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(2))
    if isinstance(model, Decoder):
        denoise = decoder_denoise(model, batch["image_embedding"], batch["tokens"], guidance=0.0)
    else:
        denoise = upsampler_denoise(model, torch.zeros(rows, 3, model.config.low_size, model.config.low_size))
    t = torch.full((rows,), 500)

    @torch.no_grad()
    def step() -> Tensor:
        return denoise(x_t, t).x0

    return step


STEPS = {"sampling": sampling_step, "training": training_step}


def rows_of(kind: str, mode: str, quick: bool) -> int:
    """Returns the batch: four, but one whole image of 256 px."""
    return 1 if quick or (kind, mode) == ("upsampler", "sampling") else 4


def peaks(side: str, quick: bool) -> dict[str, int]:
    """Returns the bytes that a step of each kind and mode adds in a fresh process."""
    code = f"import benchmarks.unet_step as u; u.print_peaks({side!r}, {quick}, {torch.get_num_threads()})"
    child = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(child.stdout)


def print_peaks(side: str, quick: bool, threads: int) -> None:
    """Prints what ``peaks`` reads from that process."""
    torch.set_num_threads(threads)
    found = {}
    for kind in KINDS:
        model = make(kind, side, quick)
        for mode in STEPS:
            step = STEPS[mode](model, rows_of(kind, mode, quick))
            step()  # makes gradients and moments
            found[f"{kind}_{mode}"] = memory_of(step)
    print(json.dumps(found))


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__).parse_args()
    begin(__doc__, options)
    ratios = {}
    for kind in KINDS:
        models = {side: make(kind, side, options.quick) for side in SIDES}
        outputs = [sampling_step(model.eval(), 1)() for model in models.values()]
        error = float((outputs[0] - outputs[1]).abs().max())
        print(f"{kind}: {models['ours'].config}, fp32")
        print(f"  largest difference of outputs {error:.1e}, of deviation {outputs[0].std():.2f}")
        if error > 1e-4:
            raise SystemExit("the two U-Nets disagree: timing them makes no sense")
        for mode, step in STEPS.items():
            rows = rows_of(kind, mode, options.quick)
            cases = {side: step(model.train(mode == "training"), rows) for side, model in models.items()}
            seconds = interleave(cases, options.rounds, warmup=2)
            print(f"  {mode}, batch {rows}")
            show(seconds)
            ratios[f"{kind}_{mode}_time"] = ratio(seconds, *SIDES)
    sizes = {side: peaks(side, options.quick) for side in SIDES}
    for name, ours in sizes["ours"].items():
        theirs = sizes["diffusers"][name]
        print(f"{name.replace('_', ' ')}: memory {ours / 2**20:.1f} MiB, diffusers {theirs / 2**20:.1f} MiB")
        ratios[f"{name}_memory"] = ours / theirs
    finish(ratios)


if __name__ == "__main__":
    main()
