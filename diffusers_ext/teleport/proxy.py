"""The base of `TeleportScheduler`: wraps another scheduler, delegates to it, and is saved with statistics."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
from collections.abc import Callable
from typing import Any

from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..core.schedules import scheduler_class
from . import saving
from .gaussian import GaussianStats

_CONFIG_KEY = "_teleport"
# Properties that the wrapped scheduler lacks a setter for: its own error is raised.
_READ_ONLY = ("step_index", "begin_index", "compatibles")
_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class Delegated:
    """A method that replaces one of the wrapped scheduler, and exists only if the wrapped scheduler has it.

    Pipelines check `hasattr(scheduler, "scale_model_input")` and inspect the signature of `scheduler.step` to
    decide what to pass, so both must match the wrapped scheduler.
    """

    def __init__(self, through: Callable[..., Any]):
        self.through = through

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        return functools.wraps(getattr(scheduler.inner, self.name))(
            functools.partial(self.through, scheduler)
        )


@functools.cache
def _own_names(kind: type) -> frozenset[str]:
    """The attributes that a proxy class and its bases down to `SchedulerProxy` annotate."""
    classes = [base for base in kind.__mro__ if issubclass(base, SchedulerProxy)]
    return frozenset(name for base in classes for name in inspect.get_annotations(base))


class SchedulerProxy(SchedulerMixin, ConfigMixin):
    """Wraps a scheduler, delegates to it, and is saved with its statistics.

    An instance attribute belongs to the proxy if its class annotates it. All others, private ones included,
    are read from, set on and deleted from the wrapped scheduler.

    `scheduler_config.json` contains the config of the wrapped scheduler and, under one private key, its class
    name and how far to skip. The same file therefore still configures the plain scheduler.
    """

    inner: Any
    stats: GaussianStats
    skip: float | str
    sigma: float | None
    mean_from: str

    def to_json_string(self) -> str:
        """The wrapped scheduler's config with our keys, as `save_pretrained` writes it."""
        config = json.loads(self.inner.to_json_string())
        config["_class_name"] = type(self).__name__
        config[_CONFIG_KEY] = {
            "scheduler": type(self.inner).__name__,
            "skip": self.skip,
            "sigma": self.sigma,
            "mean_from": self.mean_from,
        }
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Raises a ValueError: a config has no statistics. Use `from_scheduler` or `from_pretrained`."""
        raise ValueError(
            "A TeleportScheduler needs statistics, which a config does not contain: use "
            "TeleportScheduler.from_scheduler(Scheduler.from_config(config), stats) or from_pretrained(...)."
        )

    def save_config(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes `teleport_stats.npz` and `scheduler_config.json`, as `save_pretrained` does.

        The means of `set_mean` are not saved.
        """
        if not os.path.isfile(save_directory):  # the base class raises an error
            os.makedirs(save_directory, exist_ok=True)
            saving.write_archive(save_directory, self.stats.to_dict_of_arrays())
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads a scheduler saved by `save_pretrained`, from a folder or a Hub repository.

        Raises:
            ValueError: the config is that of a plain scheduler, or the statistics are missing or damaged.
        """
        hub = {key: kwargs[key] for key in _HUB_KEYWORDS if key in kwargs}
        config, unused = cls.load_config(
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, **kwargs
        )
        ours = config.pop(_CONFIG_KEY, None)
        if ours is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a plain scheduler ({config.get('_class_name')}): "
                "load it with that class and wrap it with TeleportScheduler.from_scheduler."
            )
        config["_class_name"] = ours["scheduler"]
        inner = scheduler_class(ours["scheduler"]).from_config(config)
        path = saving.find_archive(str(pretrained_model_name_or_path), subfolder, hub)
        stats = _stats_of(path)
        build: Any = cls
        scheduler = build(inner, stats, ours["skip"], ours["sigma"], ours["mean_from"])
        return (scheduler, unused) if return_unused_kwargs else scheduler

    # -- everything else is delegated to the wrapped scheduler

    def __getattr__(self, name: str) -> Any:
        # Called for what the proxy itself lacks. Copy and pickle look up special methods on instances that
        # have no `inner` yet.
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _own_names(type(self)) or (hasattr(type(self), name) and name not in _READ_ONLY):
            super().__setattr__(name, value)
        else:
            setattr(self.inner, name, value)
            self._wrapped_changed()

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self.inner, name)

    def _wrapped_changed(self) -> None:
        """Called after an attribute of the wrapped scheduler was set through the proxy."""

    def __copy__(self) -> Any:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, inner=copy.copy(self.inner))
        return other

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def compatibles(self) -> list[Any]:
        """Classes that can be made with `from_config(scheduler.config)`: those of the wrapped scheduler."""
        return self.inner.compatibles

    @property
    def _internal_dict(self) -> FrozenDict:
        # The value of `config`; our keys are added when saving.
        return self.inner._internal_dict

    @_internal_dict.setter
    def _internal_dict(self, config: dict[str, Any]) -> None:
        # Stable Diffusion pipelines update outdated configs in place; the wrapped scheduler needs the change.
        self.inner._internal_dict = config


def _stats_of(path: str) -> GaussianStats:
    arrays = saving.read_archive(path)
    try:
        return GaussianStats.from_arrays(arrays, path)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); save the scheduler again.") from error
