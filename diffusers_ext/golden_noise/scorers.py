"""What decides whether a pair of noises is worth learning from: a score of pictures for their prompts.

A scorer is any callable `scorer(images, prompts)`: float32 pictures (n, h, w, 3) in [0, 1] and n texts, to n
numbers, more being better.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..extras import require

Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]

CLIP_SCORE, PICK_SCORE = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1"


def load_scorer(name: str, device: str | torch.device = "cpu") -> Scorer:
    """The scorer of a name.

    Args:
        name: `fashion-grader` (the embedded testbed's), `clip` or `clip:MODEL` (cosine of a CLIP model, by
            default OpenAI's ViT-L/14), `pickscore`, `hpsv2`, `imagereward`, or your own function as
            `package.module:function` or `path/to/file.py:function`.
        device: for the models; HPSv2 chooses its own.

    Raises:
        ValueError: an unknown name, or a path without such a function.
        MissingExtraError: the package is not installed.
    """
    kind, _, rest = name.partition(":")
    if kind == "clip" or name == "pickscore":
        return ClipScorer(PICK_SCORE if name == "pickscore" else rest or CLIP_SCORE, device)
    if name in _BUILT_IN:
        return _BUILT_IN[name](device)
    if rest:
        return _function(name)
    known = ", ".join(["clip[:MODEL]", "pickscore", *_BUILT_IN])
    raise ValueError(
        f"No scorer is called {name!r}: expected one of {known}, package.module:function or file.py:function."
    )


def checked_scores(scorer: Scorer, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """float64 scores (n,) of n pictures.

    Raises:
        ValueError: another number of scores, or one that is not finite.
    """
    scores = np.asarray(scorer(images, list(prompts)), dtype=np.float64).reshape(-1)
    if len(scores) != len(prompts) or not np.isfinite(scores).all():
        bad = [prompt for prompt, score in zip(prompts, scores) if not np.isfinite(score)][:3]
        raise ValueError(
            f"The scorer returned {len(scores)} scores for {len(prompts)} pictures, {len(bad)} of the first ones"
            f" not finite {bad}: it must give one finite number a picture."
        )
    return scores


def _function(name: str) -> Scorer:
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"The scorer's file {where} does not exist.")
        spec: Any = importlib.util.spec_from_file_location(Path(where).stem, where)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"The scorer's module {where!r} cannot be imported: {error}.") from error
    if not callable(getattr(module, attribute, None)):
        raise ValueError(f"{where} has no function {attribute!r} to score with.")
    return getattr(module, attribute)


class ClipScorer:
    """Cosine of a CLIP model's embeddings of picture and prompt, times 100 (CLIPScore; PickScore's formula too).

    Args:
        model: folder or Hub repository of a `CLIPModel` with its processor.
        device: where to run it.
    """

    def __init__(self, model: str, device: str | torch.device = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.model: Any = CLIPModel.from_pretrained(model, dtype=torch.float32).to(device).eval()  # type: ignore[arg-type]
        self.processor: Any = CLIPProcessor.from_pretrained(model)

    @torch.no_grad()
    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores (n,)."""
        options = {"return_tensors": "pt", "padding": True, "truncation": True}
        inputs = self.processor(images=_pil(images), text=list(prompts), **options).to(self.model.device)
        output = self.model(**inputs)
        return (100 * (output.image_embeds * output.text_embeds).sum(-1)).double().cpu().numpy()


def _fashion_grader(device: str | torch.device) -> Scorer:
    from ..evaluation.grader import confidence
    from ..evaluation.testbed import load_grader

    return lambda images, prompts: confidence(load_grader(), images, prompts)


def _hpsv2(device: str | torch.device) -> Scorer:
    hpsv2 = require("hpsv2", "scorers")
    return lambda images, prompts: np.array(
        [hpsv2.score(image, prompt, hps_version="v2.1")[0] for image, prompt in zip(_pil(images), prompts)]
    )


def _image_reward(device: str | torch.device) -> Scorer:
    model = require("ImageReward", "scorers").load("ImageReward-v1.0", device=str(device))
    return lambda images, prompts: np.array([model.score(p, i) for i, p in zip(_pil(images), prompts)])


_BUILT_IN: dict[str, Callable[[str | torch.device], Scorer]] = {
    "fashion-grader": _fashion_grader,
    "hpsv2": _hpsv2,
    "imagereward": _image_reward,
}


def _pil(images: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]
