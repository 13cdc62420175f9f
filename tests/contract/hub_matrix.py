"""What is pushed to the Hub and loaded back, with this package and without it, and the table of it in docs/hub.md.

python -m tests.contract.hub_matrix          # prints the table
python -m tests.contract.hub_matrix --write  # puts it into docs/hub.md

`run` does this with the small Hub of `tests.hub_server`, in three processes: one pushes, one loads without the package,
one loads with it, both with an empty cache. The code in the table is the code that they run. A further artefact is one
more entry of `ARTEFACTS`.
"""

from __future__ import annotations

import importlib.abc
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# No import of the package here: one of the processes must not have it.
from tests.hub_server import USER, Hub, hub_server

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "hub.md"
MARKERS = ("<!-- hub-matrix -->\n", "<!-- /hub-matrix -->")
BASE = f"{USER}/base"  # a plain Stable Diffusion
WORKS = "works"


@dataclass(frozen=True)
class Artefact:
    """Something that is pushed.

    Attributes:
        title: what it is.
        push: makes it, pushes it to a repository, and returns what whoever loads it should get.
        pushed: how, in a few words.
        ours, plain: code that loads `repo` with and without the package and leaves in `made` what `push` returned. It
            may use `draw`, `output`, `DiffusionPipeline` and, with the package, `dx`.
        note: what plain loading gives, if this is not the whole.
    """

    title: str
    push: Callable[[str], Tensor]
    pushed: str
    ours: str
    plain: str
    note: str = ""

    @property
    def with_package(self) -> str:
        """`ours` with the import of the package, which only pipelines of its own classes do not need."""
        return self.ours if self.ours.startswith(_TRUSTED) else f"import diffusers_ext as dx\n{self.ours}"


