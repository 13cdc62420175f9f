"""How a `TeleportScheduler` is written and read: the wrapped config, our keys, the statistics."""

import json
import os
import zipfile
from typing import Any

import numpy as np
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import hf_hub_download

from ..files import whole_file
from . import levels
from .gaussian import GaussianStats

# Not .safetensors: diffusers would then take the whole repository for one without safetensors weights.
STATS_NAME = "teleport_stats.npz"
_CONFIG_KEY = "_teleport"
_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class SavedWithStats(SchedulerMixin, ConfigMixin):
    """A scheduler around another one that is saved with its statistics.

    `scheduler_config.json` holds the wrapped scheduler's config and, under one private key, its class name
    and how far to skip, so that the same file still configures the plain scheduler.
    """

    inner: Any
    stats: GaussianStats
    skip: float | str
    sigma: float | None
    mean_from: str

    def to_json_string(self) -> str:
        """The wrapped config plus our keys, as `save_pretrained` writes it."""
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
        """Not possible: a config holds no statistics. Use `from_scheduler` or `from_pretrained`."""
        raise ValueError(
            "A TeleportScheduler needs statistics, which a config does not hold: use "
            "TeleportScheduler.from_scheduler(Scheduler.from_config(config), stats) or from_pretrained(...)."
        )

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes `teleport_stats.npz` and `scheduler_config.json`; what `set_mean` was given is not saved."""
        os.makedirs(save_directory, exist_ok=True)
        # Into an open file, as numpy gives a path of its own the ending .npz.
        with whole_file(os.path.join(save_directory, STATS_NAME)) as partial, open(partial, "wb") as file:
            np.savez(file, allow_pickle=False, **self.stats.to_dict_of_arrays())
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads what `save_pretrained` wrote, from a folder or a Hub repository.

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
        inner = levels.scheduler_class(ours["scheduler"]).from_config(config)
        stats = _load_stats(_find_stats(str(pretrained_model_name_or_path), subfolder, hub))
        build: Any = cls
        scheduler = build(inner, stats, ours["skip"], ours["sigma"], ours["mean_from"])
        return (scheduler, unused) if return_unused_kwargs else scheduler


def _find_stats(source: str, subfolder: str | None, hub: dict[str, Any]) -> str:
    """Path of the statistics beside the scheduler's config; downloads them from a Hub repository."""
    if not os.path.isdir(source):
        return hf_hub_download(source, STATS_NAME, subfolder=subfolder, **hub)
    for folder in (os.path.join(source, subfolder or ""), source):
        path = os.path.join(folder, STATS_NAME)
        if os.path.isfile(path):
            return path
    raise ValueError(f"{source}: no {STATS_NAME} beside the scheduler's config; save the pipeline again.")


def _load_stats(path: str) -> GaussianStats:
    try:
        with np.load(path, allow_pickle=False) as file:
            return GaussianStats.from_arrays({name: file[name] for name in file.files}, path)
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); save the scheduler again.") from error
