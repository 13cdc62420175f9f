"""The second grader: how it differs from the first one, and that nothing is trained or chosen with it."""

import re
from pathlib import Path

import pytest
import torch

from diffusers_ext.core.extras import SHORT_NAMES
from diffusers_ext.testbed import fashion_scenes as fs
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.grader import color_indices, read_grader
from diffusers_ext.testbed.judge import GarmentJudge, majority_colors, warp
from diffusers_ext.training.rows import rows_of_step

ROOT = Path(__file__).parents[2]
# They train it, measure its references and draw the picture of its card.
MAY_NAME_IT = {"training/train_base.py", "training/make_reference.py", "training/make_card_pictures.py"}


def test_nothing_is_trained_or_chosen_with_the_judge():
    sources = {
        p: p.read_text("utf-8") for part in ("diffusers_ext", "training", "pipelines") for p in _python(part)
    }
    # Of the embedded models, the arguments and the commands.
    sources |= {p: p.read_text("utf-8") for p in ROOT.glob("model_cards/*/*.json")}
    for card in ROOT.glob("model_cards/*/README.md"):
        sources[card] = "\n".join(re.findall(r"^accelerate launch.*", card.read_text("utf-8"), re.MULTILINE))
    naming = {p.relative_to(ROOT).as_posix() for p, text in sources.items() if "judge" in text.lower()}
    outside = {
        p for p in naming if not p.startswith(("diffusers_ext/testbed/", "model_cards/fashion-judge/"))
    }
    assert outside == MAY_NAME_IT
    assert not any("judge" in where for where in SHORT_NAMES.values())


def _python(part: str) -> list[Path]:
    return list((ROOT / part).rglob("*.py"))


def test_only_the_results_of_the_testbed_use_the_judge():
    naming = {p.name for p in ROOT.glob("diffusers_ext/testbed/*.py") if "load_judge" in p.read_text("utf-8")}
    assert naming == {"judge.py", "runs.py"}


def test_the_judge_was_trained_on_what_the_first_grader_has_not_seen():
    first, second = (read_grader(card_dir(name)) for name in ("fashion-grader", "fashion-judge"))
    assert (first.trained_on, first.unseen) == (second.unseen, second.trained_on) == ("train", "test")
    assert {first.trained_on, first.unseen} == {"train", "test"}


@pytest.mark.parametrize("share", [0.6, 0.4])
def test_the_colour_is_that_of_most_pixels(share):
    red, blue = (torch.tensor(fs.COLORS[name])[:, None, None] for name in ("red", "blue"))
    crop = torch.where(torch.arange(32)[None, None, :] < 32 * share, red, blue).expand(3, 32, 32)
    names = list(fs.COLORS)
    assert names[int(majority_colors(crop[None]))] == ("red" if share > 0.5 else "blue")
    # The first grader takes the mean.
    assert names[int(color_indices(crop[None]))] == "purple"


def test_dark_pixels_have_little_to_say():
    crop = 0.02 * torch.tensor(fs.COLORS["green"])[:, None, None].repeat(1, 32, 32)
    crop[:, 8:24, 8:24] = 0.5 * torch.tensor(fs.COLORS["orange"])[:, None, None]
    assert list(fs.COLORS)[int(majority_colors(crop[None]))] == "orange"


def test_warped_garments_are_drawn_from_their_rows_and_half_of_them_mirrored():
    half = torch.zeros(200, 1, 32, 32)
    half[..., :16] = 1
    a, b, c = (warp(half, rows_of_step(seed, 0, 0, len(half))) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.min() >= 0
    assert a.max() <= 1 + 1e-6  # float32 rounding of interpolation weights
    mirrored = (a[..., 16:].sum((1, 2, 3)) > a[..., :16].sum((1, 2, 3))).float().mean()
    # 200 fair coins: five standard deviations.
    assert abs(float(mirrored) - 0.5) < 5 * 0.5 / 200**0.5


def test_a_folder_without_a_grader_is_named():
    with pytest.raises(ValueError, match="holds a UNet2DModel, expected GarmentClassifier or GarmentJudge"):
        read_grader(card_dir("fashion-ddpm") / "unet")


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    small = GarmentJudge(width=8, depth=1, num_features=4).eval()
    small.save_pretrained(tmp_path)
    grey = torch.rand(2, 1, 32, 32)
    assert torch.equal(read_grader(tmp_path)(grey), small(grey))
    assert small.features(grey).shape == (2, 4)


def test_the_judge_is_small():
    size = (card_dir("fashion-judge") / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 1e6