def draw(pipe: Any, **call: Any) -> Tensor:
    """Two images of a tiny pipeline, from the same noise everywhere."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    prompts = (
        {"prompt": ["a aaa", "a bbb"]} if hasattr(pipe, "tokenizer") and pipe.tokenizer else {"batch_size": 2}
    )
    images = pipe(**prompts, num_inference_steps=3, generator=generators, output_type="np", **call).images
    return torch.as_tensor(images).contiguous()


@torch.no_grad()
def output(pipe: Any) -> Tensor:
    """One output of the UNet of a tiny pipeline."""
    return pipe.unet(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 3, 16)).sample


def _base(repo: str) -> Tensor:
    from tests import tiny

    pipe = tiny.build("sd")
    pipe.push_to_hub(repo)
    return draw(pipe)


def _teleport(repo: str) -> Tensor:
    import diffusers_ext as dx
    from tests import tiny

    pipe = dx.apply_teleport(tiny.build("sd"), tiny.gaussian((4, 8, 8), rank=6), skip=0.4)
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder, push_to_hub=True, repo_id=repo)
    return draw(pipe)


def _class(name: str) -> Callable[[str], Tensor]:
    def push(repo: str) -> Tensor:
        from tests.contract.test_saved_pipelines import MADE

        pipe: Any = MADE[name]()
        if name == "teleport_sd":
            from tests import tiny

            pipe.load_teleport(tiny.gaussian((4, 8, 8), rank=6), skip=0.4)
        pipe.push_to_hub(repo)
        return draw(pipe)

    return push


def _code(repo: str) -> Tensor:
    import diffusers_ext as dx
    from tests.contract.test_saved_pipelines import MADE

    _folder(dx.pipeline_path("golden_noise_sd"), repo)
    pipe: Any = MADE["golden_noise_sd"]()
    pipe.npnet.push_to_hub(f"{USER}/network-of-{repo.rpartition('/')[-1]}")
    return draw(pipe)


def _recipe(repo: str) -> Tensor:
    import diffusers_ext as dx
    from tests import tiny

    pipe = dx.apply_teleport(tiny.build("sd"), tiny.gaussian((4, 8, 8), rank=6), skip=0.4)
    dx.Recipe.from_pipe(pipe).push_to_hub(repo)
    return draw(pipe)


def _folder(folder: str | Path, repo: str, kind: str = "model") -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo(repo, repo_type=kind, exist_ok=True)
    HfApi().upload_folder(repo_id=repo, repo_type=kind, folder_path=folder)


def _statistics(repo: str) -> Tensor:
    from tests import tiny

    stats = tiny.gaussian((4, 8, 8), rank=6)
    stats.push_to_hub(repo)
    return stats.eigenvectors.clone()


def _npnet(repo: str) -> Tensor:
    import diffusers_ext as dx
    from tests import tiny

    npnet = tiny.npnet("sd")
    npnet.push_to_hub(repo)
    return draw(dx.apply_golden_noise(tiny.build("sd"), npnet))


def _smooth_lora(repo: str) -> Tensor:
    import diffusers_ext as dx
    from tests import tiny

    with tempfile.TemporaryDirectory() as folder:
        save_file(tiny.lora("sd"), f"{folder}/pytorch_lora_weights.safetensors")
        _folder(folder, repo)
        return draw(dx.apply_smooth_lora(tiny.build("sd"), folder))


def _with_lora(repo: str) -> Tensor:
    import diffusers_ext as dx
    from tests import tiny

    with tempfile.TemporaryDirectory() as folder:
        save_file(tiny.lora("sd"), f"{folder}/pytorch_lora_weights.safetensors")
        pipe = dx.apply_smooth_lora(tiny.build("sd"), folder)
    pipe.push_to_hub(repo)
    return draw(pipe)


def _sign_lora(repo: str) -> Tensor:
    import diffusers_ext as dx
    from diffusers_ext.sign.lora import lora_copy, save_sign_lora
    from diffusers_ext.sign.teacher import untrained_projector
    from tests import tiny

    teacher = tiny.build("sd")
    sign = untrained_projector(teacher, in_weights=False)
    sign.register_modules(unet=lora_copy(teacher.unet, teacher, 2))
    draws = torch.Generator().manual_seed(5)
    for parameter in sign.unet.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draws)
    with tempfile.TemporaryDirectory() as folder:
        save_sign_lora(sign, teacher, Path(folder))
        _folder(folder, repo)
        return output(dx.load_sign_lora(tiny.build("sd"), folder))


def _sign_stock(repo: str) -> Tensor:
    from diffusers_ext.sign.teacher import untrained_projector
    from tests.training.scripts import stable_diffusion_3

    sign = untrained_projector(stable_diffusion_3(), sigma=1.5, max_sequence_length=4)
    sign.stock_pipeline.push_to_hub(repo)
    return draw(sign.stock_pipeline, **_ONE_STEP)


_ONE_STEP = {"sigmas": [0.6], "guidance_scale": 1, "max_sequence_length": 4, "height": 8, "width": 8}


def _pruned(*cuts: str) -> Callable[[str], Tensor]:
    def push(repo: str) -> Tensor:
        import diffusers_ext as dx
        from tests import tiny

        pipe = tiny.build("sd")
        pipe.unet = dx.prune_network(pipe.unet, dx.PruningPlan(dict(pipe.unet.config), (cuts,)))
        pipe.push_to_hub(repo)
        return draw(pipe)

    return push


def _pairs(repo: str) -> Tensor:
    from diffusers_ext.golden_noise.pairs import NoisePairs, PairSettings, collect_pairs
    from tests import tiny

    with tempfile.TemporaryDirectory() as folder:
        settings = PairSettings(num_inference_steps=4)
        size = {"height": 8, "width": 8}
        collect_pairs(tiny.build("sd"), ["a aaa", "a bbb"], 2, folder, settings, batch_size=2, **size)
        _folder(folder, repo, "dataset")
        return NoisePairs.load(folder).golden


_PLAIN = "made = draw(DiffusionPipeline.from_pretrained(repo))"
_TRUSTED = "made = draw(DiffusionPipeline.from_pretrained(repo, trust_remote_code=True))"
_FLOW = "made = draw(DiffusionPipeline.from_pretrained(repo), **one_step)"


def _custom(folder: str, room: str, kind: str) -> Artefact:
    # The class itself needs no trust in the code of the repository.
    both = f"""{_TRUSTED}
