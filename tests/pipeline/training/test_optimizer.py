"""Muon: the library's for matrices, the same for kernels however they lie in memory, and nothing after a failure."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.prior_configs import DiffusionPriorConfig
from pipeline.training import optimizer as optimizer_module
from pipeline.training.distributed.process_group import ProcessGroup
from pipeline.training.optimizer import Muon, make_optimizer, orthogonalized
from pipeline.training.recipes import DecoderRecipe, DiffusionPriorRecipe
from pipeline.training.state import TrainState, begin
from pipeline.training.tasks.decoder import DecoderTask
from pipeline.training.tasks.diffusion_prior import DiffusionPriorTask
from tests.pipeline.training.trainings import DECODER

PRIOR = DiffusionPriorRecipe(
    samples=64, batch=16, lanes=8, precision="fp32", model=DiffusionPriorConfig(width=8, depth=1, heads=1)
)
IMAGES = DecoderRecipe(samples=64, batch=16, lanes=8, model=DECODER)


def muon(parameters: list[nn.Parameter], dtype: torch.dtype = torch.float32, blocks: int = 1) -> Muon:
    group = {"params": [nn.Parameter(torch.zeros(1))], "weight_decay": 0.0}
    return Muon([group], [(p, blocks) for p in parameters], 0.1, dtype, lr=0.01, fused=True)


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("together", [1, 1 << 24])
def test_it_takes_the_steps_of_the_library(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon computes in bf16, so does ours here; wide, tall and square ones, some of one shape."""
    monkeypatch.setattr(optimizer_module, "TOGETHER", together)
    g = torch.Generator().manual_seed(0)
    shapes = [(16, 48), (16, 48), (48, 16), (24, 24)]
    start = [torch.randn(shape, generator=g) for shape in shapes]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    library = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer = muon(ours, torch.bfloat16)
    for _ in range(5):
        gradients = [torch.randn(shape, generator=g) for shape in shapes]
        step(optimizer, ours, gradients)
        step(library, theirs, gradients)
    for mine, other, first in zip(ours, theirs, start, strict=True):
        moved = (other - first).norm()
        assert (mine - other).norm() < 0.02 * moved


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (20, 20)])
def test_singular_values_become_nearly_equal_and_vectors_stay(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(1)
    left, values, right = torch.linalg.svd(torch.randn(shape, generator=g), full_matrices=False)
    values = torch.linspace(1.0, 0.05, len(values))
    found = orthogonalized(((left * values) @ right)[None], torch.float32)[0]
    in_their_basis = left.T @ found @ right.T
    assert 0.6 < in_their_basis.diagonal().min() < in_their_basis.diagonal().max() < 1.3
    assert (in_their_basis - in_their_basis.diagonal().diag()).abs().max() < 1e-4


def test_a_kernel_moves_as_a_matrix_however_it_lies_in_memory() -> None:
    g = torch.Generator().manual_seed(2)
    kernel, gradient = torch.randn(8, 4, 3, 3, generator=g), torch.randn(8, 4, 3, 3, generator=g)
    last = nn.Parameter(kernel.clone().to(memory_format=torch.channels_last))
    matrix, plain = nn.Parameter(kernel.flatten(1).clone()), nn.Parameter(kernel.clone())
    step(muon([last]), [last], [gradient.to(memory_format=torch.channels_last)])
    step(muon([plain]), [plain], [gradient])
    step(muon([matrix]), [matrix], [gradient.flatten(1)])
    assert torch.equal(plain.flatten(1), matrix)
    assert torch.equal(last, plain)


def test_queries_keys_and_values_move_as_matrices_of_their_own() -> None:
    """Where values have a hundred times the gradient of queries, both move as they would alone."""
    g = torch.Generator().manual_seed(5)
    start, gradient = torch.randn(24, 8, generator=g), torch.randn(24, 8, generator=g)
    gradient[16:] *= 100
    whole, parts = nn.Parameter(start.clone()), [nn.Parameter(part.clone()) for part in start.chunk(3)]
    step(muon([whole], blocks=3), [whole], [gradient])
    step(muon(parts), parts, list(gradient.chunk(3)))
    torch.testing.assert_close(whole, torch.cat(parts))
    state = state_of("diffusion_prior")
    matrices = [name for name, _ in state.model.named_parameters() if "qkv.weight" in name]
    optimizer = state.optimizer
    assert isinstance(optimizer, Muon)
    assert sorted(set(optimizer.matrices.values())) == [1, 3]
    assert list(optimizer.matrices.values()).count(3) == len(matrices)


def state_of(kind: str) -> TrainState:
    if kind == "decoder":
        return begin(DecoderTask(DECODER, 4), replace(IMAGES, optimizer="muon"), ProcessGroup())
    return begin(DiffusionPriorTask(PRIOR.model, 4), replace(PRIOR, optimizer="muon"), ProcessGroup())


OUTER = {
    "decoder": {
        "image_to_time.weight", "image_to_tokens.weight", "text_to_time.weight", "unet.conv_in.weight",
        "unet.conv_out.weight", "text.embedding.token.weight", "text.embedding.position", "text.embedding.padding",
    },
    "diffusion_prior": {
        "embedding_in.weight", "noised_in.weight", "out.weight", "position", "caption.token.weight",
        "caption.position", "caption.padding",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", OUTER)
def test_it_takes_the_matrices_of_hidden_layers_alone(kind: str) -> None:
    state = state_of(kind)
    assert isinstance(state.optimizer, Muon)
    matrices = {name: id(p) for name, p in state.model.named_parameters() if p.ndim > 1}
    assert {name for name, matrix in matrices.items() if matrix not in state.optimizer.matrices} == OUTER[kind]
    assert state.optimizer.matrices.keys() <= set(matrices.values())
    every = [id(p) for group in state.optimizer.param_groups for p in group["params"]]
    assert len(every) == len(set(every)) == sum(p.requires_grad for p in state.model.parameters())


def test_without_it_there_is_adamw() -> None:
    assert type(make_optimizer(nn.Linear(2, 2), PRIOR)) is torch.optim.AdamW


def test_workers_of_unlike_machines_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 only where all of them compute so."""
    monkeypatch.setattr("pipeline.training.state.computes_in", lambda device, precision: "bf16")
    recipe = replace(PRIOR, optimizer="muon", precision="bf16")
    for all_of_them, dtype in (([True, True], torch.bfloat16), ([True, False], torch.float32)):
        monkeypatch.setattr(ProcessGroup, "collect", lambda self, items, found=all_of_them: found)
        optimizer = begin(DiffusionPriorTask(recipe.model, 4), recipe, ProcessGroup()).optimizer
        assert isinstance(optimizer, Muon)
        assert optimizer.dtype == dtype
