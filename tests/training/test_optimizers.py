"""Muon is torch's on flattened matrices, AdamW is torch's on the rest, and dropped layers do not change."""

import argparse
import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from torch import nn

from diffusers_ext.testbed import base_models
from diffusers_ext.training import optimizers
from diffusers_ext.training.arguments import add_training_arguments
from diffusers_ext.training.loop import make_accelerator
from diffusers_ext.training.lora import add_lora
from diffusers_ext.training.optimizers import (
    Muon,
    check_optimizer,
    dropped_in_step,
    frozen,
    hidden_matrices,
    layers_of,
    make_optimizer,
)
from tests import families, tiny

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


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_convolutions_are_torchs_muon_on_flattened_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch iterates in bfloat16, and this class on a CPU in float32.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
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


def test_the_memory_layout_of_a_weight_does_not_matter() -> None:
    one, other = network(), network().to(memory_format=torch.channels_last)
    for model in (one, other):
        ours = optimizer_of(model)
        for step in range(2):
            backward(model, step)
            ours.step()
    for a, b in zip(one.parameters(), other.parameters()):
        # The convolutions of the two layouts sum in another order.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


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


def test_the_sharp_operator_is_the_nuclear_norm_times_the_oracle() -> None:
    """Both start from the same state in every step, and their updates are compared, which weight decay is no part of."""
    model, other = network(), network()
    oracle, sharp = optimizer_of(model, weight_decay=0.0), optimizer_of(other, weight_decay=0.0, sharp=True)
    averaged = torch.zeros(6, 8)
    for step in range(3):
        other.load_state_dict(model.state_dict())
        before = model[4].weight.detach().clone()
        for part, optimizer in ((model, oracle), (other, sharp)):
            backward(part, step)
            optimizer.step()
        grad = model[4].weight.grad
        averaged = averaged.lerp(grad, 0.05)
        norm = torch.linalg.svdvals(grad.lerp(averaged, 0.95)).sum()
        update, scaled = before - model[4].weight, before - other[4].weight
        # Both are differences to weights of about 0.3: an error of 1e-7 each.
        torch.testing.assert_close(scaled, norm * update, rtol=1e-3, atol=3e-7)


def test_weight_decay_is_not_scaled_by_the_sharp_operator() -> None:
    model = network()
    ours = optimizer_of(model, sharp=True)
    before = model[4].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = 1e-12 * torch.ones_like(parameter)  # an update of nothing
    ours.step()
    torch.testing.assert_close(model[4].weight.detach(), before * (1 - 0.02 * 0.1))


def test_what_has_no_gradient_does_not_change() -> None:
    model = network()
    ours = optimizer_of(model)
    backward(model, 0)
    ours.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(ours.state_dict())
    backward(model, 1)
    for parameter in model.parameters():
        parameter.grad = None
    ours.step()
    assert_equal(model.state_dict(), weights)
    assert_equal(ours.state_dict(), state)


