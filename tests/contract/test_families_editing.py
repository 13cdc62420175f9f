"""Interpolation, inversion, editing and null-text inversion on every family of `tests/families.py`."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import diffusers_ext as dx
from diffusers_ext.core.noise import slerp
from diffusers_ext.core.pipeline import initial_noise
from diffusers_ext.core.schedules import first_order_scheduler
from diffusers_ext.smooth_lora import editing, interpolation, inversion, null_text
from tests import families
from tests.contract.probe import BATCH, differ, plain, record

STEPS = 5
SWITCH = 2  # the steps before the change of the prompt

# Families that are refused, with a part of the message.
_NO_NOISE = {
    "sdxl-img2img": "starts from an image",
    "dit": "no argument prompt=",
    "ldm": "no encode_prompt",
    "ddpm": "no argument prompt=",
    **dict.fromkeys(("modular-sdxl", "modular-flux"), "is a Modular pipeline"),
    **dict.fromkeys(("wan", "wan22", "ltx", "cogvideox"), "makes videos"),
}
_DISTILLED = {**_NO_NOISE, "lcm": "distilled to a few steps"}
KNOWN: dict[str, dict[str, str]] = {
    "interpolation": {**_NO_NOISE, "kandinsky5": "between two lengths there is none"},
    "inversion": _DISTILLED,
    "editing": _DISTILLED,
    "null-text inversion": {
        **dict.fromkeys(families.NAMES, "the conditioning and the guidance of StableDiffusionPipeline"),
        "sd-ip-adapter": "has an IP-Adapter",
    },
}
for _works in ("sd", "sd2"):
    del KNOWN["null-text inversion"][_works]
CHECKS = {
    "interpolation": interpolation.check_pipeline,
    "inversion": inversion.check_pipeline,
    "editing": editing.check_pipeline,
    "null-text inversion": null_text.check_pipeline,
}


def works(column: str) -> Any:
    return pytest.mark.parametrize("name", [name for name in families.NAMES if name not in KNOWN[column]])


def call(name: str, **changes: Any) -> dict[str, Any]:
    """A guided call without prompts."""
    options = {**families.inputs(name, BATCH, steps=STEPS), **changes}
    return {key: value for key, value in options.items() if key not in ("prompt", "output_type")}


def noise(name: str, pipe: Any) -> Tensor:
    """The noise of the call that the families' tests make, for `latents=`."""
    options = {**call(name), "prompt": families.inputs(name, BATCH)["prompt"]}
    return initial_noise(pipe, {**options, "generator": families.generators(BATCH)})


def first_order(pipe: Any) -> Any:
    """The pipeline with the scheduler of inversion and editing."""
    pipe.scheduler = first_order_scheduler(pipe.scheduler)
    return pipe


# --- refusals ---


def _run(column: str, name: str, pipe: Any) -> None:
    grid = torch.zeros(BATCH, 4, 8, 8)
    if column == "interpolation":
        options = {key: value for key, value in call(name).items() if key != "num_frames"}
        dx.interpolate(pipe, ["a", "b"], num_frames=2, progress=False, **options)
    elif column == "inversion":
        dx.ddim_invert(pipe, grid, "a")
    elif column == "editing":
        dx.edit(pipe, "a", "b", latents=grid)
    else:
        dx.null_text_invert(pipe, grid, "a")


@pytest.mark.parametrize(("column", "name"), list(itertools.product(KNOWN, families.NAMES)))
def test_a_family_is_refused_by_name_or_accepted(column: str, name: str) -> None:
    pipe = families.build(name)
    message = KNOWN[column].get(name)
    if message is None:
        CHECKS[column](pipe)
    for refused in [lambda: CHECKS[column](pipe), lambda: _run(column, name, pipe)]:
        if message is not None:
            with pytest.raises(ValueError, match=message):
                refused()


# --- interpolation ---


def _mean(value: Any) -> Any:
    """What two prompts are encoded to → what belongs half way between them, with one row."""
    if isinstance(value, tuple):
        return tuple(_mean(part) for part in value)
    if isinstance(value, list) and value:
        rows = [torch.nn.functional.pad(v, (0, 0, 0, max(map(len, value)) - len(v))) for v in value]
        return [(rows[0] + rows[1]) / 2]
    if not isinstance(value, Tensor) or (value.ndim == 2 and value.shape[1] == 3):  # positions of the tokens
        return value
    if value.ndim == 2 and bool(((value == 0) | (value == 1)).all()):
        return value.amax(0, keepdim=True)  # a mask
    return ((value[:1].double() + value[1:].double()) / 2).to(value.dtype)


