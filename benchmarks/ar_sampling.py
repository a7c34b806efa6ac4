"""Compares the AR prior's cached sampling with recomputing the whole sequence for every code.

The prefix is made once in both. Recomputing is timed at a few lengths and integrated over all of them by Simpson's
rule, because a full run takes minutes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Seconds, begin, finish, interleave, parser, ratio, show
from models.ar_prior import ARPrior, invert_cdf, sample
from models.nn.transformer import Cache
from models.prior_configs import ARPriorConfig
from models.random_streams import RandomStreams

CONFIG = ARPriorConfig(text_width=512, text_depth=2, text_heads=8, width=512, depth=8, heads=8)
QUICK = ARPriorConfig(prefix=7, text_width=32, text_depth=1, text_heads=2, width=32, depth=2, heads=2, buckets=64)
POINTS = 5
"""Lengths at which recomputing is timed: an odd number, for Simpson's rule."""


def inputs(model: ARPrior, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns tokens, text embeddings and dot-product tokens of random captions, and codes."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 40_000, (rows, 77), generator=g)
    tokens[:, 20] = model.config.vocabulary - 1
    text = F.normalize(torch.randn(rows, model.embed_dim, generator=g), dim=1)
    dots, codes = (torch.randint(model.config.buckets, shape, generator=g) for shape in ((rows,), (rows, model.codes)))
    return tokens, text, dots, codes


@torch.no_grad()
def recompute(model: ARPrior, prefix: Tensor, codes: Tensor) -> Tensor:
    """Returns logits of the code after ``codes`` [b, n], [b, buckets], from the whole sequence."""
    x = torch.cat([prefix, model.code(codes)], dim=1)
    return model.logits(model.transformer(x + model.position[: x.shape[1]])[:, -1])


@torch.no_grad()
def cached_logits(model: ARPrior, prefix: Tensor, codes: Tensor) -> Tensor:
    """Returns logits of all ``codes`` [b, n], each given those before it, position by position: [b, n, buckets]."""
    cache, logits, x = Cache(prefix.shape[1] + codes.shape[1]), [], prefix
    for i in range(codes.shape[1]):
        out = model.transformer(x + model.position[cache.length : cache.length + x.shape[1]], cache)
        logits.append(model.logits(out[:, -1]))
        x = model.code(codes[:, i])[:, None]
    return torch.stack(logits, dim=1)


@torch.no_grad()
def equal_codes(model: ARPrior, rows: int, count: int) -> bool:
    """Says whether both ways draw the same first codes in double precision."""
    model = ARPrior(model.config, model.embed_dim, count).double()
    tokens, text, dots, _ = inputs(model, rows)
    text = text.double()
    rng = RandomStreams([(3, rows)])
    uniform = rng.uniform("codes", count)
    prefix = model.prefix(tokens, text, dots, torch.ones(rows, dtype=torch.bool))
    codes = dots[:, None][:, :0]
    for i in range(count):
        codes = torch.cat([codes, invert_cdf(recompute(model, prefix, codes), uniform[:, i])[:, None]], dim=1)
    return torch.equal(codes, sample(model, tokens, text, dots, rng))


def simpson(seconds: Seconds, lengths: list[int], codes: int) -> list[float]:
    """Returns the seconds a round of recomputing at every length, from those at evenly spread ``lengths``."""
    weights = [1, *[4, 2] * (len(lengths) // 2 - 1), 4, 1]
    rounds = zip(*(seconds[f"recompute at {length} codes"] for length in lengths), strict=True)
    total = 3 * (len(lengths) - 1)
    return [codes * sum(w * s for w, s in zip(weights, values, strict=True)) / total for values in rounds]


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__).parse_args()
    config, codes, rows, embed_dim = (QUICK, 9, 2, 16) if options.quick else (CONFIG, 319, 8, 768)
    begin(__doc__, options)
    torch.manual_seed(0)
    model = ARPrior(config, embed_dim, codes).eval()
    print(f"  batch {rows}, {codes} codes after {config.prefix + 2}, width {config.width}, depth {config.depth}, fp32")

    tokens, text, dots, true = inputs(model, rows)
    keep = torch.ones(rows, dtype=torch.bool)
    with torch.no_grad():
        prefix = model.prefix(tokens, text, dots, keep)
        forced = model(tokens, text, dots, true, keep)
    error = float((cached_logits(model, prefix, true) - forced).abs().max())
    same = equal_codes(model, rows, min(codes, 24))
    print(f"  codes equal in fp64: {same}; largest error of forced logits {error:.1e}, deviation {forced.std():.2f}")
    if not same or error > 1e-4:
        raise SystemExit("cached and recomputed sampling disagree: timing them makes no sense")

    lengths = [round(i * (codes - 1) / (POINTS - 1)) for i in range(POINTS)]
    rng = RandomStreams([(7, rows)])
    cases = {f"recompute at {n} codes": partial(recompute, model, prefix, true[:, :n]) for n in lengths}
    seconds = interleave({"cached": partial(sample, model, tokens, text, dots, rng)} | cases, options.rounds)
    seconds["recompute, integrated"] = simpson(seconds, lengths, codes)
    show(seconds)
    finish({"recompute_over_cached": ratio(seconds, "recompute, integrated", "cached")})


if __name__ == "__main__":
    main()
