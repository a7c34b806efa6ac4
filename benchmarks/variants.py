"""What would make a step of the tiny decoder's training faster: changes tried in turn with the step as it is.

Each is checked first: the loss and the norm of the gradient are those of the unchanged step. Ratios are the time with
the change over the time without it: below 1 pays.
"""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.timing import begin, finish, interleave, parser, ratio, show
from benchmarks.tiny import Training
from models.nn import attention
from models.nn.text_encoder import EncodedText, TextEncoder
from models.presets import PRESETS
from pipeline.training.recipes import TRAINING_PRESETS, DecoderRecipe

Variant = Callable[[DecoderRecipe, int], Training]


class FusedAttention(Training):
    """PyTorch's fused attention also where ``attend`` takes matrix products, for few keys in bf16 on a CPU."""

    def loss(self) -> Tensor:
        """As ``Training.loss``."""
        with patch.object(attention, "FEW_KEYS", 0):
            return super().loss()


class DistinctRows(nn.Module):
    """A text encoder that encodes the dropped captions of a batch, which are all alike, once."""

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, keep: Tensor) -> EncodedText:
        """As ``TextEncoder.forward``."""
        kept = keep.nonzero()[:, 0]
        rows = torch.cat([kept, kept.new_zeros(1)])
        shown = torch.arange(len(rows)) < len(kept)
        text = self.encoder(tokens[rows], shown)
        place = torch.where(keep, keep.cumsum(0) - 1, len(kept))
        return EncodedText(text.states[place], text.pooled[place], None)


def channels_last(recipe: DecoderRecipe, embed_dim: int) -> Training:
    """Pictures whose channels lie side by side."""
    training = Training(recipe, embed_dim)
    training.model.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return training


def with_optimizer(**options: bool) -> Variant:
    """AdamW in another implementation."""

    def variant(recipe: DecoderRecipe, embed_dim: int) -> Training:
        training = Training(recipe, embed_dim)
        training.optimizer = AdamW(training.optimizer.param_groups, **options)  # type: ignore[arg-type]
        for group in training.optimizer.param_groups:
            group.update(options)
        return training

    return variant


def few_tokens(recipe: DecoderRecipe, embed_dim: int) -> Training:
    """A table of 2,048 tokens instead of 49,408, as a data set of few words needs. The weights are others."""
    return Training(replace(recipe, model=replace(recipe.model, vocabulary=2048)), embed_dim)


def distinct_captions(recipe: DecoderRecipe, embed_dim: int) -> Training:
    """Dropped captions encoded once a batch."""
    training = Training(recipe, embed_dim)
    training.model.text = DistinctRows(training.model.text)  # type: ignore[assignment, arg-type]
    return training


def compiled(recipe: DecoderRecipe, embed_dim: int) -> Training:
    """The U-Net through torch.compile."""
    training = Training(recipe, embed_dim)
    training.model.unet.compile()
    return training


VARIANTS: dict[str, Variant] = {
    "channels_last": channels_last,
    "fused_attention": FusedAttention,
    "single_adamw": with_optimizer(fused=False, foreach=False),
    "foreach_adamw": with_optimizer(fused=False, foreach=True),
    "few_tokens": few_tokens,
    "distinct_captions": distinct_captions,
}


def gradient_norm(model: nn.Module) -> float:
    """Of all weights together."""
    return float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def check(name: str, training: Training, other: Training) -> None:
    """Stop unless two steps, the second after an update, have the same loss and norm of the gradient."""
    for _ in range(2):
        losses = [float(each.loss()) for each in (training, other)]
        norms = [gradient_norm(each.model) for each in (training, other)]
        for a, b in (losses, norms):
            if abs(a - b) > 1e-3 * abs(b):
                raise SystemExit(f"{name} computes something else: {losses} and {norms}")
        training.update()
        other.update()


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--compile", action="store_true", help="try torch.compile too; needs a C++ compiler")
    options = options_parser.parse_args()
    begin(__doc__, options)
    preset = "nano" if options.quick else "tiny"
    fields = TRAINING_PRESETS[preset]["decoder"] | ({"batch": 4, "lanes": 4} if options.quick else {})
    recipe = DecoderRecipe(model=PRESETS[preset]["decoder"], **fields)
    embed_dim = PRESETS[preset]["clip"].embed_dim
    variants = VARIANTS | ({"compiled": compiled} if options.compile else {})
    cases = {"as it is": Training(recipe, embed_dim).step}
    for name, variant in variants.items():
        training = variant(recipe, embed_dim)
        if variant is not few_tokens:
            check(name, training, Training(recipe, embed_dim))
        cases[name] = training.step
    threads = torch.get_num_threads()

    alone = Training(recipe, embed_dim)

    def on_one_thread() -> None:
        torch.set_num_threads(1)
        alone.step()
        torch.set_num_threads(threads)

    if threads > 1:
        cases["one_thread"] = on_one_thread
    seconds = interleave(cases, options.rounds, warmup=2)
    show(seconds)
    finish({name: ratio(seconds, name, "as it is") for name in cases if name != "as it is"})


if __name__ == "__main__":
    main()
