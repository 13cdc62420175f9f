"""Stable Diffusion and SDXL pipelines that take a recipe.

The folders `pipelines/recipe` and `pipelines/recipe_sdxl` import these classes for `custom_pipeline=`:

    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline=dx.pipeline_path("recipe"), recipe="path/or/repo", trust_remote_code=True
    )
    pipe("a red bag", **pipe.loaded_recipe.call).images[0]

Without a recipe, the results are bit-identical to those of the base class. `Recipe.apply` does the same on any
pipeline.

A recipe and the model are saved apart: `save_pretrained` and `push_to_hub` write the model, and
`pipe.loaded_recipe.save_pretrained` the recipe.
"""

from __future__ import annotations

import os
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ..core.classes import CustomPipelineMixin, adds_argument
from .recipe import Recipe

_DOC = """recipe (`str`, *optional*): folder or Hub repository of a recipe, which is applied."""


class RecipeMixin(CustomPipelineMixin):
    """`load_recipe` and `unload_recipe` for a pipeline class."""

    loaded_recipe: Recipe | None = None

    def load_recipe(self, recipe: Recipe | str | os.PathLike[str], **hub_kwargs: Any) -> Any:
        """Applies a recipe.

        Args:
            recipe: the recipe, or the folder or Hub repository that contains it.
            hub_kwargs: for `Recipe.from_pretrained`, such as `revision`.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: a recipe is loaded already, or see `Recipe.apply`.
            OSError: the recipe is missing.
        """
        if self.loaded_recipe is not None:
            raise ValueError("A recipe is on this pipeline already: call unload_recipe() first.")
        found = recipe if isinstance(recipe, Recipe) else Recipe.from_pretrained(recipe, **hub_kwargs)
        found.apply(self)
        self.loaded_recipe = found
        return self

    def unload_recipe(self) -> Any:
        """Removes the recipe, so that the pipeline works as its base class again. Returns it."""
        if self.loaded_recipe is not None:
            self.loaded_recipe.remove(self)
            del self.loaded_recipe
        return self

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Same as in the base class.

        Raises:
            ValueError: a recipe is loaded.
        """
        if self.loaded_recipe is not None:
            raise ValueError(
                "A recipe is on this pipeline, and it is saved by itself: pipe.loaded_recipe.save_pretrained(folder). Call"
                " pipe.unload_recipe() first to save the model."
            )
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def _take(self, recipe: str | None) -> None:
        if recipe is not None:
            self.load_recipe(recipe)


class RecipeStableDiffusionPipeline(RecipeMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that takes a recipe."""

    @adds_argument(StableDiffusionPipeline, "recipe", None, _DOC, "__init__")
    def __init__(self, *args: Any, recipe: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._take(recipe)


class RecipeStableDiffusionXLPipeline(RecipeMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that takes a recipe."""

    @adds_argument(StableDiffusionXLPipeline, "recipe", None, _DOC, "__init__")
    def __init__(self, *args: Any, recipe: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._take(recipe)
