"""The optimisers: AdamW, and Muon for the matrices and kernels of hidden layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from models.ar_prior import SmoothEmbedding
from pipeline.training.distributed.sharding import first_row, full_tensor, local
from pipeline.training.recipes import TrainingRecipe

NORMALISATIONS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
VECTORS = ("position", "positional_embedding", "padding")
"""Names of parameters that hold a vector for each place of a sequence, in our networks and in open_clip's."""
BLOCKS = {"qkv": 3, "in_proj_weight": 3, "context_kv": 2}
"""Names of layers, here and in open_clip, that are several matrices below each other: queries, keys and values.

Each does something else with its input, so that Muon makes the singular values of each equal by itself.
"""
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, beside its "step"; Muon has the first alone

MOMENTUM = 0.95
ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: singular values from 0 to 1 go to about 0.7 to 1.2
TOGETHER = 1 << 24  # weights that are orthogonalized at once, which bounds the memory
RMS = 0.2  # of an update at a learning rate of 1, as AdamW's often is (Liu et al. 2025, section 2.2)


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for some matrices and kernels, and AdamW for all other parameters.

    A matrix moves along its momentum with all singular values made equal, so that no few directions of the gradient
    outshout the others; a kernel counts as a matrix of its outputs by all else. The step is as long as AdamW's usually
    is (Liu et al. 2025), so both take one learning rate. Sharded matrices are gathered for it.

    Args:
        groups: Parameters for AdamW, with their weight decay.
        matrices: Parameters for Muon, each with the number of matrices of one shape that lie in it below each other.
        weight_decay: Weight decay of ``matrices``, decoupled.
        dtype: Precision of the iteration that makes singular values equal.
        adam: AdamW's options.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        matrices: Iterable[tuple[nn.Parameter, int]],
        weight_decay: float,
        dtype: torch.dtype,
        **adam: Any,
    ):
        super().__init__(groups, **adam)
        self.dtype = dtype
        blocks = list(matrices)
        self.add_param_group({"params": [matrix for matrix, _ in blocks], "weight_decay": weight_decay})
        self.matrices = {id(matrix): count for matrix, count in blocks}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes a step."""
        # AdamW takes a step with every group that it sees.
        *others, ours = groups = self.param_groups
        self.param_groups = others
        try:
            super().step()
        finally:
            self.param_groups = groups
        rate = torch.tensor(ours["lr"])  # in fp32, as the weights are
        alike: dict[tuple[torch.Size, int], list[Tensor]] = defaultdict(list)
        for matrix in ours["params"]:
            alike[matrix.shape, self.matrices[id(matrix)]].append(matrix)
        for matrices in (part for same in alike.values() for part in batched(same)):
            directions = [self._direction(matrix, matrix.grad) for matrix in matrices]  # type: ignore[arg-type]
            wholes = torch.stack([full_tensor(direction).flatten(1) for direction in directions])
            updates = wholes.view(len(wholes) * self.matrices[id(matrices[0])], -1, wholes.shape[2])
            # A matrix [a, b] of singular values 1 has entries with an RMS of 1 / sqrt(max(a, b)).
            updates = orthogonalized(updates, self.dtype).float() * (-RMS * max(updates.shape[1:]) ** 0.5 * rate)
            updates = updates.reshape(wholes.shape)
            for matrix, update in zip(matrices, updates, strict=True):
                rows = local(matrix)
                first = first_row(matrix)
                rows.mul_(1.0 - rate * ours["weight_decay"])
                rows.add_(update[first : first + len(rows)].view(rows.shape))

    def _direction(self, matrix: Tensor, gradient: Tensor) -> Tensor:
        """Returns Nesterov's momentum after this step's gradient."""
        state = self.state[matrix]
        if not state:
            state["exp_avg"] = torch.zeros_like(matrix, requires_grad=False)
        momentum = state["exp_avg"]
        momentum.lerp_(gradient, 1.0 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)


def batched(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields matrices of one shape in parts of at most TOGETHER weights, or one by one."""
    size = max(1, TOGETHER // matrices[0].numel())
    for start in range(0, len(matrices), size):
        yield matrices[start : start + size]


def kinds(optimizer: AdamW, parameter: Tensor) -> tuple[str, ...]:
    """Returns the names of what the optimiser keeps of a parameter."""
    if isinstance(optimizer, Muon) and id(parameter) in optimizer.matrices:
        return MOMENTS[:1]
    return (*MOMENTS, "step")


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns matrices [n, a, b] with the same singular vectors and singular values of about 1, in ``dtype``.

    Newton and Schulz's iteration (Jordan et al. 2024): matrix products alone, so it is as fast as they are.
    """
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizer(model: nn.Module, recipe: TrainingRecipe, half: bool = False) -> AdamW:
    """Returns the optimiser of a recipe; weight decay is decoupled, and on matrices and kernels.

    Norms, biases, embeddings, positions and other vectors, such as those that stand for "no text", do not decay.
    Muon takes what decays in hidden layers, which are those in lists and sequences; first and last ones are AdamW's.

    Args:
        model: Model to train.
        recipe: Recipe with the optimiser and its rates.
        half: Lets Muon compute in bf16.
    """
    whole = (*NORMALISATIONS, nn.Embedding, SmoothEmbedding)
    spared = {id(p) for m in model.modules() if isinstance(m, whole) for p in m.parameters()}
    spared |= {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] in VECTORS}
    learned = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in learned if p.ndim > 1 and id(p) not in spared]
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    hidden = {id(p) for stack in stacks for p in stack.parameters()} if recipe.optimizer == "muon" else set()
    blocks = {id(p): max(BLOCKS.get(n, 1) for n in name.split(".")) for name, p in model.named_parameters()}
    matrices = [(p, blocks[id(p)]) for p in decayed if id(p) in hidden]
    decayed = [p for p in decayed if id(p) not in hidden]
    chosen = {id(p) for p in decayed} | {id(p) for p, _ in matrices}
    rest = [p for p in learned if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    options: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (0.9, recipe.beta2),
        "eps": recipe.eps,
        "fused": True,
    }
    if recipe.optimizer == "adamw":
        return AdamW(groups, **options)
    return Muon(groups, matrices, recipe.weight_decay, torch.bfloat16 if half else torch.float32, **options)
