"""What is saved gives the same images when it is loaded by another process, from a folder and from a Hub.

A process takes seconds to import diffusers, so one pushes everything and one for each order of imports loads it all.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from tests.hub_server import USER, Hub, hub_server
from tests.training.launching import environment

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# `import diffusers` alone does not import the table in which diffusers looks up components, its pipelines do.
ORDERS = {
    "package-first": "import diffusers_ext; import diffusers",
    "diffusers-first": "import diffusers; diffusers.DiffusionPipeline; import diffusers_ext",
}
# Everything is loaded before a module of the tests imports more of the package than a user would.
LOAD = """
import sys
{imports}
import json, pydoc
folder, target = sys.argv[1:]
loaded = {{}}
for name, (loader, absent) in json.load(open(folder + "/plan.json")).items():
    for source in ("{user}/" + name, folder + "/" + name):
        loaded[source] = pydoc.locate(loader).from_pretrained(source, **dict.fromkeys(absent))
from tests.contract.test_hub import draw
draw(loaded, target)
"""
PUSH = "import sys; from tests.contract.test_hub import push; push(*sys.argv[1:])"


@dataclass(frozen=True)
class Case:
    """A pipeline to save, how a user loads it and what is done with it then."""

    build: Callable[[], Any]
    images: Callable[[Any], Tensor]
    loader: str = "diffusers.DiffusionPipeline"
    rearm: Callable[[Any], Any] = lambda pipe: pipe


def _on(method: Any, name: str) -> Case:
    return Case(
        lambda: method.apply(tiny.build(name), name),
        lambda pipe: tiny.images(pipe, name, 2),
        rearm=method.rearm,
    )


def _golden_noise() -> Any:
    from diffusers_ext.golden_noise.pipelines import GoldenNoiseStableDiffusionPipeline

    return GoldenNoiseStableDiffusionPipeline.from_pipe(tiny.build("sd"), npnet=tiny.npnet("sd"))


def _sign() -> Any:
    from tests.sign.test_pipelines import build

    return build("sd")


def _asdm() -> Any:
    from diffusers_ext.asdm.unet import build_unet, unet_config

    pipe = tiny.build("sd")
    config = {**unet_config(pipe.unet), "gri_attention": {"paths": ["down_blocks.0"], "window": 4, "pool": 2}}
    pipe.unet = build_unet(config, pipe.unet.state_dict())
    return pipe


def cases() -> dict[str, Case]:
    from tests.contract.test_contract import METHODS

    def sd(pipe: Any) -> Tensor:
        return tiny.images(pipe, "sd", 2)

    def sign(pipe: Any) -> Tensor:
        call = {"prompt": ["a aaa", "a bbb"], "num_inference_steps": 2, "output_type": "pt"}
        return pipe(**call, generator=tiny.generators(2)).images

    saved = {key: method for key, method in METHODS.items() if method.saves}
    # A pipeline class of ours loads itself: diffusers finds no class of another package by its name.
    golden = "diffusers_ext.golden_noise.pipelines.GoldenNoiseStableDiffusionPipeline"
    return {
        **{f"{key}-{name}": _on(method, name) for key, method in saved.items() for name in method.pipelines},
        "asdm": Case(_asdm, sd),
        # Last, as these import more of the package than a user of the others would.
        "golden-noise": Case(_golden_noise, sd, golden),
        "sign": Case(_sign, sign, "diffusers_ext.SIGNPipeline"),
    }


def push(folder: str, target: str) -> None:
    """Saves every case as a folder and as a repository; its images go into the file `target`."""
    drawn, plan = {}, {}
    for name, case in cases().items():
        pipe = case.build()
        pipe.set_progress_bar_config(disable=True)
        drawn[name] = case.images(pipe).contiguous()
        pipe.save_pretrained(f"{folder}/{name}")
        pipe.push_to_hub(f"{USER}/{name}")
        # Components that a class does not call optional have to be given as None.
        plan[name] = case.loader, [key for key, value in pipe.components.items() if value is None]
    with open(f"{folder}/plan.json", "w") as file:
        json.dump(plan, file)
    save_file(drawn, target)


def draw(loaded: dict[str, Any], target: str) -> None:
    """The images of pipelines that were loaded from `{folder or USER}/{name of the case}`."""
    known, drawn = cases(), {}
    for source, pipe in loaded.items():
        case = known[source.rpartition("/")[-1]]
        pipe.set_progress_bar_config(disable=True)
        drawn[source] = case.images(case.rearm(pipe)).contiguous()
    save_file(drawn, target)


def _run(hub: Hub, name: str, code: str, *arguments: Any) -> None:
    # As many threads as here, so that images can be compared bit for bit.
    env = {**hub.environment(name), **{key: environment()[key] for key in ("PYTHONPATH", "OMP_NUM_THREADS")}}
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_loaded_by_another_process_it_draws_the_same(tmp_path: Path) -> None:
    with hub_server(tmp_path / "server") as hub:
        _run(hub, "saved", PUSH, tmp_path, tmp_path / "saved")
        for order, imports in ORDERS.items():
            _run(hub, order, LOAD.format(imports=imports, user=USER), tmp_path, tmp_path / order)
    saved = load_file(tmp_path / "saved")
    assert set(saved) == set(cases())
    for order in ORDERS:
        drawn = load_file(tmp_path / order)
        assert set(drawn) == {f"{place}/{name}" for name in saved for place in (USER, tmp_path)}
        others = [s for s, images in drawn.items() if not torch.equal(images, saved[s.rpartition("/")[-1]])]
        assert not others, order
