"""Compares our batched BSR degradation with the per-image numpy pipeline of bsrgan, with the same operators.

Both take uint8 images and give fp32 tensors [b, 3, 64, 64] in [-1, 1]. The peer runs as it is, on two threads and on
two processes (one each a core); the fastest of the three counts. Every round draws new parameters.
"""

import random
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from itertools import count
from multiprocessing import get_context
from statistics import median
from types import ModuleType

import numpy as np
import scipy.interpolate
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import begin, finish, interleave, parser, ratio, show
from models.degradation.bsr import bsr
from models.pixels import from_uint8
from models.random_streams import RandomStreams

SIDE = 256
ADVICE = "bsrgan is missing: python -m pip install --no-deps bsrgan==0.1.5 (its opencv_python would replace ours)"


@cache
def load_peer() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Returns bsrgan's degradation, without what its package imports besides: plotting and downloads."""
    spec = find_spec("bsrgan")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(ADVICE)
    package = ModuleType("bsrgan")
    package.__path__ = list(spec.submodule_search_locations)  # its submodules, without its __init__
    sys.modules["bsrgan"] = package
    for name in ("matplotlib", "matplotlib.pyplot", "mpl_toolkits", "mpl_toolkits.mplot3d"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["mpl_toolkits.mplot3d"].Axes3D = None  # type: ignore[attr-defined]
    scipy.finfo = np.finfo  # gone from SciPy since
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # scipy.ndimage.filters
    from bsrgan.utils import utils_blindsr

    utils_blindsr.interp2d = bilinear
    return utils_blindsr.degradation_bsrgan


def bilinear(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Replaces SciPy's former interp2d, on a regular grid."""
    spline = scipy.interpolate.RectBivariateSpline(y, x, z, kx=1, ky=1)
    return lambda new_x, new_y: spline(new_y, new_x)


def degrade(pictures: np.ndarray, seed: int) -> np.ndarray:
    """Runs the peer on uint8 [n, h, w, 3], one after the other: fp32 [n, 3, h / 4, w / 4] in [-1, 1]."""
    function = load_peer()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the peer draws from the global state
    small = [function(picture / np.float32(255), sf=4, lq_patchsize=picture.shape[0] // 4)[0] for picture in pictures]
    return np.stack(small).transpose(0, 3, 1, 2).astype(np.float32) * 2 - 1


def ours_degraded(batch: Tensor, seed: int) -> Tensor:
    """Runs ours on uint8 [n, 3, h, w]: fp32 [n, 3, h / 4, w / 4] in [-1, 1]."""
    return bsr(from_uint8(batch), RandomStreams([(seed, len(batch))]))


def degrade_in(pool: Executor, pictures: np.ndarray, seed: int) -> Tensor:
    """Runs the peer on both halves of a batch at once."""
    return torch.from_numpy(np.concatenate(list(pool.map(degrade, np.split(pictures, 2), (seed, seed + 1)))))


def pictures(rows: int) -> Tensor:
    """Returns smooth random images with some noise, uint8 [rows, 3, 256, 256]."""
    g = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(rows, 3, 8, 8, generator=g), size=SIDE, mode="bicubic")
    noisy = smooth * 255 + 4 * torch.randn(smooth.shape, generator=g)
    return noisy.round().clamp(0, 255).to(torch.uint8)


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__).parse_args()
    begin(__doc__, options)
    load_peer()
    rows = 2 if options.quick else 16
    batch = pictures(rows)
    arrays = batch.permute(0, 2, 3, 1).contiguous().numpy()
    print(f"  batch {rows}, {SIDE} px to {SIDE // 4} px, fp32")
    plain = F.avg_pool2d(from_uint8(batch), 4)
    trials = range(1000, 1000 + 32 // rows)
    ours_away, theirs_away = (
        sum(float((run(seed) - plain).abs().mean()) for seed in trials) / len(trials)
        for run in (partial(ours_degraded, batch), lambda seed: torch.from_numpy(degrade(arrays, seed)))
    )
    print(f"  mean difference from plain shrinking: ours {ours_away:.4f}, bsrgan {theirs_away:.4f}")
    seeds = count()

    def seeded(run: Callable[[int], object]) -> Callable[[], object]:
        return lambda: run(next(seeds))

    with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(2, get_context("spawn")) as processes:
        peers = {
            "bsrgan": seeded(partial(degrade, arrays)),
            "bsrgan, two threads": seeded(partial(degrade_in, threads, arrays)),
            "bsrgan, two processes": seeded(partial(degrade_in, processes, arrays)),
        }
        seconds = interleave({"ours": seeded(partial(ours_degraded, batch))} | peers, options.rounds, warmup=2)
    show(seconds)
    fastest = min(peers, key=lambda name: median(seconds[name]))
    print(f"  fastest peer: {fastest}")
    finish({"bsrgan_over_ours": ratio(seconds, fastest, "ours")})


if __name__ == "__main__":
    main()
