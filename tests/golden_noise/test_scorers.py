"""Scorers by name, by path, and a real CLIP model made here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from diffusers_ext.golden_noise.scorers import load_scorer
from tests import tiny

PICTURES = np.random.default_rng(0).random((3, 16, 16, 3), dtype=np.float32)
TEXTS = ["a aaa", "a bbb", "a ccc"]


@pytest.fixture
def clip(tmp_path: Path) -> str:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text: Any = tiny.text_encoder(projected=True).config
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    size: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    # Without torchvision; early releases have it under the plain name.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    pictures = kind(**size)
    transformers.CLIPProcessor(pictures, tiny.tokenizer()).save_pretrained(tmp_path)
    return f"clip:{tmp_path}"


def test_clip_is_the_cosine_of_its_embeddings(clip: str) -> None:
    scores = load_scorer(clip)(PICTURES, TEXTS)
    model: Any = transformers.CLIPModel.from_pretrained(clip[5:])
    processor = transformers.CLIPProcessor.from_pretrained(clip[5:])
    bytes_ = list((PICTURES * 255).round().astype(np.uint8))
    inputs = processor(images=bytes_, text=TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    assert np.allclose(scores, 100 * logits.numpy(), atol=1e-3)
    assert len(set(scores.round(4))) == 3


def test_the_embedded_grader() -> None:
    scorer = load_scorer("fashion-grader")
    scores = scorer(np.zeros((2, 32, 64, 3), np.float32), ["a red bag", "a white boot left of a blue coat"])
    assert scores.shape == (2,)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_your_own_function_by_file_and_by_module(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    assert np.allclose(load_scorer(f"{file}:brightness")(PICTURES, TEXTS), PICTURES.mean((1, 2, 3)))
    assert load_scorer("numpy:asarray") is np.asarray
    with pytest.raises(ValueError, match=r"mine\.py has no function 'contrast'"):
        load_scorer(f"{file}:contrast")
    with pytest.raises(ValueError, match=r"none\.py does not exist"):
        load_scorer(f"{tmp_path / 'none.py'}:brightness")
    with pytest.raises(ValueError, match=r"module 'no\.such\.module' cannot be imported"):
        load_scorer("no.such.module:score")


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_scorers_that_cannot_be_installed_say_what_to_use(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is not built in.*file\.py:function"):
        load_scorer(name)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"No scorer is called 'best': expected clip.*pickscore.*module:function"
    ):
        load_scorer("best")
