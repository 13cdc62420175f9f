"""diffusers-ext: published methods as drop-in plug-ins for any `DiffusionPipeline`.

Names are resolved on first use, so that the command line answers without importing torch.
"""

from typing import TYPE_CHECKING, Any

from . import registry as _registry
from .core.loading import register_components as _register_components

if TYPE_CHECKING:
    # diffusers looks base classes up in the package that a component's entry in model_index.json names.
    from diffusers import ModelMixin as ModelMixin
    from diffusers import SchedulerMixin as SchedulerMixin

    from .registry import *  # noqa: F403

__version__ = "0.2.0"

_REPORTS = ("summary", "support")
_BASES = ("ModelMixin", "SchedulerMixin")
for _name in (__name__, f"{__name__}.core.components"):
    _register_components(_name, {base: ["save_pretrained", "from_pretrained"] for base in _BASES})


def __getattr__(name: str) -> Any:
    if name in _REPORTS:
        return getattr(_registry, name)
    if name in _BASES:
        import diffusers

        return getattr(diffusers, name)
    room = _registry.exports().get(name)
    if room is not None:
        return getattr(__import__(room.package, fromlist=[name]), name)
    from .deprecated import renamed

    new = renamed(name)
    if new is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return __getattr__(new)


def __dir__() -> list[str]:
    return sorted({*globals(), *_registry.exports(), *_BASES, *_REPORTS})
