"""How `GaussianStats` are written and read: safetensors and a JSON configuration, or numpy arrays."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from diffusers.utils import PushToHubMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor

from ..files import whole_file, write_json
from .prompt_map import PromptMap

if TYPE_CHECKING:
    from .gaussian import GaussianStats

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "gaussian_stats.safetensors"
_PREFIX = "unconditional."
_MAP_PREFIX = "prompt_map."
_MAP_TENSORS = ("center", "components", "weights", "offset")


class SavedGaussian(PushToHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of `GaussianStats`."""

    mean: Tensor
    eigenvectors: Tensor
    eigenvalues: Tensor
    residual: float
    num_samples: int
    class_means: Tensor | None
    class_names: tuple[str, ...] | None
    class_counts: tuple[int, ...] | None
    prompt_map: PromptMap | None
    unconditional: GaussianStats | None
    calibration: dict[str, Any]

    def to_dict_of_arrays(self) -> dict[str, np.ndarray]:
        """Everything as numpy arrays, bit-exact and safe for `np.savez` (`config` is a JSON string)."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in self._tensors().items()}
        return {**arrays, "config": np.array(json.dumps(self._config()))}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], source: str = "The arrays") -> GaussianStats:
        """The inverse of `to_dict_of_arrays`; `source` is what error messages call their origin."""
        if "config" not in arrays:
            raise ValueError(
                f"{source}: no entry 'config'. Expected what GaussianStats.to_dict_of_arrays gives."
            )
        config = _parse_config(str(arrays["config"]), source)
        tensors = {name: torch.from_numpy(np.array(arrays[name])) for name in arrays if name != "config"}
        return cls._assemble(tensors, config, source)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> None:
        """Write `config.json` and `gaussian_stats.safetensors` into a directory, which is created if need be.

        Each file appears whole or not at all, and the configuration, written last, holds the other's digest,
        so that a save that was cut short is noticed when loading. The other arguments are those that
        `PushToHubMixin.push_to_hub` passes; ValueError for `safe_serialization=False` (nothing here is
        pickled).
        """
        if not safe_serialization or variant is not None:
            raise ValueError("GaussianStats are saved as safetensors in float32: no pickle, no variants.")
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = safetensors.torch.save({name: tensor.cpu() for name, tensor in self._tensors().items()})
        config = {**self._config(), "sha256": hashlib.sha256(weights).hexdigest()}
        with whole_file(directory / WEIGHTS_NAME) as partial:
            partial.write_bytes(weights)
        write_json(directory / CONFIG_NAME, config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> GaussianStats:
        """Load from a directory, which never touches the network, or from a repository on the Hub.

        Raises:
            OSError: a file is missing, or the repository cannot be reached.
            ValueError: a file is damaged, is from another save or class, or holds non-finite values.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            folder = folder / (subfolder or "")
            config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
        else:
            try:
                config_path, weights_path = (
                    Path(
                        hf_hub_download(
                            str(pretrained_model_name_or_path),
                            name,
                            subfolder=subfolder,
                            revision=revision,
                            cache_dir=cache_dir,
                            token=token,
                            local_files_only=local_files_only,
                            force_download=force_download,
                        )
                    )
                    for name in (CONFIG_NAME, WEIGHTS_NAME)
                )
            except (OSError, HFValidationError) as error:
                raise OSError(
                    f"{str(pretrained_model_name_or_path)!r} is no local directory, and its {CONFIG_NAME} "
                    f"and {WEIGHTS_NAME} could not be had from the Hub: {error}"
                ) from error
        config, weights = _read(config_path), _read(weights_path)
        return cls._load(config_path, config, weights_path, weights)

    @classmethod
    def _load(cls, config_path: Path, config: bytes, weights_path: Path, weights: bytes) -> GaussianStats:
        values = _parse_config(config.decode(errors="replace"), str(config_path))
        try:
            tensors = safetensors.torch.load(weights)
        except SafetensorError as error:
            raise ValueError(
                f"{weights_path} ({len(weights)} bytes) is damaged or no safetensors file: {error}. "
                "Save or download it again."
            ) from error
        digest = values.pop("sha256", None)
        if digest != hashlib.sha256(weights).hexdigest():
            raise ValueError(
                f"{weights_path} is not the file that {config_path} describes (sha256 differs): one is "
                "damaged or from another save. Save or download both again."
            )
        return cls._assemble(tensors, values, str(weights_path))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"mean": self.mean, "eigenvectors": self.eigenvectors, "eigenvalues": self.eigenvalues}
        if self.class_means is not None:
            tensors["class_means"] = self.class_means
        if self.prompt_map is not None:
            tensors |= {_MAP_PREFIX + name: getattr(self.prompt_map, name) for name in _MAP_TENSORS}
        if self.unconditional is not None:
            tensors |= {_PREFIX + name: tensor for name, tensor in self.unconditional._tensors().items()}
        return tensors

    def _config(self) -> dict[str, Any]:
        return {
            "_class_name": type(self).__name__,
            "shape": list(self.mean.shape),
            "rank": self.eigenvalues.numel(),
            "residual": self.residual,
            "num_samples": self.num_samples,
            "class_names": None if self.class_names is None else list(self.class_names),
            "class_counts": None if self.class_counts is None else list(self.class_counts),
            "prompt_map": None if self.prompt_map is None else {"score": self.prompt_map.score},
            "unconditional": None if self.unconditional is None else self.unconditional._config(),
            "calibration": self.calibration,
        }

    @classmethod
    def _assemble(cls, tensors: Mapping[str, Tensor], config: dict[str, Any], source: str) -> GaussianStats:
        unconditional = prompt_map = None
        tensors = dict(tensors)
        if config["unconditional"] is not None:
            unconditional = cls._assemble(_take(tensors, _PREFIX), config["unconditional"], source)
        if config.get("prompt_map") is not None:
            prompt_map = _take(tensors, _MAP_PREFIX)
        expected = {"mean", "eigenvectors", "eigenvalues"} | (
            {"class_means"} if config["class_names"] else set()
        )
        if set(tensors) != expected:
            raise ValueError(
                f"{source} holds {sorted(tensors)}, expected {sorted(expected)}. Write it with "
                "GaussianStats.save_pretrained."
            )
        # Statistics of earlier versions have no counts and no prompt map.
        names = ("residual", "num_samples", "class_names", "class_counts", "calibration")
        fields = {name: config.get(name) for name in names}
        try:
            if prompt_map is not None:
                fields["prompt_map"] = PromptMap(**prompt_map, score=config["prompt_map"]["score"])
            build: Any = cls
            stats: GaussianStats = build(**tensors, **fields, unconditional=unconditional)
            if list(stats.shape) != config["shape"] or stats.rank != config["rank"]:
                raise ValueError(f"the configuration says shape {config['shape']}, rank {config['rank']}")
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{source} holds no valid GaussianStats: {error}. Fit and save them again."
            ) from error
        return stats


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Removes the tensors with that prefix from `tensors` and returns them without it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def _parse_config(text: str, source: str) -> dict[str, Any]:
    keys = {"_class_name", "shape", "rank", "residual", "num_samples", "class_names", "unconditional"}
    keys.add("calibration")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source}: the configuration is no valid JSON ({error}). Save it again.") from error
    if not isinstance(config, dict) or config.get("_class_name") != "GaussianStats":
        found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{source} describes {found!r}, expected 'GaussianStats': is this the right folder?")
    if not keys <= set(config):
        raise ValueError(
            f"{source} lacks {sorted(keys - set(config))}. Save it with GaussianStats.save_pretrained."
        )
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise OSError(
            f"No file {path}: expected {CONFIG_NAME} and {WEIGHTS_NAME} there, as written by "
            "GaussianStats.save_pretrained."
        ) from error
