"""The tables of methods and pipelines in the README and the documentation, made by `dx.support` on every family.

python -m tests.contract.matrix          # prints them
python -m tests.contract.matrix --write  # puts them into README.md and docs/support.md

`test_matrix.py` holds `dx.support` to the outcome of the contract.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import diffusers_ext as dx
from tests import families

ROOT = Path(__file__).parents[2]
TITLES = {
    "sd": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "SDXL",
    "sdxl-img2img": "SDXL image-to-image",
    "sd-controlnet": "ControlNet",
    "sd-ip-adapter": "IP-Adapter",
    "sd-pag": "PAG",
    "lcm": "LCM",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux.1 dev",
    "flux-schnell": "Flux.1 schnell",
    "flux2": "Flux.2",
    "flux2-klein": "Flux.2 Klein",
    "qwen": "Qwen-Image",
    "zimage": "Z-Image",
    "sana": "Sana",
    "pixart": "PixArt-Σ",
    "hunyuan-dit": "Hunyuan-DiT",
    "lumina2": "Lumina 2",
    "auraflow": "AuraFlow",
    "cogview4": "CogView4",
    "chroma": "Chroma",
    "kandinsky5": "Kandinsky 5",
    "wan": "Wan 2.1",
    "wan22": "Wan 2.2",
    "ltx": "LTX-Video",
    "cogvideox": "CogVideoX",
    "dit": "DiT",
    "ldm": "Latent diffusion",
    "ddpm": "DDPM",
    "modular-sdxl": "Modular SDXL",
    "modular-flux": "Modular Flux",
}
# What the README shows. The page has what the methods can do beside.
METHODS = ("teleportation", "golden noise", "Smooth-LoRA", "SIGN, as the teacher", "A-SDM", "GRI attention")


@functools.cache
def supported(name: str) -> dx.registry.Support:
    """`dx.support` of the family `name`."""
    return dx.support(families.build(name))


def _table(labels: Iterable[str], rows: list[list[str]]) -> str:
    head = ["Pipeline", *(label[0].upper() + label[1:] for label in labels)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cells(name: str, labels: Iterable[str]) -> tuple[str, ...]:
    refusals = supported(name).refusals
    return tuple("no" if refusals[label] else "yes" for label in labels)


def short() -> str:
    """A Markdown table of `METHODS` with one row for all pipelines on which the same ones work."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in families.NAMES:
        rows.setdefault(_cells(name, METHODS), []).append(TITLES[name])
    return _table(METHODS, [[", ".join(titles), *cells] for cells, titles in rows.items()])


def full() -> str:
    """A Markdown table with a row for every pipeline, and below it the reasons for every "no"."""
    labels = supported("sd").refusals
    rows = [[TITLES[name], *_cells(name, labels)] for name in families.NAMES]
    reasons: dict[str, dict[str, list[str]]] = {}
    for name in families.NAMES:
        for label, reason in supported(name).refusals.items():
            if reason is not None:
                shown = reason.replace(supported(name).pipeline, "…")
                reasons.setdefault(label, {}).setdefault(shown, []).append(TITLES[name])
    lines = []
    for label, found in reasons.items():
        lines += ["", f"**{label[0].upper() + label[1:]}**", ""]
        lines += [f"- {', '.join(titles)}: “{reason}”" for reason, titles in found.items()]
    return _table(labels, rows) + "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {"README.md": short, "docs/support.md": full}
_BETWEEN = re.compile(r"(<!-- support-matrix -->\n).*?(<!-- /support-matrix -->)", re.DOTALL)


def replaced(page: str, table: str) -> str:
    """A page with `table` between its markers."""
    text, count = _BETWEEN.subn(lambda match: match[1] + table + match[2], page)
    if count != 1:
        raise ValueError(f"Expected one pair of support-matrix markers, found {count}.")
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        for name, make in PAGES.items():
            text = (ROOT / name).read_text(encoding="utf-8")
            (ROOT / name).write_text(replaced(text, make()), encoding="utf-8")
    print(full())
