"""Projectors of flows in training: every layout takes a step, and is saved as what was trained."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.sign.conditions import Texts
from diffusers_ext.sign.flows import hold_in_weights, holds_in_weights
from diffusers_ext.sign.lora import lora_copy
from diffusers_ext.sign.objective import LossWeights
from diffusers_ext.sign.pairs import euler_flow
from diffusers_ext.sign.scores import Scores
from diffusers_ext.sign.teacher import untrained_projector
from diffusers_ext.sign.training import SIGNObjective
from tests import families, tiny

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["a aaa", "a bbbbbbb"]


def length(name: str) -> int:
    return families.FAMILIES[name].call.get("max_sequence_length", 16)


def batch(pipe: Any, sign: Any, shape: tuple[int, ...], max_length: int, step: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    names = ("noise", "drawn", "data", "data_noise", "score_noise", "fake_noise", "again_noise")
    found: dict[str, Any] = {name: torch.randn(2, *shape, generator=draw) for name in names}
    names = ("level", "score_time", "fake_time", "again", "again_level")
    found |= {name: torch.rand(2, generator=draw) for name in names}
    texts = Texts(pipe, sign, torch.device("cpu"), max_length).batch(PROMPTS, guided=True)
    return {"step": step, **found, **texts}


def moved(network: Any) -> Tensor:
    """The largest gradient of each trained parameter, or None."""
    found = [p.grad.abs().max() for p in network.parameters() if p.requires_grad and p.grad is not None]
    return torch.stack(found) if found else torch.zeros(1)


@pytest.mark.parametrize("name", families.TRANSFORMERS)
def test_every_layout_trains_saves_and_generates(name: str, tmp_path: Path) -> None:
    pipe, shape = families.build(name), families.latent_shape(name)
    sign = untrained_projector(pipe, max_sequence_length=length(name), in_weights=False)
    assert sign.transformer is pipe.transformer
    teacher = copy.deepcopy(sign.transformer)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    sign.transformer.requires_grad_(True)
    weights = LossWeights(reg=0.5, flow=1, denoise=0.5)
    model = SIGNObjective(sign.projector, teacher, weights, Scores(guidance_scale=2, renoised_share=0.5))
    loss = model(**batch(pipe, sign, shape, length(name)))
    loss.backward()
    assert torch.isfinite(loss)
    for network in model.networks():
        assert torch.isfinite(moved(network)).all()
        assert moved(network).max() > 0
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())

    call: dict[str, Any] = {"latents": torch.randn(2, *shape), "output_type": "latent"}
    factor = sign.vae_scale_factor
    call |= {side: n * factor for side, n in zip(("height", "width"), shape[1:])}
    made = sign(PROMPTS, **call).images
    if holds_in_weights(sign):
        hold_in_weights(sign)
    assert holds_in_weights(sign) == (name != "flux2")
    sign.transformer.save_pretrained(tmp_path)
    loaded = type(sign.transformer).from_pretrained(tmp_path)
    again = dx.SIGNPipeline(**{**sign.components, "transformer": loaded}, **sign.parameters)
    again.set_progress_bar_config(disable=True)
    # Held in the weights, and rounded there.
    found = again(PROMPTS, **call).images
    assert float((found - made).abs().max()) <= 1e-4 * float(made.abs().max())
    untrained = untrained_projector(families.build(name), max_sequence_length=length(name))
    assert float((untrained(PROMPTS, **call).images - made).abs().max()) > 1e-3 * float(made.abs().max())


def test_both_networks_are_called_at_the_level_of_their_input() -> None:
    pipe = tiny.build("sd3")
    sign = untrained_projector(pipe, max_sequence_length=4, in_weights=False)
    projector, x = sign.projector, torch.randn(2, 4, 8, 8)
    texts = sign._conditions(PROMPTS, 2)
    times = projector.times(torch.tensor([300.0, 700.0]))
    given = {"encoder_hidden_states": texts["prompt_embeds"], "return_dict": False}
    with torch.no_grad():
        found = projector.denoise(pipe.transformer, x, times, **texts)
        velocity = pipe.transformer(
            x, timestep=times, pooled_projections=texts["pooled_prompt_embeds"], **given
        )[0]
    sigma = torch.tensor([0.3, 0.7]).reshape(2, 1, 1, 1)
    assert torch.allclose(found, x - sigma * velocity, atol=1e-5)
    alpha, own = projector.levels(times, x)
    assert torch.allclose(own, sigma)
    assert torch.allclose(alpha + own, torch.ones(2, 1, 1, 1))
    model = SIGNObjective(projector, copy.deepcopy(pipe.transformer), LossWeights())
    ends = model._score_times(torch.tensor([0.0, 1.0]))
    # From σ = .02 up to four times the noise level 1.5, which is σ/(1 − σ) = 6.
    assert ends.tolist() == pytest.approx([20, 1000 * 6 / 7])


def test_euler_steps_follow_the_flow_of_one_picture() -> None:

    class Flow:
        def velocity(self, network: Any, x: Tensor, sigmas: Tensor, guidance: None) -> Tensor:
            return (x - 0.3) / sigmas.reshape(-1, 1, 1, 1)

    from diffusers_ext.sign.flows import FlowProjector

    projector = FlowProjector(torch.nn.Identity(), Flow(), 600)  # type: ignore[arg-type]
    noise = torch.randn(2, 1, 4, 4)
    for start, x in ((1000, noise), (600, 0.4 * 0.3 + 0.6 * noise)):
        found = euler_flow(projector, x, 3, timestep=start)
        assert torch.allclose(found, torch.full_like(found, 0.3), atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_loras_share_one_frozen_network(name: str) -> None:
    pipe = tiny.build(name)
    options = {"max_sequence_length": 4} if name == "sd3" else {}
    sign = untrained_projector(pipe, in_weights=False, **options)
    base = sign.network.requires_grad_(False)
    own, fake = lora_copy(base, pipe, 2), lora_copy(base, pipe, 2)
    sign.register_modules(**{"unet" if sign.flow is None else "transformer": own})
    shared = {id(p) for p in base.parameters()}
    assert shared <= {id(p) for p in own.parameters()}
    assert shared <= {id(p) for p in fake.parameters()}
    trained = [{id(p) for p in n.parameters() if p.requires_grad} for n in (own, fake)]
    assert not trained[0] & trained[1]
    assert not any("lora" in key for key in base.state_dict())
    # Off is bit-equal: the teacher has no adapter to be switched off.
    plain = untrained_projector(tiny.build(name), in_weights=False, **options).network
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in base.state_dict().items())

    texts = Texts(pipe, sign, torch.device("cpu"), options.get("max_sequence_length"))
    texts.size = 8, 8
    given = batch(pipe, sign, (4, 8, 8), 4) if name == "sd3" else {}
    if not given:
        given = {**batch(tiny.build("sd"), sign, (4, 8, 8), 4)}
        given = {key: v for key, v in given.items() if "encoder" not in key}
        given |= texts.batch(PROMPTS, guided=True)
    model = SIGNObjective(sign.projector, base, LossWeights(), Scores(guidance_scale=2), fake=fake)
    model(**given).backward()
    assert moved(own).max() > 0
    assert moved(fake).max() > 0
    assert all(p.grad is None for p in base.parameters())
    before = {key: value.clone() for key, value in base.state_dict().items()}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