def assert_equal(one: Any, other: Any) -> None:
    """Bit by bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_step_that_the_scaler_skips_changes_nothing() -> None:
    model = network()
    ours = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    backward(model, 0)
    ours.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(ours.state_dict())
    model.zero_grad()
    scaler.scale(model(torch.randn(5, 3, 3, 3)).mean()).backward()
    model[4].weight.grad[0, 0] = torch.inf
    scaler.unscale_(ours)
    scaler.step(ours)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_equal(model.state_dict(), weights)
    assert_equal(ours.state_dict(), state)


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
    ours = optimizer_of(model)
    backward(model, 0)
    ours.step()
    state = ours.state_dict()
    state["state"]["muon"].reverse()
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


@pytest.mark.parametrize("name", ["muon", "drop_muon"])
def test_muon_has_one_learning_rate(name: str, tmp_path: Any) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList([network(), network()])

        def networks(self) -> list[torch.nn.Module]:
            return list(self.parts)

        def rate_factors(self) -> list[float]:
            return [1.0, 10.0]

    parser = add_training_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--output_dir", str(tmp_path), "--optimizer", name])
    with pytest.raises(
        ValueError, match="has one learning rate for all networks, and Two has the factors 1, 10"
    ):
        make_optimizer(args, Two(), 1e-3)


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


# Those with several blocks.
@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "ddpm"])
def test_layers_are_the_blocks_in_the_order_of_their_use(name: str) -> None:
    denoiser = families.denoisers(families.build(name), name)[0]
    called: list[str] = []
    paths = {id(p): n for n, p in denoiser.named_parameters()}
    layers = [[paths[id(p)] for p in layer] for layer in layers_of(denoiser)]
    assert sorted(n for layer in layers for n in layer) == sorted(paths.values())
    of = {n: number for number, layer in enumerate(layers) for n in layer}
    for path, module in denoiser.named_modules():
        if any(f"{path}.{own}" in of for own, _ in module.named_parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, path=path: called.append(path))
    pipe = families.build(name)
    setattr(pipe, families.FAMILIES[name].denoisers[0], denoiser)
    with torch.no_grad():
        pipe(**{**families.inputs(name), "num_inference_steps": 1})
    # The layers in which the modules were first called, one after the other.
    order = [next(of[n] for n in of if n.startswith(f"{path}.")) for path in dict.fromkeys(called)]
    assert order == sorted(order)
    assert set(order) == set(range(len(layers)))


def test_a_text_encoder_belongs_to_the_first_layer() -> None:
    unet, encoder = tiny.build("sd").unet, tiny.build("sd").text_encoder
    layers = layers_of(base_models.NoiseObjective(unet, None, encoder))
    first = {id(p) for p in layers[0]}
    assert first >= {id(p) for p in encoder.parameters()} | {id(p) for p in unet.conv_in.parameters()}
    assert not first & {id(p) for p in unet.mid_block.parameters()}
    assert {id(p) for p in layers[-1]} >= {id(p) for p in unet.conv_out.parameters()}


def test_every_layer_is_the_first_equally_often() -> None:
    layers = [[nn.Parameter(torch.zeros(()))] for _ in range(5)]
    drawn = [len(dropped_in_step([layers], 3, step)) for step in range(1000)]
    # Six standard deviations of a count with mean 200 are 76.
    assert all(abs(drawn.count(k) - 200) < 76 for k in range(5))
    assert set(drawn) == set(range(5))
    assert drawn == [len(dropped_in_step([layers], 3, step)) for step in range(1000)]
    assert drawn != [len(dropped_in_step([layers], 4, step)) for step in range(1000)]
    # Of two networks, the same share is dropped.
    both = dropped_in_step([layers, layers * 2], 3, next(i for i, k in enumerate(drawn) if k == 4))
    assert len(both) in (4 + 8, 4 + 9)


def test_backpropagation_stops_at_the_first_layer_that_is_updated() -> None:
    unet = base_models.build_pixel_unet((8, 8, 16))
    layers = layers_of(unet)
    reached = {}
    for name, module in [*unet.named_children(), *unet.down_blocks.named_children()]:
        if not isinstance(module, nn.ModuleList):
            module.register_full_backward_pre_hook(lambda *_, name=name: reached.setdefault(name))
    dropped = [p for layer in layers[:4] for p in layer]  # up to the middle block
    with frozen(dropped):
        unet(torch.randn(2, 1, 32, 32), 5).sample.square().mean().backward()
    assert set(reached) == {"conv_out", "conv_act", "conv_norm_out"}
    assert all(p.requires_grad for p in unet.parameters())
    assert {id(p) for p in unet.parameters() if p.grad is None} == {id(p) for p in dropped}


def test_gradients_after_a_frozen_prefix_are_those_without() -> None:
    """Also where torch itself ends the process: a normalisation of an attention layer's output, without a gradient."""
    unet = base_models.build_pixel_unet((8, 8, 16))
    layers, x = layers_of(unet), torch.randn(2, 1, 32, 32)
    unet(x, 5).sample.square().mean().backward()
    whole = {id(p): p.grad for p in unet.parameters()}
    for first in range(len(layers)):
        unet.zero_grad()
        with frozen([p for layer in layers[:first] for p in layer]):
            unet(x, 5).sample.square().mean().backward()
        for parameter in (p for layer in layers[first:] for p in layer):
            # The same sums in another layout of the memory.
            torch.testing.assert_close(parameter.grad, whole[id(parameter)], rtol=1e-3, atol=1e-6)


