"""Figures that distinguish a projector from the identity and from a constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .conditions import start_means
from .objective import distance
from .projector import Projector


@torch.no_grad()
def figures_of_images(
    pipe: Any, images: Any, prompt: str | Sequence[str] | None = None, generator: Any = None
) -> dict[str, float]:
    """`projector_figures` in the space of the network, of a `SIGNPipeline` and n test images.

    Args:
        pipe: the pipeline. Its autoencoder, if it has one, encodes the images.
        images: see `SIGNPipeline.project`; two or more, of one size.
        prompt: one for all images or one for each, if the projector has prompts.
        generator: one, or one for each image.

    Raises:
        ValueError: see `SIGNPipeline.project`; also fewer than two images.
    """
    data = pipe._encode(images)
    if len(data) < 2:
        raise ValueError("The variance needs two or more images, got 1.")
    conditions = pipe._conditions(prompt, len(data))
    mean = start_means(pipe, conditions)
    return projector_figures(pipe.projector, pipe._noise(data.shape, generator), data, mean, **conditions)


@torch.no_grad()
def projector_figures(
    projector: Projector, noise: Tensor, data: Tensor, mean: Tensor | None = None, **conditions: Any
) -> dict[str, float]:
    """Figures that distinguish a projector from the identity and from a constant.

    Args:
        projector: the projector f.
        noise: (n, C, H, W) unit noise, the input of the source for z.
        data: (n, C, H, W) test data x.
        mean: see `Projector.start`.
        conditions: prompt arguments of the network.

    Returns:
        `idempotence` ‖f(f(z)) − f(z)‖/‖f(z)‖ and `motion` ‖f(z) − z‖/‖z‖ (0 for the identity), both means
        over rows; `variance` of the samples relative to that of the data, summed over elements;
        `reconstruction` mean |f(x) − x|.
    """
    source = projector.start(noise, mean=mean)
    made = projector(source, **conditions)
    again = projector(made, **conditions)

    def norm(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1)

    return {
        "idempotence": float((norm(again - made) / norm(made)).mean()),
        "motion": float((norm(made - source) / norm(source)).mean()),
        "variance": float(made.var(0).sum() / data.var(0).sum()),
        "reconstruction": float(distance(projector(data, **conditions), data).mean()),
    }
