"""Editing by a change of the prompt on the way."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext.core.prompts import encode_prompts
from diffusers_ext.smooth_lora.editing import edit
from tests import tiny

STEPS = 5
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "pt"}
SOURCE, TARGET = ["a aaa", "a bbb"], ["a ccc", "a ddd"]
each = pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def drawn(name: str, prompts: list[str], guidance_scale: float) -> torch.Tensor:
    pipe = tiny.build(name)
    kind = FlowMatchEulerDiscreteScheduler if name == "sd3" else DDIMScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe(prompts, latents=noise(), height=8, width=8, guidance_scale=guidance_scale, **CALL).images


@each
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_no_strength_redraws_and_full_strength_draws_the_target(name: str, guidance_scale: float) -> None:
    pipe = tiny.build(name)
    before = pipe.scheduler
    options = {"latents": noise(), "guidance_scale": guidance_scale, **CALL}
    kept, new = (edit(pipe, SOURCE, TARGET, strength=s, **options).images for s in (0.0, 1.0))
    assert pipe.scheduler is before
    # Embeddings given directly: rounding.
    assert torch.allclose(kept, drawn(name, SOURCE, guidance_scale), atol=1e-4)
    assert torch.allclose(new, drawn(name, TARGET, guidance_scale), atol=1e-4)
    half = edit(pipe, SOURCE, TARGET, strength=0.6, **options).images
    assert min((half - other).abs().max() for other in (kept, new)) > 3e-4  # more than rounding


@each
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_every_step_sees_the_embeddings_of_its_share(name: str, guidance_scale: float) -> None:
    pipe = tiny.build(name)
    denoiser = pipe.transformer if name == "sd3" else pipe.unet
    seen: list[tuple[torch.Tensor, ...]] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        pooled = kwargs.get("pooled_projections", (kwargs.get("added_cond_kwargs") or {}).get("text_embeds"))
        seen.append((kwargs["encoder_hidden_states"], *([] if pooled is None else [pooled])))

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    edit(pipe, SOURCE, TARGET, latents=noise(), strength=0.6, guidance_scale=guidance_scale, **CALL)
    handle.remove()
    assert len(seen) == STEPS
    guided = guidance_scale > 1
    for number, parts in enumerate(seen):
        encoded = encode_prompts(pipe, SOURCE if number < 2 else TARGET, guided)
        wanted = [encoded["prompt_embeds"], *([encoded["pooled_prompt_embeds"]] if len(parts) > 1 else [])]
        free = [encoded.get("negative_prompt_embeds"), encoded.get("negative_pooled_prompt_embeds")]
        for part, positive, negative in zip(parts, wanted, free, strict=False):
            assert torch.allclose(part[-2:], positive, atol=1e-5)
            assert len(part) == (4 if guided else 2)
            if guided:
                assert torch.allclose(part[:2], negative, atol=1e-5)


def test_unconditional_embeddings_of_every_step_are_used() -> None:
    pipe = tiny.build("sd")
    empty = encode_prompts(pipe, SOURCE)["negative_prompt_embeds"]
    options = {"latents": noise(), "guidance_scale": 4.0, "strength": 0.6, **CALL}
    plain = edit(pipe, SOURCE, TARGET, **options).images
    same = edit(pipe, SOURCE, TARGET, null_embeds=empty.expand(STEPS, *empty.shape), **options).images
    assert torch.equal(same, plain)
    others = empty.expand(STEPS, *empty.shape).clone()
    others[-1] += 1  # the last step alone
    assert not torch.equal(edit(pipe, SOURCE, TARGET, null_embeds=others, **options).images, plain)


def test_refusals() -> None:
    pipe = tiny.build("sd")
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\], got 1.2"):
        edit(pipe, SOURCE, TARGET, latents=noise(), strength=1.2)
    with pytest.raises(ValueError, match="2 latents need 1 or 2 prompts, got 3"):
        edit(pipe, ["a", "b", "c"], TARGET, latents=noise())
    with pytest.raises(ValueError, match="made for 3 steps with guidance, got num_inference_steps 5"):
        edit(pipe, SOURCE, TARGET, latents=noise(), null_embeds=torch.zeros(3, 2, 77, 16), **CALL)