from diffusers_ext.{room}.pipelines import {kind}
assert torch.equal(made, draw({kind}.from_pretrained(repo)))"""
    return Artefact(f"`{kind}`", _class(folder), "`pipe.push_to_hub`", both, _TRUSTED)


_TENSORS = """from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
made = load_file(hf_hub_download(repo, {file}))[{name!r}]"""

ARTEFACTS: dict[str, Artefact] = {
    "base": Artefact("Pipeline without a method", _base, "`pipe.push_to_hub`", _PLAIN, _PLAIN),
    "teleport": Artefact(
        "Pipeline with teleportation on",
        _teleport,
        "`pipe.save_pretrained(…, push_to_hub=True)`",
        "made = draw(dx.apply_teleport(DiffusionPipeline.from_pretrained(repo)))",
        _PLAIN,
    ),
    "with-lora": Artefact("Pipeline with a Smooth-LoRA on", _with_lora, "`pipe.push_to_hub`", _PLAIN, _PLAIN),
    "teleport-class": _custom("teleport_sd", "teleport", "TeleportStableDiffusionPipeline"),
    "golden-noise-class": _custom("golden_noise_sd", "golden_noise", "GoldenNoiseStableDiffusionPipeline"),
    "smooth-class": _custom("smooth_diffusion_sd", "smooth_lora", "SmoothDiffusionStableDiffusionPipeline"),
    "asdm-class": _custom("asdm_sd", "asdm", "ASDMStableDiffusionPipeline"),
    "sign-class": _custom("sign", "sign", "SIGNPipeline"),
    "code": Artefact(
        "Folder of `pipelines/`",
        _code,
        "`HfApi().upload_folder`",
        f"""npnet = dx.NPNetModel.from_pretrained(repo.replace("/", "/network-of-"))
options = dict(custom_pipeline=repo, trust_remote_code=True, npnet=npnet)
made = draw(DiffusionPipeline.from_pretrained({BASE!r}, **options))""",
        f"made = draw(DiffusionPipeline.from_pretrained({BASE!r}, custom_pipeline=repo, trust_remote_code=True))",
    ),
    "statistics": Artefact(
        "`GaussianStats`",
        _statistics,
        "`stats.push_to_hub`",
        "made = dx.GaussianStats.from_pretrained(repo).eigenvectors",
        _TENSORS.format(file="'gaussian_stats.safetensors'", name="eigenvectors"),
        note="as tensors, with safetensors",
    ),
    "npnet": Artefact(
        "`NPNetModel`",
        _npnet,
        "`npnet.push_to_hub`",
        f"""pipe = DiffusionPipeline.from_pretrained({BASE!r})
made = draw(dx.apply_golden_noise(pipe, dx.NPNetModel.from_pretrained(repo)))""",
        "from diffusers import AutoModel; AutoModel.from_pretrained(repo)",
    ),
    "smooth-lora": Artefact(
        "Smooth-LoRA",
        _smooth_lora,
        "`train_smooth_lora.py --push_to_hub`",
        f"made = draw(dx.apply_smooth_lora(DiffusionPipeline.from_pretrained({BASE!r}), repo))",
        f"""pipe = DiffusionPipeline.from_pretrained({BASE!r})
pipe.load_lora_weights(repo)
made = draw(pipe)""",
        note="with `pipe.load_lora_weights`",
    ),
    "sign-lora": Artefact(
        "LoRA of SIGN",
        _sign_lora,
        "`train_sign.py --rank … --push_to_hub`",
        f"made = output(dx.load_sign_lora(DiffusionPipeline.from_pretrained({BASE!r}), repo))",
        f"""pipe = DiffusionPipeline.from_pretrained({BASE!r})
pipe.load_lora_weights(repo)
made = output(pipe)""",
        note="as a LoRA of the teacher, with `pipe.load_lora_weights`; this is no projector",
    ),
    "sign-stock": Artefact(
        "Stock pipeline of a flow's projector",
        _sign_stock,
        "`sign.stock_pipeline.push_to_hub`",
        _FLOW,
        _FLOW,
    ),
    "asdm-stock": Artefact(
        "Pruned by A-SDM, stock UNet", _pruned("mid.attention"), "`pipe.push_to_hub`", _PLAIN, _PLAIN
    ),
    "asdm-unet": Artefact(
        "Pruned by A-SDM, `ASDMUNet2DConditionModel`",
        _pruned("attention:up_blocks.1.attentions.1", "gri.0"),
        "`pipe.push_to_hub`",
        _PLAIN,
        _PLAIN,
    ),
    "recipe": Artefact(
        "`Recipe`",
        _recipe,
        "`recipe.push_to_hub`",
        f"""pipe = DiffusionPipeline.from_pretrained({BASE!r})
made = draw(dx.Recipe.from_pretrained(repo).apply(pipe))""",
        _PLAIN,
    ),
    "pairs": Artefact(
        "Pairs of noises, a data set",
        _pairs,
        '`HfApi().upload_folder(repo_type="dataset")`',
        """from huggingface_hub import snapshot_download
