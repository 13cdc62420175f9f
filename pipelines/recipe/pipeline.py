# diffusers runs all local files of one name in one module, and refuses a module with two pipeline classes:
# under the same name `Pipeline` everywhere, a later one replaces an earlier one.
from diffusers_ext.recipes.pipelines import RecipeStableDiffusionPipeline as Pipeline

__all__ = ["Pipeline"]
