# Written by diffusers-ext. Diffusers runs this file with trust_remote_code=True. It runs all local files of one name in
# one module, and refuses a module with two pipeline classes: under the same name everywhere, a later one replaces an
# earlier one.
try:
    from diffusers_ext.recipes.pipelines import (
        RecipeStableDiffusionPipeline as Pipeline,
    )
except ImportError as error:
    raise ImportError(
        "RecipeStableDiffusionPipeline is a class of the package diffusers-ext, which is not installed or too old."
        " Install it from https://github.com/diffusers-ext/diffusers-ext and try again."
    ) from error

__all__ = ["Pipeline"]