from diffusers_ext.golden_noise.pairs import NoisePairs
made = NoisePairs.load(snapshot_download(repo, repo_type="dataset")).golden""",
        _TENSORS.format(file="'shard-000000.safetensors', repo_type='dataset'", name="golden"),
        note="as tensors, with safetensors",
    ),
}


def attempt(code: str, repo: str) -> Tensor | str:
    """What code of an artefact leaves in `made`, or the error message."""
    import diffusers

    scope: dict[str, Any] = {
        "repo": repo,
        "draw": draw,
        "output": output,
        "torch": torch,
        "one_step": _ONE_STEP,
    }
    scope["DiffusionPipeline"] = diffusers.DiffusionPipeline
    try:
        exec(code, scope)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return scope["made"]


# --- the three processes ---


class _Absent(importlib.abc.MetaPathFinder):
    """The package is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "diffusers_ext":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def process(role: str, folder: str) -> None:
    """One of the processes: "push", "plain" or "ours". Writes tensors and messages into the folder."""
    if role == "plain":
        sys.meta_path.insert(0, _Absent())
    found: dict[str, Tensor | str] = {}
    # Those that do not need the import go first, so that nothing else has imported it.
    for name, artefact in sorted(ARTEFACTS.items(), key=lambda item: not item[1].ours.startswith(_TRUSTED)):
        assert role == "push" or found or "diffusers_ext" not in sys.modules
        repo = f"{USER}/{name}"
        if role == "push":
            try:
                found[name] = artefact.push(repo)
            except ValueError as error:
                found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = attempt(artefact.plain if role == "plain" else artefact.with_package, repo)
    assert role != "plain" or not any(name.startswith("diffusers_ext") for name in sys.modules)
    save_file({k: v.contiguous() for k, v in found.items() if isinstance(v, Tensor)}, f"{folder}/{role}")
    texts = {k: v for k, v in found.items() if isinstance(v, str)}
    Path(folder, f"{role}.json").write_text(json.dumps(texts))


def run(folder: Path) -> dict[str, dict[str, str]]:
    """For every artefact and process: `WORKS`, "differs", or the error message."""
    with hub_server(folder / "server") as hub:
        for role in ("push", "plain", "ours"):
            _start(hub, role, folder)
    tensors = {role: load_file(folder / role) for role in ("push", "plain", "ours")}
    texts = {role: json.loads((folder / f"{role}.json").read_text()) for role in tensors}
    outcome: dict[str, dict[str, str]] = {}
    for name in ARTEFACTS:
        wanted = tensors["push"].get(name)
        outcome[name] = {"push": texts["push"].get(name, WORKS)}
        for role in ("plain", "ours"):
            made = tensors[role].get(name)
            same = made is not None and wanted is not None and torch.equal(made, wanted)
            outcome[name][role] = texts[role].get(name, WORKS if same else "differs")
    return outcome


def _start(hub: Hub, role: str, folder: Path) -> None:
    code = f"from tests.contract.hub_matrix import process; process({role!r}, {str(folder)!r})"
    env = {**hub.environment(role), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# --- the table ---


def table(outcome: dict[str, dict[str, str]]) -> str:
    """A Markdown table of `run`, with the messages below it."""
    head = ["What", "Pushed with", "Loaded with Diffusers alone", "Loaded with this package"]
    lines, messages = [head, ["---"] * 4], dict[str, int]()
    for name, artefact in ARTEFACTS.items():
        found = outcome[name]
        if found["push"] != WORKS:
            lines.append([artefact.title, f"no [{_number(messages, found['push'])}]", "", ""])
            continue
        plain = f"yes, {artefact.note}" if artefact.note else "yes"
        if found["plain"] != WORKS:
            plain = f"no [{_number(messages, found['plain'])}]"
        ours = "yes" if found["ours"] == WORKS else f"no [{_number(messages, found['ours'])}]"
        lines.append([artefact.title, artefact.pushed, plain, ours])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = "\n".join(f"[{number}] `{message}`\n" for message, number in messages.items())
    return f"{text}\n\n{notes}"


def _number(messages: dict[str, int], text: str) -> int:
    # The address and the commit are others in every run.
    text = re.sub(r"http://[^/]+/(\S+?)/resolve/\w+/", r"https://huggingface.co/\1/resolve/main/", text)
    return messages.setdefault(" ".join(text.split()).replace("`", "'"), len(messages) + 1)


def replaced(page: str, content: str) -> str:
    """A page with `content` between its markers."""
    before, rest = page.split(MARKERS[0])
    return before + MARKERS[0] + content + MARKERS[1] + rest.split(MARKERS[1])[1]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made = table(run(Path(temporary)))
    if "--write" in sys.argv:
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    print(made)
