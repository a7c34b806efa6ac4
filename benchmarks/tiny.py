"""Measures the tiny preset on this machine: how fast it trains and samples, and where a training step's time goes.

Decoder training runs as the training loop runs it, in the preset's batch and precision, against a bound: the step's
arithmetic, as PyTorch counts it, at the best rates at which this machine multiplies matrices and convolves pictures of
the decoder's own sizes, each alone. Ratios to targets are above 1 where a target is missed.
"""

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import begin, finish, interleave, parser, show
from models.cascade import UnCLIP
from models.clip import Clip, config_of
from models.decoder import Decoder, decoder_loss
from models.diffusion_prior import DiffusionPrior
from models.precision import autocast, computes_in
from models.prior_configs import ClipConfig
from models.random_streams import RandomStreams
from models.upsampler import Upsampler
from pipeline.config import Config, preset_config
from pipeline.cost.flops import text_tower
from pipeline.training.optimizer import make_optimizer
from pipeline.training.recipes import ClipRecipe, DecoderRecipe
from pipeline.training.state import ema_half_life, update_ema

IMAGES_PER_SECOND, UPSAMPLING_SECONDS, CAPTION_SECONDS = 150, 15, 25
FAMILIES = {
    "optimiser, average, norm of the gradient": ("adam", "_foreach", "lerp", "optimizer", "linalg_vector_norm"),
    "convolution": ("conv",),
    "norm": ("norm",),
    "attention": ("scaled_dot_product", "flash_attention"),
    "linear": ("aten::addmm", "aten::mm", "aten::bmm"),
    "activation": ("silu", "gelu"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::zero_", "aten::fill_", "aten::add_"),
}
CPU = torch.device("cpu")


class Training:
    """The decoder's training loop without data: random images, captions of 12 tokens, random numbers for every step."""

    def __init__(self, recipe: DecoderRecipe, clip: ClipRecipe):
        torch.manual_seed(0)
        self.recipe = recipe
        embed_dim = clip.model.embed_dim
        self.model = Decoder(recipe.model, embed_dim, text_tower(recipe.model, clip))
        self.ema = deepcopy(self.model).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, recipe)
        self.steps = 0
        rows, side, end = recipe.batch, recipe.model.image_size, recipe.model.vocabulary - 1
        tokens = torch.zeros(rows, 77, dtype=torch.int64)
        tokens[:, :11], tokens[:, 11] = torch.randint(1, end, (rows, 11)), end
        self.batch = {
            "image": torch.randint(256, (rows, 3, side, side), dtype=torch.uint8),
            "image_embedding": F.normalize(torch.randn(rows, embed_dim), dim=1),
            "tokens": tokens,
        }

    def loss(self) -> Tensor:
        """Runs forward and backward."""
        rng = RandomStreams([(self.steps, self.recipe.batch)])
        with autocast(CPU, self.recipe.precision):
            loss = decoder_loss(self.model, self.batch, rng).total.mean()
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Does everything between two backward passes."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        half_life = ema_half_life(self.recipe, self.steps * self.recipe.batch)
        update_ema(self.ema, self.model, self.recipe.batch, half_life)

    def step(self) -> None:
        """Does one step."""
        self.loss()
        self.update()


def count_flops(training: Training) -> dict[str, float]:
    """Returns the floating-point operations of a step in convolutions and in everything else that is counted."""
    with FlopCounterMode(display=False) as counter:
        training.loss()
    training.optimizer.zero_grad()
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    convolution = sum(count for op, count in flops.items() if "conv" in op)
    return {"convolution": convolution, "matrices": sum(flops.values()) - convolution}


def best_rates(training: Training, rounds: int) -> dict[str, float]:
    """Returns the most operations a second of a matrix product, and of the decoder's convolutions with gradients."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    cases: dict[str, Callable[[], object]] = {"matrices": lambda: a @ b}
    flops = {"matrices": 2.0 * 1024**3}
    for name, (layer, shape) in convolutions(training).items():
        x, layer = torch.randn(shape, requires_grad=True), deepcopy(layer)
        y = layer(x).detach()
        flops[name] = 6.0 * y.numel() * layer.weight[0].numel()
        cases[name] = partial(there_and_back, layer, x, torch.randn_like(y))
    rates = {name: flops[name] / median(values) for name, values in interleave(cases, rounds, warmup=2).items()}
    matrices = rates.pop("matrices")
    for name, rate in rates.items():
        print(f"    {name:30} {rate / 1e9:7.1f} GFLOP/s, forward and backward alone")
    return {"matrices": matrices, "convolution": max(rates.values())}


def there_and_back(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """Runs forward and backward."""
    layer(x).backward(gradient)


def convolutions(training: Training) -> dict[str, tuple[nn.Conv2d, torch.Size]]:
    """Yields one layer of each kind of convolution that the decoder has, and the shape of what goes in."""
    found: dict[str, tuple[nn.Conv2d, torch.Size]] = {}

    def remember(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        shape, side = inputs[0].shape, layer.kernel_size[0]
        found[f"{side}x{side}, {shape[1]} to {layer.out_channels}, {shape[2]} px"] = (layer, shape)

    hooks = [m.register_forward_hook(remember) for m in training.model.modules() if isinstance(m, nn.Conv2d)]
    training.loss()
    training.optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    return found


def families(training: Training, steps: int) -> dict[str, float]:
    """Returns the share of each kind of operator in the time of ``steps`` steps."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        for _ in range(steps):
            training.step()
    totals: dict[str, float] = defaultdict(float)
    for event in run.key_averages():
        key = event.key.lower()
        family = next((name for name, parts in FAMILIES.items() if any(part in key for part in parts)), "other")
        totals[family] += event.self_cpu_time_total
    whole = sum(totals.values())
    return {name: total / whole for name, total in sorted(totals.items(), key=lambda item: -item[1])}


