"""Stable Diffusion and SDXL pipelines that take a recipe.

The folders `pipelines/recipe` and `pipelines/recipe_sdxl` import these classes for `custom_pipeline=`:

    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline="pipelines/recipe", recipe="path/or/repo", trust_remote_code=True
    )
    pipe("a red bag", **pipe.loaded_recipe.call).images[0]

Without a recipe, the results are bit-identical to those of the base class. `Recipe.apply` does the same on any
pipeline.

What `save_pretrained` and `push_to_hub` write holds the weights of the model and the name of the recipe, but neither the
recipe's own weights nor this code: load it with `RecipeStableDiffusionPipeline.from_pretrained`, or with
`custom_pipeline=` as above. `DiffusionPipeline.from_pretrained` alone does not find the class.
"""

from __future__ import annotations

import os
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ..core.classes import FromPipeMixin, adds_argument
from .recipe import Recipe

_DOC = """recipe (`str`, *optional*): folder or Hub repository of a recipe, which is applied."""


class RecipeMixin(FromPipeMixin):
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
        name = None if isinstance(recipe, Recipe) else str(recipe)
        found = recipe if isinstance(recipe, Recipe) else Recipe.from_pretrained(recipe, **hub_kwargs)
        found.apply(self)
        self.loaded_recipe = found
        self._note(name)
        return self

    def unload_recipe(self) -> Any:
        """Removes the recipe, so that the pipeline works as its base class again. Returns it."""
        if self.loaded_recipe is not None:
            self.loaded_recipe.remove(self)
            del self.loaded_recipe
            self._note(None)
        return self

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves the model without the methods of the recipe, and the name of the recipe.

        Raises:
            ValueError: the recipe has no name, because it was given as an object.
        """
        recipe: Any = self.loaded_recipe
        if recipe is not None and self.config["recipe"] is None:  # type: ignore[attr-defined]
            raise ValueError(
                "The recipe on this pipeline has no name to save: save it with pipe.loaded_recipe.save_pretrained(folder),"
                " and load it with pipe.load_recipe(folder), or call unload_recipe() first."
            )
        if recipe is not None:
            recipe.remove(self)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            if recipe is not None:
                recipe.apply(self)

    def _note(self, name: str | None) -> None:
        self.register_to_config(recipe=name)  # type: ignore[attr-defined]

    def _take(self, recipe: str | None) -> None:
        self._note(None)
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
