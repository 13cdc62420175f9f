# Written by diffusers-ext. Diffusers runs this file with trust_remote_code=True.
try:
    from diffusers_ext import (
        MixtureSource,
    )
except ImportError as error:
    raise ImportError(
        "MixtureSource is a class of the package diffusers-ext, which is not installed or too old."
        " Install it from https://github.com/diffusers-ext/diffusers-ext and try again."
    ) from error

__all__ = ["MixtureSource"]
