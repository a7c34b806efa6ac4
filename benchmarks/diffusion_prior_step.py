"""Compares a training step of the diffusion prior with diffusers' PriorTransformer and DALLE2-pytorch's prior.

A step is forward, loss, backward and optimiser. diffusers' network holds the same weights under the same loss and
gives the same output. DALLE2-pytorch cannot share an environment with us: ``--dalle2-python`` names the interpreter
of one that has it. Its network has the same width, depth, heads and tokens, but gated, wider feed-forward layers, a
single head of keys and values, and rotary positions. All embed captions with a table of few tokens, whose optimiser
would otherwise be most of the work.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import PeerPrior
from benchmarks.timing import begin, finish, interleave, parser, ratio, show
from models.diffusion_prior import DiffusionPrior, diffusion_prior_loss
from models.prior_configs import DiffusionPriorConfig
from models.random_streams import RandomStreams

CONFIG = DiffusionPriorConfig(width=512, depth=8, heads=8, vocabulary=1024)
QUICK = DiffusionPriorConfig(width=32, depth=1, heads=2, vocabulary=64)
CHILD = Path(__file__).with_name("dalle2_prior_child.py")


def random_batch(config: DiffusionPriorConfig, embed_dim: int, rows: int) -> dict[str, Tensor]:
    """Returns the inputs of the loss, of captions of 20 tokens."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, config.vocabulary - 1, (rows, 77), generator=g)
    tokens[:, 19], tokens[:, 20:] = config.vocabulary - 1, 0
    text, image = (F.normalize(torch.randn(rows, embed_dim, generator=g), dim=1) for _ in range(2))
    return {"tokens": tokens, "text_embedding": text, "image_embedding": image}


def training_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Returns one step of training, ready to be called."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rng = RandomStreams([(0, len(batch["tokens"]))])

    def step() -> None:
        diffusion_prior_loss(model, batch, rng).total.mean().backward()  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextmanager
def dalle2_step(python: str, config: DiffusionPriorConfig, rows: int) -> Iterator[Callable[[], object]]:
    """Returns the same step in another interpreter, which waits for a line before each and answers with one."""
    sizes = {"width": config.width, "depth": config.depth, "heads": config.heads, "vocabulary": config.vocabulary}
    sizes |= {"rows": rows, "context": config.text_context, "threads": torch.get_num_threads()}
    command = [python, str(CHILD), json.dumps(sizes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        requests, answers = child.stdin, child.stdout
        assert requests is not None
        assert answers is not None

        def say(line: str) -> str:
            requests.write(line + "\n")
            requests.flush()
            answer = answers.readline().strip()
            if not answer:
                raise SystemExit(f"{python} does not run {CHILD.name}: it needs dalle2-pytorch 1.15.6, see above")
            return answer

        print(f"  dalle2-pytorch: {say('hello')}")
        yield partial(say, "step")
        requests.close()


def count(model: nn.Module) -> str:
    """Returns its number of parameters, in millions."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M"


def main() -> None:
    """Runs the benchmark."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--dalle2-python", help="interpreter of an environment with dalle2-pytorch 1.15.6")
    options = options_parser.parse_args()
    config, embed_dim, rows = (QUICK, 32, 2) if options.quick else (CONFIG, 512, 16)
    begin(__doc__, options)
    torch.manual_seed(0)
    ours = DiffusionPrior(config, embed_dim)
    theirs = PeerPrior(ours).train()
    print(f"  batch {rows}, {config.text_context + 4} tokens, width {config.width}, depth {config.depth}, fp32")
    print(f"  parameters: ours {count(ours)}, diffusers {count(theirs)}")

    batch = random_batch(config, embed_dim, rows)
    x_t, t, keep = torch.randn(rows, embed_dim), torch.arange(rows) * 50, torch.arange(rows) % 4 > 0
    with torch.no_grad():
        outputs = [model(x_t, t, batch["tokens"], batch["text_embedding"], keep) for model in (ours, theirs)]
    error = float((outputs[0] - outputs[1]).abs().max())
    print(f"  largest difference of outputs {error:.1e}, of deviation {outputs[0].std():.2f}")
    if error > 1e-4:
        raise SystemExit("the two priors disagree: timing them makes no sense")

    with ExitStack() as stack:
        cases: dict[str, Callable[[], object]] = {
            "ours": training_step(ours, batch),
            "diffusers": training_step(theirs, batch),
        }
        if options.dalle2_python:
            cases["dalle2-pytorch"] = stack.enter_context(dalle2_step(options.dalle2_python, config, rows))
        seconds = interleave(cases, options.rounds, warmup=2)
    show(seconds)
    finish({f"ours_over_{peer.partition('-')[0]}": ratio(seconds, "ours", peer) for peer in list(cases)[1:]})


if __name__ == "__main__":
    main()
