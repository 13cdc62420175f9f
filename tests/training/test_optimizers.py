"""Muon is torch's on flattened matrices, AdamW is torch's on the rest, and dropped layers do not change."""

import copy

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn

from diffusers_ext.training.optimizers import Muon, hidden_matrices
from tests import families

SETTINGS = {"lr": 0.02, "weight_decay": 0.1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.Linear(6, 2),
    )


MATRICES = ["1.weight", "4.weight"]


def optimizer_of(model: nn.Module, **options: float) -> Muon:
    return Muon(model.named_parameters(), MATRICES, **{**SETTINGS, **options})


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(x).square().mean().backward()


def test_convolutions_are_torchs_muon_on_flattened_weights() -> None:
    model = network()
    flat = [p.detach().clone().flatten(1).requires_grad_() for p in (model[1].weight, model[4].weight)]
    rest = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n not in MATRICES}
    ours = optimizer_of(model)
    muon = torch.optim.Muon(flat, **SETTINGS, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest.values(), **SETTINGS)
    for step in range(3):
        backward(model, step)
        for matrix, weight in zip(flat, (model[1].weight, model[4].weight)):
            matrix.grad = weight.grad.flatten(1)
        for name, parameter in rest.items():
            parameter.grad = model.get_parameter(name).grad.clone()
        for optimizer in (ours, muon, adamw):
            optimizer.step()
    for matrix, weight in zip(flat, (model[1].weight, model[4].weight)):
        assert torch.equal(matrix, weight.flatten(1))
    for name, parameter in rest.items():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_updates_have_singular_values_of_about_one() -> None:
    model = network()
    before = model[1].weight.detach().clone()
    ours = optimizer_of(model, weight_decay=0.0)
    # A random matrix is well conditioned; of very small singular values five iterations make less.
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    ours.step()
    update = (before - model[1].weight.detach()).flatten(1) / (0.02 * 0.2 * 72**0.5)
    # What five Newton–Schulz iterations with Muon's coefficients reach.
    values = torch.linalg.svdvals(update)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.2


def test_dropped_matrices_and_their_momentum_do_not_change() -> None:
    model = network()
    ours = optimizer_of(model)
    backward(model, 0)
    ours.step()
    weight = model[1].weight.detach().clone()
    momentum = copy.deepcopy(ours.state_dict()["state"]["muon"]["state"][0])
    others = [p.detach().clone() for n, p in model.named_parameters() if n != "1.weight"]
    ours.drop_before(1)
    backward(model, 1)
    ours.step()
    assert torch.equal(weight, model[1].weight)
    assert torch.equal(
        momentum["momentum_buffer"], ours.state_dict()["state"]["muon"]["state"][0]["momentum_buffer"]
    )
    after = [p for n, p in model.named_parameters() if n != "1.weight"]
    assert not any(torch.equal(a, b) for a, b in zip(others, after))
    ours.drop_before(0)
    backward(model, 2)
    ours.step()
    assert not torch.equal(weight, model[1].weight)


def test_a_resumed_run_is_the_same(tmp_path: object) -> None:
    def run(steps: range, start: str | None = None) -> list[torch.Tensor]:
        accelerator = Accelerator(cpu=True)
        model = network()
        ours = optimizer_of(model)
        schedule = get_scheduler("cosine", ours, num_warmup_steps=2, num_training_steps=6)
        model, ours = accelerator.prepare(model, ours)
        accelerator.register_for_checkpointing(schedule)
        if start:
            accelerator.load_state(start)
        for step in steps:
            backward(model, step)
            ours.step()
            schedule.step()
        accelerator.save_state(f"{tmp_path}/{steps.stop}")
        accelerator.free_memory()
        return [p.detach() for p in model.parameters()]

    whole = run(range(6))
    run(range(3))
    assert all(torch.equal(a, b) for a, b in zip(whole, run(range(3, 6), f"{tmp_path}/3")))


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    model = network()
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer_of(model).load_state_dict(adamw.state_dict())
    conv = nn.Sequential(nn.Conv2d(3, 8, 3))
    state = Muon(conv.named_parameters(), []).state_dict()
    with pytest.raises(ValueError, match="other parameters"):
        optimizer_of(model).load_state_dict(state)


def test_the_schedule_reaches_both_optimizers() -> None:
    model = network()
    ours = optimizer_of(model, weight_decay=0.0)
    for group in ours.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    ours.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "qwen", "ddpm"])
def test_hidden_matrices_of_denoisers(name: str) -> None:
    denoiser = families.denoisers(families.build(name), name)[0]
    names = hidden_matrices(denoiser)
    parameters = dict(denoiser.named_parameters())
    assert all(parameters[n].ndim in (2, 4) for n in names)
    ends = (
        "conv_in",
        "conv_out",
        "x_embedder",
        "context_embedder",
        "time_embedding",
        "proj_out.weight",
        "norm_out",
    )
    assert not any(n.startswith(ends) for n in names)
    attention = [n for n in parameters if "attn" in n and n.endswith(("to_q.weight", "to_out.0.weight"))]
    assert attention or name == "ddpm"
    assert set(attention) <= set(names)
    blocks = [n.split(".")[0] for n in names]
    if "mid_block" in blocks:
        assert blocks.index("down_blocks") < blocks.index("mid_block") < blocks.index("up_blocks")


def test_what_muon_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="0 is a Conv3d with a weight of shape"):
        hidden_matrices(nn.Sequential(nn.Conv3d(2, 2, 1)))
    model = network().to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"1\.weight is in another memory format"):
        optimizer_of(model)
