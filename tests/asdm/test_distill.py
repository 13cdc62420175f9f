"""The distillation losses by hand, the captured features, and the objective of a step."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusers_ext.asdm.distill import (
    BlockFeatures,
    DistillObjective,
    DistillWeights,
    block_names,
    feature_loss,
    semantic_loss,
    shared_blocks,
)
from diffusers_ext.core.predictions import weighted_mse
from tests import tiny

# Float64 sums in another order.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unet(seed: int = 0, **config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tiny.unet(**config).double()


def scheduler(kind: str = "epsilon") -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")


def objective(
    weights: DistillWeights | None = None, kind: str = "epsilon", **arguments: Any
) -> DistillObjective:
    return DistillObjective(unet(1), unet(0), scheduler(kind), weights, **arguments)


def batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    return {
        "latents": draw(4, 4, 8, 8)[rows],
        "noise": draw(4, 4, 8, 8, seed=1)[rows],
        "timesteps": torch.tensor([5, 300, 600, 999])[rows],
        "encoder_hidden_states": draw(4, 5, 16, seed=2)[rows],
    }


# The losses


def test_output_loss() -> None:
    student, teacher = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    assert float(weighted_mse(student, student)) == 0
    assert float(weighted_mse(student, student + 2)) == pytest.approx(4)
    weights = torch.tensor([1.0, 0.0, 3.0])
    rows = [float((s - t).square().mean()) for s, t in zip(student, teacher)]
    assert float(weighted_mse(student, teacher)) == pytest.approx(sum(rows) / 3)
    assert float(weighted_mse(student, teacher, weights)) == pytest.approx((rows[0] + 3 * rows[2]) / 3)


def test_feature_loss_by_hand() -> None:
    student = {"a": draw(3, 2, 4, 4), "b": draw(3, 5, 2, 2, seed=1)}
    teacher = {"a": draw(3, 2, 4, 4, seed=2), "b": draw(3, 5, 2, 2, seed=3)}
    rows = [
        float((student[n][i] - teacher[n][i]).square().sum() / teacher[n][i].square().sum())
        for n in "ab"
        for i in range(3)
    ]
    assert float(feature_loss(student, teacher)) == pytest.approx(sum(rows) / 6)
    # A student that gives nothing is wrong by all of the teacher's feature.
    nothing = {name: torch.zeros_like(value) for name, value in teacher.items()}
    assert float(feature_loss(nothing, teacher)) == pytest.approx(1)
    assert float(feature_loss(teacher, teacher)) == 0


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_no_block_dominates(first: float, second: float) -> None:
    student, teacher = (
        {"a": draw(2, 3, 4, 4, seed=seed), "b": draw(2, 3, 2, 2, seed=seed + 1)} for seed in (0, 2)
    )
    expected = float(feature_loss(student, teacher))
    scaled = ({"a": first * x["a"], "b": second * x["b"]} for x in (student, teacher))
    assert float(feature_loss(*scaled)) == pytest.approx(expected)


def test_feature_loss_at_zero_and_in_half_precision() -> None:
    zero, one = {"a": torch.zeros(2, 3)}, {"a": torch.ones(2, 3)}
    assert float(feature_loss(one, zero)) == 1
    # The squares of 1000 are beyond float16.
    big = {"a": torch.full((2, 3), 1000.0, dtype=torch.float16)}
    assert float(feature_loss({"a": 2 * big["a"]}, big)) == 1
    assert float(weighted_mse(2 * big["a"], big["a"])) == 1e6


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 100))
def test_semantic_loss(scale: float) -> None:
    student, teacher = draw(3, 5, 4, 6), draw(3, 5, 4, 6, seed=1)
    a, b = student.mean((2, 3)), teacher.mean((2, 3))
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    assert float(semantic_loss(student, teacher)) == pytest.approx(float((1 - cosine).mean()))
    assert float(semantic_loss(scale * teacher, teacher)) == pytest.approx(0, abs=1e-9)
    assert float(semantic_loss(-scale * teacher, teacher)) == pytest.approx(2)
    # What is where does not count.
    assert float(semantic_loss(teacher.flip(2, 3), teacher)) == pytest.approx(0, abs=1e-9)


def test_shapes_and_names_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"shapes of a differ: \(2, 3\) of the student, \(2, 4\) of the"):
        feature_loss({"a": draw(2, 3)}, {"a": draw(2, 4)})
    with pytest.raises(ValueError, match=r"same blocks, got \['a'\] of the student and \['b'\]"):
        feature_loss({"a": draw(2, 3)}, {"b": draw(2, 3)})
    with pytest.raises(ValueError, match=r"same blocks, got \[\]"):
        feature_loss({}, {})
    with pytest.raises(ValueError, match="shapes of the semantic features differ"):
        semantic_loss(draw(1, 2, 3, 3), draw(1, 3, 3, 3))


def test_weights() -> None:
    assert DistillWeights() == DistillWeights(1.0, 1.0, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"finite and 0 or more, got \{'feature': -1, 'semantic': inf\}"):
        DistillWeights(feature=-1, semantic=float("inf"))
    with pytest.raises(ValueError, match="All weights are 0"):
        DistillWeights(0, 0, 0, 0)


# The features


def test_features_are_the_blocks_outputs_and_leave_no_trace() -> None:
    model = unet()
    names = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert block_names(model) == names
    given = batch()
    call = given["latents"], given["timesteps"], given["encoder_hidden_states"]
    with torch.no_grad():
        before = model(*call).sample
        with BlockFeatures(model, names) as features:
            assert torch.equal(model(*call).sample, before)
    assert list(features) == names
    shapes = [tuple(feature.shape) for feature in features.values()]
    assert shapes == [(4, 8, 4, 4), (4, 16, 4, 4), (4, 16, 4, 4), (4, 16, 8, 8), (4, 8, 8, 8)]
    # What follows the last block is known: so this is its output.
    last = model.conv_out(model.conv_act(model.conv_norm_out(features["up_blocks.1"])))
    assert torch.equal(last, before)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="stop"), BlockFeatures(model, names):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"UNet2DConditionModel has no up_blocks\.2, mid"):
        BlockFeatures(model, ["up_blocks.2", "mid_block", "mid"])


def test_shared_blocks() -> None:
    assert shared_blocks(unet(mid_block_type=None), unet()) == [
        "down_blocks.0",
        "down_blocks.1",
        "up_blocks.0",
        "up_blocks.1",
    ]


# The objective


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_losses_of_a_step(kind: str, gamma: float | None) -> None:
    made, given = objective(kind=kind, snr_gamma=gamma), batch()
    schedule: Any = made.scheduler
    noisy = schedule.add_noise(given["latents"], given["noise"], given["timesteps"])
    call = noisy, given["timesteps"], given["encoder_hidden_states"]
    with torch.no_grad():
        with BlockFeatures(made.student, made.blocks) as own:
            predicted: Any = made.student(*call).sample
        with BlockFeatures(made.teacher, made.blocks) as theirs:
            wanted: Any = made.teacher(*call).sample
        found = made.losses(**given)
    alpha2 = schedule.alphas_cumprod[given["timesteps"]].double()[:, None, None, None]
    target = {
        "epsilon": given["noise"],
        "sample": given["latents"],
        "v_prediction": alpha2.sqrt() * given["noise"] - (1 - alpha2).sqrt() * given["latents"],
    }[kind]
    weights = torch.ones(4)
    if gamma is not None:
        snr = compute_snr(schedule, given["timesteps"])
        weights = snr.clamp(max=gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
    expected = {
        "task": (weights * (predicted - target).square().mean((1, 2, 3))).mean(),
        "output": (weights * (predicted - wanted).square().mean((1, 2, 3))).mean(),
        "feature": feature_loss(own, theirs),
        "semantic": semantic_loss(own["mid_block"], theirs["mid_block"]),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        # The schedule's square roots are float32.
        torch.testing.assert_close(found[name], value.double(), rtol=1e-5, atol=1e-7, msg=name)
    total = expected["task"] + expected["output"] + expected["feature"] + 0.1 * expected["semantic"]
    torch.testing.assert_close(made(**given).detach(), total.double(), rtol=1e-5, atol=1e-7)


def test_a_student_that_is_the_teacher_has_the_task_alone() -> None:
    teacher = unet()
    made = DistillObjective(copy.deepcopy(teacher), teacher, scheduler())
    with torch.no_grad():
        found = made.losses(**batch())
    assert float(found["output"]) == float(found["feature"]) == 0
    assert float(found["semantic"]) == pytest.approx(0, abs=1e-12)
    assert float(found["task"]) > 0


def gradients(made: nn.Module, *calls: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    made.zero_grad()
    loss = torch.stack([made(**given) for given in calls]).mean()
    loss.backward()
    student: Any = getattr(made, "module", made).student
    return loss.detach(), [p.grad.clone() for p in student.parameters()]


def test_two_halves_are_the_whole() -> None:
    made = objective(snr_gamma=5.0)
    loss, grads = gradients(made, batch())
    halves, half_grads = gradients(made, batch(slice(2)), batch(slice(2, 4)))
    torch.testing.assert_close(halves, loss, **EXACT)
    for a, b in zip(grads, half_grads):
        torch.testing.assert_close(a, b, **EXACT)


def test_under_ddp_and_with_gradient_checkpointing(tmp_path: Path) -> None:
    made: Any = objective().train()
    loss, grads = gradients(made, batch())
    made.student.enable_gradient_checkpointing()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(made)
        for _ in range(2):
            again, found = gradients(wrapped, batch())
            torch.testing.assert_close(again, loss, **EXACT)
            for a, b in zip(grads, found):
                torch.testing.assert_close(a, b, **EXACT)
    finally:
        dist.destroy_process_group()
    assert not any(module._forward_hooks for module in made.modules())


def test_the_teacher_stays_as_it_is() -> None:
    made = objective()
    made.train()
    assert made.student.training
    assert not any(module.training for module in made.teacher.modules())
    made(**batch()).backward()
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())
    assert all(p.grad is not None for p in made.student.parameters())


def test_losses_of_weight_0_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = objective(DistillWeights(output=0, feature=0, semantic=0))
    monkeypatch.setattr(made.teacher, "forward", None)
    assert list(made.losses(**batch())) == ["task"]
    made = objective(DistillWeights(task=0, feature=0, output=0, semantic=1))
    assert list(made.losses(**batch())) == ["semantic"]
    with torch.no_grad():
        whole = objective(DistillWeights()).losses(**batch())
    assert float(made(**batch()).detach()) == pytest.approx(float(whole["semantic"]))


def test_without_a_mid_block_the_last_down_block_speaks() -> None:
    made = DistillObjective(unet(mid_block_type=None), unet(), scheduler())
    assert made.semantic_block == "down_blocks.1"
    assert torch.isfinite(made(**batch()))
    assert objective().semantic_block == "mid_block"


def test_sdxl_and_unconditional_networks() -> None:
    pipe = tiny.build("sdxl")
    made = DistillObjective(copy.deepcopy(pipe.unet), pipe.unet, scheduler())
    given = {name: x if name == "timesteps" else x.float() for name, x in batch().items()}
    given["encoder_hidden_states"] = draw(4, 5, 32).float()
    added = {"text_embeds": draw(4, 16).float(), "time_ids": draw(4, 6).float()}
    # A copy: rounding of zero.
    assert float(made.losses(**given, added_cond_kwargs=added)["output"]) == pytest.approx(0, abs=1e-10)
    plain = tiny.build("ddpm").unet
    made = DistillObjective(copy.deepcopy(plain), plain, scheduler())
    found = made.losses(draw(2, 3, 8, 8).float(), draw(2, 3, 8, 8, seed=1).float(), torch.tensor([3, 900]))
    assert float(found["feature"]) == pytest.approx(0, abs=1e-10)


def test_what_the_objective_refuses() -> None:
    network = unet()
    with pytest.raises(ValueError, match="same object: the student must be a copy"):
        DistillObjective(network, network, scheduler())
    with pytest.raises(ValueError, match="snr_gamma must be above 0 or None, got 0"):
        objective(snr_gamma=0)
    with pytest.raises(ValueError, match=r"got EulerDiscreteScheduler:\s+DDPMScheduler\.from_config"):
        DistillObjective(network, unet(), diffusers.EulerDiscreteScheduler())  # type: ignore[arg-type]
    strange = scheduler()
    strange.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="Unknown prediction_type 'flow'"):
        DistillObjective(network, unet(), strange)
    bare: Any = nn.Module()
    bare.down_blocks = bare.up_blocks = nn.ModuleList()
    with pytest.raises(ValueError, match="no block in common"):
        DistillObjective(bare, unet(), scheduler())
