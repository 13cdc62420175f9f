"""The variation loss in two processes, each with half of the rows, against one process with all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diffusers_ext.smooth_lora.variation import StepwiseVariationLoss

pytestmark = pytest.mark.slow
ROWS, SIZE = 6, 5


def outcome(rows: slice, mean: str, estimator: str) -> dict[str, Any]:
    """Two updates of the running mean by these rows; the second's loss, gradient and the mean after it."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=draw, dtype=torch.float64).requires_grad_()
    loss = StepwiseVariationLoss(estimator=estimator, mean=mean, rate=0.3, num_bins=4).double()
    found = None
    for _ in range(2):
        clean, noise, direction = (
            torch.randn(ROWS, SIZE, generator=draw, dtype=torch.float64)[rows] for _ in range(3)
        )
        time = torch.rand(ROWS, generator=draw)[rows]
        alpha = (1 - 0.5 * time).double()
        sigma = (1 - alpha**2).sqrt()
        found = loss(lambda x: (x @ weight).tanh(), clean, noise, alpha, sigma, time, direction)
    assert found is not None
    found.loss.backward()
    return {"loss": found.loss.detach(), "gradient": weight.grad, "mean": loss.running_mean}


def work(rank: int, folder: str, mean: str, estimator: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    half = ROWS // 2
    found = outcome(slice(rank * half, (rank + 1) * half), mean, estimator)
    # As distributed training does with gradients.
    for name in ("loss", "gradient"):
        dist.all_reduce(found[name])
        found[name] /= 2
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("mean", ["global", "per_timestep"])
@pytest.mark.parametrize("estimator", ["vjp", "finite_difference"])
def test_two_halves_are_the_whole(mean: str, estimator: str, tmp_path: Path) -> None:
    expected = outcome(slice(None), mean, estimator)
    mp.start_processes(work, (str(tmp_path), mean, estimator), nprocs=2, start_method="spawn")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            # Float64 sums in another order.
            assert torch.allclose(found[name], value.double(), rtol=1e-10, atol=1e-12), name