@works("interpolation")
def test_interpolation(name: str) -> None:
    pipe, prompts = families.build(name), families.inputs(name, BATCH)["prompt"]
    latents = noise(name, pipe)
    # In hunyuan-dit, the scheduler adds noise at every step.
    torch.manual_seed(3)
    more = {"latents": latents, **_one_picture(name)}
    own = families.images(pipe, name, BATCH, steps=STEPS, output_type="np", generator=None, **more)
    options = {**call(name), **more, "progress": False}
    torch.manual_seed(3)
    ends = dx.interpolate(pipe, prompts, num_frames=2, **options)
    assert np.array_equal(ends, own.numpy())
    frames = [dx.interpolate(pipe, prompts, num_frames=3, batch_size=n, **options) for n in (1, 2, 3)]
    if name not in ("hunyuan-dit", "lcm"):
        for found in frames:
            # Batches of other sizes: rounding, which grows from step to step.
            assert not differ("the ends", torch.from_numpy(found[[0, 2]]), own, 2e-3)
        assert not differ("the middle", torch.from_numpy(frames[0][1]), torch.from_numpy(frames[2][1]), 2e-3)
        assert not differ(
            "the middle", torch.from_numpy(frames[0][1:2]), _middle(name, latents, prompts), 2e-3
        )
    assert torch.equal(families.images(pipe, name, BATCH, steps=STEPS), plain(name).images)


def _one_picture(name: str) -> dict[str, Any]:
    given = call(name)
    return {"image": given["image"][:1]} if "image" in given else {}


def _middle(name: str, latents: Tensor, prompts: list[str]) -> Tensor:
    """The image of a call that gets the mean of both prompts' encodings from `encode_prompt`."""
    pipe, both, pair = families.build(name), families.build(name), []
    own = both.encode_prompt

    def note(*args: Any, **kwargs: Any) -> Any:
        pair.append(own(*args, **kwargs))
        return pair[-1]

    vars(both)["encode_prompt"] = note
    families.images(both, name, BATCH, steps=1, prompt=prompts)
    means = iter([_mean(value) for value in pair])
    vars(pipe)["encode_prompt"] = lambda *args, **kwargs: next(means)
    half = slerp(latents[:1], latents[1:], 0.5)
    return families.images(pipe, name, 1, steps=STEPS, latents=half, output_type="np", **_one_picture(name))


# --- inversion ---


# The others are slow: each makes two hundred steps.
_QUICK = ("sd", "sd3", "flux", "flux2", "qwen", "zimage", "sana", "lumina2")


@pytest.mark.parametrize(
    "name",
    [
        name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in families.NAMES
        if name not in KNOWN["inversion"]
    ],
)
def test_inversion_converges(name: str) -> None:
    family, pipe = families.FAMILIES[name], mild(name)
    shape = family.latents
    channels, *sizes = (shape[-1], *shape[1:3]) if name == "kandinsky5" else shape
    latents = 0.5 * torch.randn(BATCH, channels, *sizes, generator=torch.Generator().manual_seed(0))
    wanted = latents.movedim(1, -1).unsqueeze(1) if name == "kandinsky5" else latents
    prompts = families.inputs(name, BATCH)["prompt"]
    size = {key: value for key, value in family.call.items() if key not in ("height", "width")}
    size |= family.rows(range(BATCH), False) if family.rows else {}
    size = {key: value for key, value in size.items() if key != "pag_scale"}
    errors = []
    # DDIM's first steps are long for a random network, so the order shows only with more of them than for a flow.
    for steps in (40, 160) if family.kind == "diffusion" else (10, 40):
        before = pipe.scheduler
        found = dx.ddim_invert(pipe, latents, prompts, num_inference_steps=steps, **size)
        assert pipe.scheduler is before
        errors.append(float((unguided_end(name, found, steps) - wanted).norm() / wanted.norm()))
    # Of first order: four times as many steps, a quarter of the error; less than half of it shows that.
    assert errors[1] < 0.5 * errors[0], errors
    assert errors[1] < 0.1, errors


def mild(name: str) -> Any:
    """The pipeline with smaller outputs: those of random networks change too fast for DDIM's steps."""
    pipe, factor = families.build(name), 0.05 if families.FAMILIES[name].kind == "diffusion" else 0.3
    for network in families.denoisers(pipe, name):
        network.register_forward_hook(
            lambda module, args, output: tree_map(lambda value: factor * value, output)
        )
    return pipe


def unguided_end(name: str, latents: Tensor, steps: int) -> Tensor:
    pipe = first_order(mild(name))
    changes: dict[str, Any] = {"pag_scale": 0.0} if name == "sd-pag" else {}
    if families.FAMILIES[name].embedded:
        changes["guidance_scale"] = 1.0
    return record(pipe, name, guided=False, latents=latents, num_inference_steps=steps, **changes).end


# --- editing ---


