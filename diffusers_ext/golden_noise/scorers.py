"""Scorers of images for their prompts, which decide whether a pair of noises is kept; see `core.scores`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..core.extras import SHORT_NAMES, load_function
from ..core.records import part_record
from ..core.scores import Scorer
from ..core.storage import digest

_GONE = ("hpsv2", "imagereward")
CLIP_SCORE, PICK_SCORE = "openai/clip-vit-large-patch14", "yuvalkirstain/PickScore_v1"


def load_scorer(name: str, device: str | torch.device = "cpu") -> Scorer:
    """Loads a scorer by its name.

    Args:
        name: `clip` or `clip:MODEL` (cosine of a CLIP model, by default OpenAI's ViT-L/14), `pickscore`, or
            your own function as `package.module:function` or `path/to/file.py:function`. `fashion-grader` is
            short for the testbed's grader.
        device: device of the models of `clip` and `pickscore`; your own function chooses its device itself.

    Raises:
        ValueError: an unknown name, or a file or module without such a function.
    """
    kind, _, rest = name.partition(":")
    if kind == "clip" or name == "pickscore":
        return ClipScorer(PICK_SCORE if name == "pickscore" else rest or CLIP_SCORE, device)
    name = SHORT_NAMES.get(name, name)
    if ":" in name:
        return load_function(name, "scorer")
    if name in _GONE:
        raise ValueError(
            f"The scorer {name!r} is not built in: its package cannot be installed together with current"
            " versions of transformers and pytest. Use a function of your own, package.module:function or"
            " file.py:function, or pickscore."
        )
    raise ValueError(
        f"No scorer is called {name!r}: expected clip[:MODEL], pickscore, package.module:function or"
        " file.py:function."
    )


def scorer_record(scorer: Scorer | None, name: str | None) -> dict[str, Any] | None:
    """What the scores depend on, for the recipe of pairs: the weights of a CLIP model, or the code of a function.

    The code is that of the whole file, because a function may call others.
    """
    if scorer is None:
        return None
    if isinstance(scorer, ClipScorer):
        return {"name": name, "model": part_record(scorer.model)}
    code = scorer if hasattr(scorer, "__code__") else type(scorer)
    try:
        file = inspect.getsourcefile(inspect.unwrap(code))  # type: ignore[arg-type]
    except TypeError:  # not written in Python
        file = None
    return {"name": name, "code": digest(Path(file).read_bytes()) if file and Path(file).is_file() else None}


class ClipScorer:
    """Cosine of a CLIP model's embeddings of image and prompt, times 100, as in CLIPScore and PickScore.

    Args:
        model: folder or Hub repository of a `CLIPModel` with its processor.
        device: device to run it on.
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