def sized_config(preset: str) -> Config:
    """Returns a preset's configuration, with the sizes of a CLIP that exists: benchmarks give it random weights."""
    config = preset_config(preset)
    if not config.clip.pretrained:
        return config
    sizes = config_of(config.clip.weights)
    image, text = sizes["vision_cfg"], sizes["text_cfg"]
    model = ClipConfig(
        sizes["embed_dim"], image["image_size"], "vit", (image["layers"],), image["width"], image["patch_size"],
        text["width"], text["layers"], text["heads"],
    )  # fmt: skip
    return replace(config, clip=replace(config.clip, model=model))  # type: ignore[call-arg]


def generator(preset: str) -> UnCLIP:
    """Returns the preset's cascade with random weights."""
    torch.manual_seed(0)
    config = sized_config(preset)
    clip, prior, decoder = (
        Clip.build(config.clip.model, seed=0).eval(),
        config.diffusion_prior.model,
        config.decoder.model,
    )
    diffusion_prior = DiffusionPrior(prior, clip.embed_dim, text_tower(prior, config.clip)).eval()
    if diffusion_prior.line is not None:
        diffusion_prior.line.image_mean.normal_()  # before its regression is solved it says 0, which has no direction
    return UnCLIP(
        clip=clip,
        decoder=Decoder(decoder, clip.embed_dim, text_tower(decoder, config.clip)).eval(),
        diffusion_prior=diffusion_prior,
        upsampler_256=Upsampler(config.upsampler_256.model).eval(),
        upsampler_1024=Upsampler(config.upsampler_1024.model).eval(),
        sampling=config.bundle.sampling,
    )


def seconds_by_stage(unclip: UnCLIP) -> dict[str, float]:
    """Returns the seconds of each stage from a caption to the largest image, and in all."""
    seconds: dict[str, float] = {}
    start = last = perf_counter()

    def progress(stage: str, step: int, steps: int, *_: object) -> None:
        nonlocal last
        if step == steps:
            seconds[stage], last = perf_counter() - last, perf_counter()

    unclip.generate(["a smiling face"], [0], progress)
    return seconds | {"in all": perf_counter() - start}


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__).parse_args()
    preset = "nano" if options.quick else "tiny"
    begin(__doc__, options)
    config = preset_config(preset)
    recipe = config.decoder
    if options.quick:
        recipe = replace(recipe, batch=4, lanes=4)
    training = Training(recipe, config.clip)
    weights = sum(p.numel() for p in training.model.parameters())
    precision = computes_in(CPU, recipe.precision)
    print(f"decoder training: {preset}, batch {recipe.batch}, {precision}, {weights:,} weights")
    flops = count_flops(training)
    rates = best_rates(training, options.rounds)
    bound = sum(flops[kind] / rates[kind] for kind in flops)
    for kind in flops:
        share, rate = flops[kind] / recipe.batch / 1e9, rates[kind] / 1e9
        print(f"  {kind}: {share:.2f} GFLOP an image, {rate:.1f} GFLOP/s at best")
    seconds = interleave({"step": training.step}, options.rounds, warmup=3)
    show(seconds)
    step = median(seconds["step"])
    print(f"  {recipe.batch / step:.1f} images/s; the bound is {recipe.batch / bound:.1f}")
    for family, share in families(training, 2 if options.quick else 5).items():
        print(f"    {family:42} {share:6.1%}")

    unclip = generator(preset)
    runs = [seconds_by_stage(unclip) for _ in range(min(options.rounds, 3))]
    stages = {stage: median(run[stage] for run in runs) for stage in runs[0]}
    print(f"caption to 1024 px: {unclip.sampling}")
    print("  " + ", ".join(f"{stage} {value:.2f} s" for stage, value in stages.items()))
    finish(
        {
            "training_time_over_bound": step / bound,
            "target_over_images_per_second": IMAGES_PER_SECOND * step / recipe.batch,
            "upsampling_seconds_over_target": stages["upsampler_1024"] / UPSAMPLING_SECONDS,
            "caption_seconds_over_target": stages["in all"] / CAPTION_SECONDS,
        }
    )


if __name__ == "__main__":
    main()
