"""Scores of images for their prompts, by a callable of the user's choice.

A scorer is any callable `scorer(images, prompts)` that takes float32 images (n, h, w, 3) in [0, 1] and n
texts and returns n numbers. Higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]


def checked_scores(scorer: Scorer, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """float64 scores (n,) of n images.

    Raises:
        ValueError: another number of scores, or a score that is not finite.
    """
    scores = np.asarray(scorer(images, list(prompts)), dtype=np.float64).reshape(-1)
    if len(scores) != len(prompts) or not np.isfinite(scores).all():
        bad = [prompt for prompt, score in zip(prompts, scores) if not np.isfinite(score)][:3]
        raise ValueError(
            f"The scorer returned {len(scores)} scores for {len(prompts)} images; the first prompts with"
            f" scores that are not finite {bad}: it must return one finite number per image."
        )
    return scores
