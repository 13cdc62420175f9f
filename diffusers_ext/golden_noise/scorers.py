"""What decides whether a pair of noises is worth learning from: a score of pictures for their prompts.

A scorer is any callable `scorer(images, prompts)`: float32 pictures (n, h, w, 3) in [0, 1] and n texts, to n
numbers, more being better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..core.extras import SHORT_NAMES, load_function

Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]

_GONE = ("hpsv2", "imagereward")
CLIP_SCORE, PICK_SCORE = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1"


def load_scorer(name: str, device: str | torch.device = "cpu") -> Scorer:
    """The scorer of a name.

    Args:
        name: `clip` or `clip:MODEL` (cosine of a CLIP model, by default OpenAI's ViT-L/14), `pickscore`, or your own
            function as `package.module:function` or `path/to/file.py:function`. `fashion-grader` is short for the
            testbed's own.
        device: for the models of `clip` and `pickscore`; your own function chooses for itself.

    Raises:
        ValueError: an unknown name, or a path without such a function.
    """
    kind, _, rest = name.partition(":")
    if kind == "clip" or name == "pickscore":
        return ClipScorer(PICK_SCORE if name == "pickscore" else rest or CLIP_SCORE, device)
    name = SHORT_NAMES.get(name, name)
    if ":" in name:
        return load_function(name, "scorer")
    if name in _GONE:
        raise ValueError(
            f"The scorer {name!r} is not built in: its package cannot be installed beside current versions of"
            " transformers and pytest. Score in a function of your own, package.module:function or file.py:function,"
            " or use pickscore."
        )
    raise ValueError(
        f"No scorer is called {name!r}: expected clip[:MODEL], pickscore, package.module:function or"
        " file.py:function."
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


def _pil(images: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]
