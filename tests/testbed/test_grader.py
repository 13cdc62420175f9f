import numpy as np
import pytest
import torch

from diffusers_ext.core.images import as_tensor
from diffusers_ext.testbed import fashion_scenes as fs
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.grader import (
    GarmentClassifier,
    augment,
    color_indices,
    confidence,
    garment_features,
    grade,
    read_grader,
    scene_features,
)
from diffusers_ext.testbed.judge import majority_colors
from diffusers_ext.testbed.runs import GRADERS
from diffusers_ext.training.rows import rows_of_step


@pytest.fixture(scope="module", params=GRADERS)
def grader(request):
    return read_grader(card_dir(request.param))


@pytest.fixture(scope="module")
def real(grader):
    """Scenes of garments that the grader was not trained on."""
    return fs.scene_arrays(fs.SAMPLE_DIR, grader.unseen, 200, seed=0)


def test_real_scenes_are_graded_right(grader, real):
    right = grade(grader, *real)
    assert right["color"].all()
    # The graders read 95 to 96% of single garments; a scene has 1.75 on average.
    assert right["item"].mean() > 0.88
    assert np.array_equal(right["aligned"], right["item"] & right["color"])


def test_a_swapped_prompt_is_graded_wrong(grader, real):
    pictures, prompts = real
    scenes = [fs.parse_caption(p) for p in prompts]
    apart = [
        n for n, s in enumerate(scenes) if len(s) == 2 and s[0].color != s[1].color and s[0].item != s[1].item
    ]
    swapped = grade(grader, pictures[apart], [fs.caption(scenes[n][::-1]) for n in apart])
    assert not swapped["color"].any()
    assert swapped["item"].mean() < 0.05
    assert not swapped["aligned"].any()


def test_confidence_is_a_probability_that_knows_what_is_right(grader, real):
    sure, right = confidence(grader, *real), grade(grader, *real)["aligned"]
    assert ((sure >= 0) & (sure <= 1)).all()
    assert sure[right].mean() > 0.8
    # A wrong item is less likely than the one that was read.
    assert sure[~right].max() <= 0.5
    turned = [fs.caption(tuple(fs.Garment(g.color, "bag") for g in fs.parse_caption(p))) for p in real[1]]
    assert confidence(grader, real[0], turned).mean() < 0.3
    recoloured = [p.replace("red", "cyan") for p in real[1]]
    changed = [n for n, p in enumerate(recoloured) if p != real[1][n] and "cyan" not in real[1][n]]
    assert (confidence(grader, real[0][changed], [recoloured[n] for n in changed]) == 0).all()


def test_one_wrong_word_is_enough(grader, real):
    pictures, _ = real
    scenes = [fs.parse_caption(p) for p in real[1]]
    colors = list(fs.COLORS)
    wrong = [(*s[:-1], fs.Garment(colors[colors.index(s[-1].color) - 1], s[-1].item)) for s in scenes]
    right = grade(grader, pictures, [fs.caption(s) for s in wrong])
    assert not right["color"].any()
    assert not right["aligned"].any()
    assert np.array_equal(right["item"], grade(grader, *real)["item"])


def test_arrays_and_tensors_and_batches_are_graded_alike(grader, real):
    pictures, prompts = real[0][:20], real[1][:20]
    expected = grade(grader, pictures, prompts)
    for same in (pictures.astype(np.float32) / 255, as_tensor(pictures)):
        got = grade(grader, same, prompts, batch_size=3)
        assert all(np.array_equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("colors", [color_indices, majority_colors])
def test_a_dimmed_palette_colour_keeps_its_name(colors):
    palette = torch.tensor(list(fs.COLORS.values()))
    crops = (0.4 * palette)[:, :, None, None].expand(-1, 3, 32, 32)
    assert torch.equal(colors(crops), torch.arange(len(palette)))


def test_feature_shapes(grader, real):
    width = 64
    features = scene_features(grader, real[0][:5], batch_size=2)
    assert features.shape == (5, 2 * (width + 3))
    assert features.dtype == np.float64
    # Another batch size sums in another order: float32 rounding of features of order 1.
    assert np.allclose(features, scene_features(grader, real[0][:5]), atol=1e-5)
    garments, _ = fs.load_garments(fs.SAMPLE_DIR, "test")
    assert garment_features(grader, garments[:4]).shape == (4, width)


def test_save_and_load(tmp_path):
    small = GarmentClassifier((8, 8)).eval()
    small.save_pretrained(tmp_path)
    grey = torch.rand(2, 1, 32, 32)
    assert torch.equal(GarmentClassifier.from_pretrained(tmp_path).eval()(grey), small(grey))


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (np.zeros((2, 64, 32, 3)), "Expected scenes of 32 × 64 RGB"),
        (np.zeros((2, 32, 64)), "Expected scenes of 32 × 64 RGB"),
        (np.zeros((32, 64)), "Expected images as"),
        (np.full((2, 32, 64, 3), 1.5), r"in \[0, 1\] or uint8"),
        (np.full((2, 32, 64, 3), -0.1), r"in \[0, 1\] or uint8"),
        (np.full((2, 32, 64, 3), np.nan), "without NaN"),
        (np.zeros((2, 32, 64, 3), np.int64) + 200, r"of int64"),
        (np.zeros((0, 32, 64, 3)), "Expected images as"),
        (np.zeros((3, 32, 64, 3)), "3 images but 2 prompts"),
    ],
)
def test_wrong_pictures_are_named(grader, pictures, message):
    with pytest.raises(ValueError, match=message):
        grade(grader, pictures, ["a red bag", "a blue boot"])


def test_other_errors(grader):
    with pytest.raises(ValueError, match="Not a Fashion Scenes prompt: 'a pink bag'"):
        grade(grader, np.zeros((1, 32, 64, 3)), ["a pink bag"])
    with pytest.raises(ValueError, match="Expected grey garments of 32 × 32"):
        garment_features(grader, np.zeros((1, 28, 28)))


def test_augmentation_is_drawn_from_its_generator_and_stays_in_range():
    grey = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    a, b, c = (augment(grey, rows_of_step(s, 0, 0, len(grey))) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.min() >= 0
    assert a.max() <= 1