class Calls:
    """Arguments of the networks that are computed, and the states after each step, of one call."""

    def __init__(self) -> None:
        self.networks: list[dict[str, Any]] = []
        self.states: list[Tensor] = []

    @contextlib.contextmanager
    def of(self, pipe: Any, name: str, replaced: dict[int, Tensor] | None = None) -> Iterator[None]:
        """Notes what happens in calls within the block; `replaced` states take the place of their own."""
        with contextlib.ExitStack() as undo:
            for network in families.denoisers(pipe, name):
                undo.callback(self._follow(network))
            kinds = type(first_order_scheduler(pipe.scheduler))
            step = kinds.step

            def noted(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
                result = step(scheduler, *args, **kwargs)
                state = result[0] if isinstance(result, tuple) else result.prev_sample
                if replaced and len(self.states) in replaced:
                    state = replaced[len(self.states)]
                    result = (
                        (state, *result[1:]) if isinstance(result, tuple) else type(result)(prev_sample=state)
                    )
                self.states.append(state.clone())
                return result

            patch = pytest.MonkeyPatch()
            undo.callback(patch.undo)
            patch.setattr(kinds, "step", noted)
            yield

    def _follow(self, network: nn.Module) -> Any:
        forward = network.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.networks.append({**{str(i): value for i, value in enumerate(args)}, **kwargs})
            return forward(*args, **kwargs)

        vars(network)["forward"] = noted
        return lambda: vars(network).pop("forward")


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list | tuple) else a == b


def conditioning(given: dict[str, Any]) -> dict[str, Any]:
    latents = (
        "0",
        "sample",
        "hidden_states",
        "x",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
    )
    return {key: value for key, value in given.items() if key not in latents}


@works("editing")
def test_editing(name: str) -> None:
    latents = noise(name, families.build(name))
    prompts = {"own": families.inputs(name, BATCH)["prompt"], "target": ["b qqqqqq", "c"]}
    plainly: dict[str, tuple[Calls, Tensor]] = {}

    def drawn(text: str, replaced: dict[int, Tensor] | None = None) -> tuple[Calls, Tensor]:
        pipe, calls = first_order(families.build(name)), Calls()
        with calls.of(pipe, name, replaced):
            changes = {"latents": latents, "prompt": prompts[text], "generator": None}
            return calls, families.images(pipe, name, BATCH, steps=STEPS, **changes)

    def edited(strength: float) -> tuple[Calls, Tensor]:
        pipe, calls = families.build(name), Calls()
        before = pipe.scheduler
        with calls.of(pipe, name):
            options = {**call(name), "latents": latents, "strength": strength, "output_type": "pt"}
            found = dx.edit(pipe, prompts["own"], prompts["target"], **options)
        assert pipe.scheduler is before
        assert not any("forward" in vars(network) for network in families.denoisers(pipe, name))
        assert torch.equal(families.images(pipe, name, BATCH, steps=STEPS), plain(name).images)
        return calls, found[0].float()

    plainly = {text: drawn(text) for text in prompts}
    for strength, text in ((0.0, "own"), (1.0, "target")):
        calls, images = edited(strength)
        assert torch.equal(images, plainly[text][1])
        assert equal(calls.networks, plainly[text][0].networks)
    calls, images = edited(1 - SWITCH / STEPS)
    first, then = plainly["own"][0], plainly["target"][0]
    each = len(then.networks) // STEPS
    # Every network call of the steps is computed once: the image's own, then the target's.
    assert equal(calls.networks[: SWITCH * each], first.networks[: SWITCH * each])
    after = [conditioning(given) for given in calls.networks[SWITCH * each :]]
    assert equal(after, [conditioning(given) for given in then.networks[SWITCH * each :]])
    assert not equal(after, [conditioning(given) for given in first.networks[SWITCH * each :]])
    # The first call and, after it, the second one.
    states = first.states[:SWITCH]
    assert equal(calls.states[:SWITCH], states)
    assert equal(calls.states[SWITCH : 2 * SWITCH], states)
    # The target's own call with the state of the other one put in its place is the edit.
    _, wanted = drawn("target", {SWITCH - 1: states[-1]})
    assert torch.equal(images, wanted)
    assert min(float((images - plainly[text][1]).abs().max()) for text in prompts) > 1e-4


# --- null-text inversion ---


@works("null-text inversion")
def test_null_text_inversion(name: str) -> None:
    pipe = families.build(name)
    latents = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = families.inputs(name, BATCH)["prompt"]
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "progress": False}
    found = dx.null_text_invert(pipe, latents, prompts, num_inner_steps=3, **options)
    kept = dx.null_text_invert(pipe, latents, prompts, num_inner_steps=0, **options)
    errors = []
    for inverted in (found, kept):
        again = dx.reconstruct(pipe, inverted, output_type="latent").images
        errors.append(float((again - latents).square().mean()))
        # The last state of the optimization is where the pipeline arrives.
        assert errors[-1] == pytest.approx(float(inverted.losses[-1]), rel=1e-2)
    assert errors[0] < errors[1]
    assert torch.equal(families.images(pipe, name, BATCH, steps=STEPS), plain(name).images)
