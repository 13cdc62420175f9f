import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_ext.testbed import fashion_scenes as fs

garments = st.builds(fs.Garment, st.sampled_from(list(fs.COLORS)), st.sampled_from(fs.ITEMS))
any_scene = st.lists(garments, min_size=1, max_size=2).map(tuple)


@given(any_scene)
def test_caption_and_parse_are_inverse(scene):
    assert fs.parse_caption(fs.caption(scene)) == scene


@pytest.mark.parametrize(
    "text",
    ["", "a red", "a pink bag", "a red shirt", "red bag", "a red bag left of a blue", "a red bag left of"],
)
def test_parse_refuses_what_is_no_caption(text):
    with pytest.raises(ValueError, match="Not a Fashion Scenes prompt"):
        fs.parse_caption(text)


def test_splits_partition_all_pairs():
    train, test = fs.scenes("train"), fs.scenes("test")
    assert len(train) + len(test) == 64 * 64
    assert len(test) == 410
    assert not set(train) & set(test)


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_drawn_scenes_stay_in_their_split(split, other):
    drawn = fs.draw_scenes(split, 3000, seed=3)
    assert not set(drawn) & set(fs.scenes(other))
    singles = np.mean([len(s) == 1 for s in drawn])
    assert singles == pytest.approx(0.25, abs=0.04)  # 5 standard errors


def test_scenes_are_deterministic_by_seed():
    a, prompts_a = fs.scene_arrays(fs.SAMPLE_DIR, "train", 20, seed=1)
    b, prompts_b = fs.scene_arrays(fs.SAMPLE_DIR, "train", 20, seed=1)
    c, _ = fs.scene_arrays(fs.SAMPLE_DIR, "train", 20, seed=2)
    assert np.array_equal(a, b)
    assert prompts_a == prompts_b
    assert not np.array_equal(a, c)


def test_a_picture_is_its_grey_garments_times_their_colours():
    images, items = fs.load_garments(fs.SAMPLE_DIR, "test")
    scene = fs.parse_caption("a red bag left of a blue boot")
    (picture,) = fs.render([scene], images, items, seed=0)
    left, right = picture[:, :32], picture[:, 32:]
    bags, boots = images[items == fs.ITEMS.index("bag")], images[items == fs.ITEMS.index("boot")]
    assert any(np.array_equal(left[..., 0], bag) for bag in bags)
    assert any(np.array_equal(right[..., 2], boot) for boot in boots)
    assert np.array_equal(left[..., 1], np.rint(left[..., 0].astype(np.float32) * np.float32(0.15)))


def test_a_single_garment_is_centred():
    images, items = fs.load_garments(fs.SAMPLE_DIR, "test")
    (picture,) = fs.render([fs.parse_caption("a white coat")], images, items, seed=0)
    assert not picture[:, :16].any()
    assert not picture[:, 48:].any()
    assert picture[:, 16:48].any()


def test_dataset_holds_the_same_pictures():
    dataset = fs.make_dataset(fs.SAMPLE_DIR, "train", 5, seed=4)
    pictures, prompts = fs.scene_arrays(fs.SAMPLE_DIR, "train", 5, seed=4)
    assert dataset["text"][:] == prompts
    for row, picture in zip(dataset, pictures):
        assert np.array_equal(np.asarray(row["image"]), picture)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz does not exist"):
        fs.load_garments(tmp_path, "train")
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        whole = gzip.decompress((fs.SAMPLE_DIR / name).read_bytes())
        (tmp_path / name).write_bytes(gzip.compress(whole[:-10]))
    with pytest.raises(ValueError, match="not a valid idx file"):
        fs.load_garments(tmp_path, "train")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\x00"))
    with pytest.raises(ValueError, match="not a valid idx file"):
        fs.load_garments(tmp_path, "train")