def test_convolutions_in_groups_and_modulations_are_left_to_adamw() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict()])})
    block = model["blocks"][0]
    block["conv"], block["mix"] = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
    block["norm1"] = nn.ModuleDict({"linear": nn.Linear(4, 8)})
    block["time_emb_proj"], block["routing"] = nn.Linear(4, 4), nn.Linear(4, 2)
    model["proj_out"] = nn.Linear(4, 4)
    assert hidden_matrices(model) == ["blocks.0.conv.weight"]


def test_matrices_of_loras_are_muons() -> None:
    unet = tiny.build("sd").unet
    add_lora(unet, 2)
    wrapped = nn.ModuleDict({"denoiser": unet})
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained
    assert sorted(hidden_matrices(wrapped)) == sorted(trained)


def trainer(tmp_path: object, *argv: str) -> argparse.Namespace:
    parser = add_training_arguments(argparse.ArgumentParser())
    return parser.parse_args(["--output_dir", str(tmp_path), *argv])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--use_8bit_adam", "--optimizer", "muon"), "--use_8bit_adam is for --optimizer adamw, got muon"),
        (("--use_8bit_adam",), "needs the package bitsandbytes"),
        (("--drop_muon_sharp", "--optimizer", "muon"), "--drop_muon_sharp has no effect on --optimizer muon"),
        (("--drop_muon_sharp",), "no effect on --optimizer adamw"),
    ],
)
def test_optimizers_that_cannot_be_are_refused_at_the_start(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        make_accelerator(trainer(tmp_path, *argv))


@pytest.mark.parametrize("name", ["muon", "drop_muon"])
def test_sharded_networks_are_refused(tmp_path: object, name: str) -> None:
    args = trainer(tmp_path, "--optimizer", name)
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        accelerator = SimpleNamespace(distributed_type=kind)
        with pytest.raises(
            ValueError, match=rf"--optimizer {name} needs whole matrices, and {kind.value} shards"
        ):
            check_optimizer(args, accelerator)  # type: ignore[arg-type]


def test_8bit_adam_is_that_of_bitsandbytes(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class AdamW8bit(torch.optim.AdamW):
        """Stands for the one of the package, which need not be installed."""

    package = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    args = trainer(tmp_path, "--use_8bit_adam", "--adam_beta1", "0.5", "--adam_weight_decay", "0.25")
    made = make_optimizer(args, network(), 0.125)
    assert isinstance(made, AdamW8bit)
    group = made.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.125, (0.5, 0.999), 0.25)


def test_the_arguments_reach_muon_and_adamw(tmp_path: object) -> None:
    unet = base_models.build_pixel_unet((8, 8, 16)).requires_grad_(True)
    unet.conv_in.requires_grad_(False)
    args = trainer(
        tmp_path,
        *("--optimizer", "drop_muon", "--drop_muon_sharp", "--adam_beta2", "0.5", "--adam_epsilon", "0.25"),
    )
    made = make_optimizer(args, unet, 0.125)
    assert isinstance(made, Muon)
    assert made._sharp
    assert made._adamw is not None
    assert (made._adamw.defaults["betas"], made._adamw.defaults["eps"]) == ((0.9, 0.5), 0.25)
    given = {id(p) for group in made.param_groups for p in group["params"]}
    assert given == {id(p) for p in unet.parameters() if p.requires_grad}
    assert [group["lr"] for group in made.param_groups] == [0.125, 0.125]


def test_networks_without_blocks_are_refused(tmp_path: object) -> None:
    args = trainer(tmp_path, "--optimizer", "muon")
    with pytest.raises(ValueError, match="needs matrices in blocks, of which Linear has none"):
        make_optimizer(args, nn.Linear(2, 2), 1e-3)
    with pytest.raises(ValueError, match="needs a network with two blocks or more, got ModuleDict"):
        layers_of(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)])}))


def test_a_sharded_parameter_is_named(tmp_path: object) -> None:
    class Sharded(nn.Parameter):
        """Has what tells a DTensor from others."""

        def full_tensor(self) -> torch.Tensor:
            return self.data

    with pytest.raises(ValueError, match=r"4\.weight is sharded over processes"):
        Muon([("4.weight", Sharded(torch.zeros(2, 2)))], ["4.weight"])


def test_what_muon_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="0 is a Conv3d with a weight of shape"):
        hidden_matrices(nn.Sequential(nn.Conv3d(2, 2, 1)))
