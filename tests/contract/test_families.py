"""Every family of `tests/families.py` is what its record says; methods work on it or refuse it (`probe.py`)."""

import inspect
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from tests import families
from tests.contract.probe import (
    BATCH,
    HELPERS,
    METHODS,
    PADS,
    STEPS,
    Outcome,
    differ,
    plain,
    probe,
    probe_helper,
)

REFUSED, IN_CALL = "refused", "refused in the call"

# Cells that do not work, by method. Crashes and wrong results are failures that are known, with their reasons.
_TELEPORT: dict[str, str | tuple[str, str]] = {
    "sdxl-img2img": REFUSED,  # it starts from an image
    "lcm": REFUSED,  # its scheduler
    "modular-flux": REFUSED,  # packed latents, of which nothing tells the size
}
_NO_PROMPT = dict.fromkeys(("dit", "ldm", "ddpm", "modular-sdxl", "modular-flux"), REFUSED)
KNOWN: dict[str, dict[str, str | tuple[str, str]]] = {
    "teleport": _TELEPORT,
    "teleport-first-call": _TELEPORT,
    "teleport-prompt-map": {
        **_TELEPORT,
        **_NO_PROMPT,
        # They rescale guided outputs, Lumina 2 by default; see tests/teleport/test_guidance.py for other calls.
        **dict.fromkeys(("qwen", "lumina2"), IN_CALL),
    },
    "golden-noise": {
        **_NO_PROMPT,
        "sdxl-img2img": REFUSED,  # it starts from an image
        **dict.fromkeys(("wan", "wan22", "ltx", "cogvideox"), REFUSED),  # videos
    },
    "smooth-lora": {
        **dict.fromkeys(("pixart", "hunyuan-dit", "dit", "ddpm"), REFUSED),  # diffusers loads no LoRA there
        "wan22": REFUSED,  # it has two networks
    },
}
_FROM_IMAGE = {"sdxl-img2img": REFUSED}
_NO_NOISE = dict.fromkeys(_NO_PROMPT, REFUSED)  # they have no prepare_latents
KNOWN |= {
    "encode_prompts": {
        **dict.fromkeys(_NO_PROMPT, REFUSED),
        # encode_prompt returns other values.
        **dict.fromkeys(
            ("flux2", "flux2-klein", "qwen", "sana", "pixart", "hunyuan-dit", "lumina2"), REFUSED
        ),
        **dict.fromkeys(("auraflow", "chroma", "kandinsky5", "ltx", "zimage"), REFUSED),
    },
    "initial_noise": {**_NO_NOISE, **_FROM_IMAGE},
    "model_output": {**_NO_NOISE, **_FROM_IMAGE},
    "pipeline_samples": dict.fromkeys(("dit", "modular-sdxl", "modular-flux"), REFUSED),
    "encode_images": dict.fromkeys(("modular-sdxl", "modular-flux"), REFUSED),
}


def _known(column: str, name: str) -> tuple[str, str]:
    found = KNOWN.get(column, {}).get(name, "works")
    return (found, "") if isinstance(found, str) else found


def _cells(columns: Iterable[str]) -> list[Any]:
    cells = []
    for column, name in itertools.product(columns, families.NAMES):
        state, reason = _known(column, name)
        fails = state in ("crashes", "wrong")
        marks = [pytest.mark.xfail(strict=True, reason=f"{state}: {reason}")] if fails else []
        cells.append(pytest.param(column, name, id=f"{column}-{name}", marks=marks))
    return cells


def _check(outcome: Outcome, column: str, name: str) -> None:
    known, _ = _known(column, name)
    if known in ("crashes", "wrong"):
        assert outcome.state in ("works", REFUSED, IN_CALL), outcome.reason
    else:
        assert outcome.state == known, outcome.reason


@pytest.mark.parametrize(("method", "name"), _cells(METHODS))
def test_a_method_works_or_is_refused(method: str, name: str) -> None:
    _check(probe(method, name), method, name)


@pytest.mark.parametrize(("helper", "name"), _cells(HELPERS))
def test_a_function_of_core_works_or_refuses(helper: str, name: str) -> None:
    _check(probe_helper(helper, name), helper, name)


@pytest.mark.parametrize("name", families.NAMES)
def test_a_family_is_what_its_record_says(name: str) -> None:
    family, run = families.FAMILIES[name], plain(name)
    assert run.images.isfinite().all()
    assert len(run.images) == BATCH
    assert set(run.networks) == set(range(len(family.denoisers)))
    assert run.shown[0].shape[1:] == families.latent_shape(name)
    assert torch.equal(families.images(families.build(name), name, BATCH, steps=STEPS), run.images)
    assert not torch.equal(
        families.images(families.build(name, seed=1), name, BATCH, steps=STEPS), run.images
    )
    singles = families.one_by_one(families.build(name), name, BATCH, steps=STEPS)
    assert bool(differ("", singles, run.images)) == (name in PADS)
    call = inspect.signature(families.build(name).__call__).parameters
    if family.guidance:
        assert family.guidance in call
        assert differ("", plain(name, guided=False).images, run.images, 1e-3)
    if family.prompted:
        others = families.images(families.build(name), name, BATCH, steps=STEPS, prompt=["b q"] * BATCH)
        assert differ("", others, run.images, 1e-4)
    if run.embeds is not None:
        assert isinstance(run.embeds, list) == family.prompt_lists
