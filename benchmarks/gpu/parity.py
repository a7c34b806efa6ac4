"""Part 3: the device computes what the CPU computes."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, Outcome, distance, fill_zeros, make_rows, make_task, of_rows, on, trainings
from models.cascade import Decoder
from models.decoder import decoder_denoise
from models.precision import autocast
from models.random_streams import RandomStreams
from models.reverse import ReverseProcess, silent
from models.upsampler import corrupted_low
from pipeline.config import Config, preset_config
from pipeline.training.compiling import compile_layers
from pipeline.training.recipes import TrainingRecipe
from pipeline.training.task import Batch, Task
from pipeline.training.tasks.ar_prior import ARPriorTask
from pipeline.training.tasks.decoder import DecoderTask

ROWS = 4
LOSS, GRADIENT = 1e-5, 1e-4  # relative errors of fp32
BF16_LOSS, BF16_COSINE = 0.01, 0.99
SAMPLE = 1e-3
CPU = torch.device("cpu")
Gradients = dict[str, Tensor]


def parity(bench: Bench) -> Outcome:
    """Compares losses, gradients, samplers, damaged images and codes of the device with those of the CPU."""
    outcome = Outcome("")
    names = dict.fromkeys(("nano", "nano" if bench.quick else "small"))
    for preset in names:
        config = preset_config(preset)
        for stage, recipe in trainings(config).items():
            with bench.exact():
                outcome.values[f"{preset} {stage}"] = _compare(bench, outcome, f"{preset} {stage}", config, recipe)
            bench.free()
    with bench.exact():
        outcome.values["samplers"] = _samplers(bench, outcome)
        outcome.values["damage"] = _damage(bench, outcome)
    worst = {
        what: max(value.get(what, 0.0) for name, value in outcome.values.items() if " " in name)
        for what in ("loss", "gradient", "bf16_loss")
    }
    outcome.line = (
        f"{len(names)} x {len(trainings(bench.config))} models: loss {worst['loss']:.1e}, gradient "
        f"{worst['gradient']:.1e}, loss in bf16 {worst['bf16_loss']:.1e}; samplers {outcome.values['samplers']:.1e}"
    )
    return outcome


def _compare(bench: Bench, outcome: Outcome, name: str, config: Config, recipe: TrainingRecipe) -> dict[str, float]:
    """Returns the errors of one model."""
    model = recipe.model  # type: ignore[attr-defined]
    if "dropout" in {field.name for field in fields(model)}:  # which each device draws for itself
        recipe = replace(recipe, model=replace(model, dropout=0.0))  # type: ignore[call-arg]
    task = make_task(config, of_rows(recipe, ROWS, 1))
    batch = make_rows(task, ROWS, config.clip.model.embed_dim)
    network = task.model(0).train()
    fill_zeros(network)
    loss, gradients = run(task, network, batch, CPU, "fp32")
    network.to(bench.device)
    other, others = run(task, network, batch, bench.device, "fp32")
    low, lows = run(task, network, batch, bench.device, "bf16")
    found = {
        "loss": distance(other, loss),
        "gradient": apart(others, gradients),
        "bf16_loss": distance(low, other),
        "bf16_cosine": cosine(lows, others),
    }
    if task.splittable:
        _, cuts = run(task, network, batch, bench.device, "fp32", micro_batch=ROWS // 2)
        found["micro_batch"] = apart(cuts, others)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found["channels_last"] = distance(run(task, network, batch, bench.device, "fp32")[0], other)
    if bench.compile:
        compile_layers(network)
        found["compiled"] = distance(run(task, network, batch, bench.device, "bf16")[0], other)
    bounds = {
        "loss": LOSS,
        "gradient": GRADIENT,
        "micro_batch": GRADIENT,
        "bf16_loss": BF16_LOSS,
        "channels_last": LOSS,
        "compiled": BF16_LOSS,
    }
    for what, bound in bounds.items():
        if what in found:
            outcome.expect(found[what] <= bound, f"{name}: {what} differs by {found[what]:.1e}, at most {bound:g}")
    share = found["bf16_cosine"]
    outcome.expect(
        share >= BF16_COSINE, f"{name}: gradients in bf16 and fp32 have cosine {share:.4f}, {BF16_COSINE} or more"
    )
    if isinstance(task, ARPriorTask):
        z = batch["image_embedding"]
        same = torch.equal(task.codec.to(bench.device).encode(z.to(bench.device)).cpu(), task.codec.to(CPU).encode(z))
        outcome.expect(same, f"{name}: the codes of embeddings differ")
    return found


def run(
    task: Task, network: nn.Module, batch: Batch, device: torch.device, precision: str, micro_batch: int = ROWS
) -> tuple[Tensor, Gradients]:
    """Returns the losses of rows, [rows], and the gradients of their mean."""
    network.zero_grad()
    losses = []
    for start in range(0, ROWS, micro_batch):
        rows = slice(start, start + micro_batch)
        part = on(device, {column: values[rows] for column, values in batch.items()})
        with autocast(device, precision):
            total = task.loss(network, part, RandomStreams([(row, 1) for row in range(ROWS)[rows]], device)).total
        (total.sum() / ROWS).backward()
        losses.append(total.detach())
    return torch.cat(losses), {n: p.grad.detach().float() for n, p in network.named_parameters() if p.grad is not None}


def apart(found: Gradients, expected: Gradients) -> float:
    """Returns the largest relative error of a gradient; those below a thousandth of all are held against that."""
    least = 1e-3 * float(sum(g.double().norm() ** 2 for g in expected.values())) ** 0.5
    norms = {n: max(float(g.norm()), least) for n, g in expected.items()}
    return max(float((found[n].cpu() - g.cpu()).norm()) / norms[n] for n, g in expected.items())


def cosine(found: Gradients, expected: Gradients) -> float:
    """Returns the cosine of all gradients together."""
    a, b = (torch.cat([each[n].cpu().double().flatten() for n in expected]) for each in (found, expected))
    return float(a @ b / (a.norm() * b.norm()))


def _samplers(bench: Bench, outcome: Outcome) -> float:
    """Returns the largest error of four steps of each sampler."""
    config = preset_config("nano")
    task = make_task(config, config.decoder)
    assert isinstance(task, DecoderTask)
    network = task.model(0).eval()
    assert isinstance(network, Decoder)
    fill_zeros(network)
    batch = make_rows(task, ROWS, task.embed_dim)
    worst = 0.0
    for sampler in ("ddpm", "ddim", "dpm"):
        drawn = [draw_with(network, batch, device, sampler, "fp32") for device in (CPU, bench.device)]
        error = distance(drawn[1], drawn[0])
        outcome.expect(error <= SAMPLE, f"4 steps of {sampler} differ by {error:.1e}, at most {SAMPLE:g}")
        worst = max(worst, error)
        cpu = apart_on_average(draw_with(network, batch, CPU, sampler, "bf16"), drawn[0])
        half = {"bf16": draw_with(network, batch, bench.device, sampler, "bf16")}
        if bench.compile and sampler == "dpm":  # the last
            compile_layers(network)
            half["bf16, compiled"] = draw_with(network, batch, bench.device, sampler, "bf16")
        for how, image in half.items():
            gap = apart_on_average(image, drawn[0])
            says = f"4 steps of {sampler} in {how} differ by {gap:.1e} from fp32, at most twice the CPU's {cpu:.1e}"
            outcome.expect(gap <= 2 * cpu, says)
    return worst


def apart_on_average(found: Tensor, expected: Tensor) -> float:
    """Returns the mean difference of values from -1 to 1."""
    return float((found - expected).abs().mean())


def draw_with(network: Decoder, batch: Batch, device: torch.device, sampler: str, precision: str) -> Tensor:
    """Returns images, on the CPU, that four steps of a sampler draw from noise that is the same on every device."""
    rows, rng = on(device, batch), RandomStreams([(row, 1) for row in range(ROWS)], device)
    network.to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        denoise = decoder_denoise(network, rows["image_embedding"], rows["tokens"], 1.0)
        noise = rng.normal("x_T", 3, network.config.image_size, network.config.image_size)
        return ReverseProcess("decoder", sampler, "small", 4, silent)(network, denoise, noise, rng).cpu()


def _damage(bench: Bench, outcome: Outcome) -> float:
    """Returns the largest difference of small images that were damaged, on [-1, 1]."""
    worst = 0.0
    for config in (bench.config.upsampler_256.model, bench.config.upsampler_1024.model):
        crop = torch.rand(2, 3, config.crop_size, config.crop_size, generator=torch.Generator().manual_seed(3)) * 2 - 1
        made = [corrupted_low(config, crop.to(d), RandomStreams([(5, 2)], d)).cpu() for d in (CPU, bench.device)]
        apart = float((made[0] - made[1]).abs().max())
        outcome.expect(apart <= LOSS, f"images damaged by {config.corruption} differ by {apart:.1e}, at most {LOSS:g}")
        worst = max(worst, apart)
    return worst
