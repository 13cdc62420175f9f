"""The Gaussian approximation of a data set: fitting, saving, and the functions of `closed_form` for samples.

Σ is stored as its `r` leading eigenpairs plus an isotropic complement, Σ = U diag(λ) Uᵀ + s̄² (I − U Uᵀ),
where s̄² is the mean of the remaining eigenvalues. (The paper's code uses s̄² = 0; a positive value preserves
the total variance.)
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import PushToHubMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..core.predictions import Level
from . import saving
from .closed_form import (
    Gaussian,
    GuidedBasis,
    gaussian_denoiser,
    guided_basis,
    guided_transport,
    implied_mean,
    transport,
)
from .fit import fit_moments
from .prompt_map import PromptMap

_PREFIX = "unconditional."
_MAP_PREFIX = "prompt_map."
_MAP_TENSORS = ("center", "components", "weights", "offset")


@dataclass(frozen=True, eq=False, repr=False)
class GaussianStats(PushToHubMixin):
    """Mean and covariance of a data set in the space that a pipeline denoises, and the maps based on them.

    Attributes:
        mean: (*shape), float32, in data units (pixels in [−1, 1], or scaled latents).
        eigenvectors: (D, r), float32, orthonormal columns; D is the product of `shape`.
        eigenvalues: (r,), float32, variances in squared data units, descending.
        residual: s̄², the variance in every direction outside the eigenvectors' span.
        num_samples: number of fitted samples.
        class_means: (K, *shape), float32, or None. If given, the covariance is the pooled within-class one.
        class_names: K different names, or None.
        class_counts: number of samples behind each class mean, or None.
        prompt_map: predicts the mean of any prompt from its embeddings (`fit_prompt_map`), or None.
        unconditional: statistics of all samples regardless of class, if these are within-class statistics.
            Transport with guidance needs both.
        calibration: JSON-serialisable notes on where the approximation is accurate, such as `{"sigma": 9.7}`.

    Instances are immutable; `dataclasses.replace(stats, calibration=...)` makes a changed copy.

    Raises:
        ValueError: shapes that do not match, a value that is not finite, or a variance that is negative or
            out of order.
    """

    mean: Tensor
    eigenvectors: Tensor
    eigenvalues: Tensor
    residual: float
    num_samples: int
    class_means: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    class_counts: tuple[int, ...] | None = None
    prompt_map: PromptMap | None = None
    unconditional: "GaussianStats | None" = None
    calibration: dict[str, Any] = field(default_factory=dict)
    _cache: dict[str, Any] = field(default_factory=dict, init=False)
    _source: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("mean", "eigenvectors", "eigenvalues", "class_means"):
            tensor = getattr(self, name)
            if tensor is not None:
                put(name, tensor.detach().to(torch.float32).contiguous())
        if self.unconditional is not None and self.unconditional.shape != self.shape:
            raise ValueError(
                f"unconditional statistics have shape {self.unconditional.shape}, these {self.shape}: fit both to"
                " the same samples."
            )
        put("residual", float(self.residual))
        put("num_samples", int(self.num_samples))
        put("class_names", None if self.class_names is None else tuple(self.class_names))
        put("class_counts", None if self.class_counts is None else tuple(map(int, self.class_counts)))
        try:
            # The round trip copies the caller's dict and turns tuples into lists, as in a loaded file.
            put("calibration", json.loads(json.dumps(dict(self.calibration), allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"calibration must hold finite JSON values only: {error}.") from error
        _check_fields(self)

    def __repr__(self) -> str:
        classes = f", classes={len(self.class_names)}" if self.class_names else ""
        prompts = f", prompt_map={self.prompt_map}" if self.prompt_map else ""
        return (
            f"GaussianStats(shape={self.shape}, rank={self.rank}, total_variance={self.total_variance:.6g}, "
            f"residual={self.residual:.6g}, num_samples={self.num_samples}{classes}{prompts})"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.mean.shape)

    @property
    def source(self) -> str | None:
        """The folder or repository that `from_pretrained` has loaded these statistics from; None for others."""
        return self._source

    @property
    def rank(self) -> int:
        """Number r of eigenpairs kept."""
        return self.eigenvalues.numel()

    @property
    def total_variance(self) -> float:
        """tr Σ = Σλ + (D − r)·s̄²."""
        return float(self.eigenvalues.double().sum()) + (self.mean.numel() - self.rank) * self.residual

    @classmethod
    def fit(
        cls,
        batches: Iterable[Any],
        rank: int = 256,
        *,
        oversampling: int | None = None,
        progress: bool = False,
    ) -> "GaussianStats":
        """Fits statistics to samples in a single pass.

        Up to D = 2048 dimensions the float64 covariance and its `eigh` are exact. Above, the scatter is kept
        as `rank + oversampling` orthogonal rows that are updated by blocks of 256 samples, in O(D·(rank +
        oversampling + 256)) memory. This is also exact as long as N ≤ rank + oversampling. (A randomised
        range finder would be more accurate at the same size, but it needs several passes, and a generator of
        batches allows only one.) The truncation makes the eigenvalues slightly too small: with a spectrum as
        flat as 1/k, D = 65,536 and rank 256, by 0.06% for the first half and by 0.25% for the last
        (`python -m benchmarks cost`). tr Σ is exact in either case, and the difference is added to the residual.

        Args:
            batches: tensors (b, *shape) in the scale that the model denoises, or pairs (tensor, b names). Any
                float dtype; sizes may differ. The result does not depend on how the samples are split into
                batches. An iterable such as a generator or a `DataLoader`, or one tensor with all samples.
            rank: number of eigenpairs, from 0 (isotropic) to min(D, N − 1), or N − K with K classes.
            oversampling: rows kept beyond `rank` when D > 2048; default max(64, 2 · rank).
            progress: show a progress bar over the batches.

        Returns:
            Statistics on the CPU. The covariance is normalised by 1/(N − 1). With labels, `class_means` has
            one mean per name, `mean` is still the mean of all samples, and the covariance is the pooled
            *within-class* one, normalised by 1/(N − K). It belongs to the class means, not to `mean`. Labels
            cost K·D more memory. `unconditional` then has the fit without labels.

        Raises:
            ValueError: no or too few samples, a rank that is too large for D or for the number of samples,
                different shapes, integer data, NaN or infinite values, or labels that do not match; the
                message names the batch.
        """
        within, total = fit_moments(batches, rank, oversampling=oversampling, progress=progress)
        unconditional = None if total is None else cls(**total._asdict())
        return cls(**within._asdict(), unconditional=unconditional)

    @classmethod
    def from_score(
        cls,
        pipe: Any,
        prompts: str | Sequence[str] | None = None,
        rank: int = 64,
        calls: int = 500,
        *,
        batch_size: int = 8,
        num_inference_steps: int = 50,
        seed: int = 0,
        resume_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
        **call_kwargs: Any,
    ) -> "GaussianStats":
        """Statistics read off the denoiser of a pipeline, without data and without sampling. This is our addition.

        The denoiser of a Gaussian is D(x) = μ + J(x − μ) with J = Σ(Σ + σ²I)⁻¹. It is asked at pairs of opposite steps
        μ ± σw, with random w in all directions at once: the odd part of a pair is Jw, and the even part gives μ. Σ is the
        least-squares fit to all pairs, as a few eigenpairs plus a multiple of the identity. The level σ is the one at
        which two halves of the pairs predict each other best.

        Args:
            pipe: a `DiffusionPipeline` that `apply_teleport` works on, without guidance distilled into it; it is not changed.
            prompts: a sample of the prompts that the model was trained on, a few hundred if possible, as frequent as they
                are there. Every pair has a prompt of its own. The covariance is then that *within* prompts, `class_means`
                has the mean of every prompt that was asked, for `fit_prompt_map`, and `unconditional` adds the covariance
                of these means. None for a pipeline without prompts, or for the empty prompt.
            rank: largest number of eigenpairs. Only those that exceed the noise of the fit are kept, fewer than a
                sixth of the pairs.
            calls: number of rows that the denoiser is shown in total, 100 or more.
            batch_size: rows of a call.
            num_inference_steps: of the grid whose levels are used.
            seed: seed of the steps.
            resume_dir: folder that keeps every answer of the denoiser, so that an interrupted fit resumes: as many bytes
                as 8 · D · calls. It may be deleted afterwards.
            progress: show a progress bar over the calls.
            call_kwargs: passed to the pipeline, such as `height`, `width` and `max_sequence_length`.

        Returns:
            Statistics on the CPU. `calibration["score"]` tells the calls, the level, the share of the responses that the
            Gaussian leaves `unexplained` (the error of the network included), the relative standard `error` of the
            covariance, and the eigenvalues and principal cosines of two halves of the pairs. Memory: O(D · calls).

        Raises:
            ValueError: a pipeline that teleportation does not work on or that takes neither prompts nor a batch size,
                arguments out of range, a response of 1 or more, which no data have, halves that do not agree, or a
                `resume_dir` with answers to other questions.
        """
        # By its name, as the calls go through a scheduler that has statistics.
        module = import_module(".from_score", __package__)
        return module.fit_to_score(
            pipe,
            prompts,
            rank=rank,
            calls=calls,
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            seed=seed,
            resume_dir=resume_dir,
            progress=progress,
            **call_kwargs,
        )

    def transport(
        self, x: Tensor, start: Level, end: Level, mean: Tensor | None = None, guidance_scale: float = 1.0
    ) -> Tensor:
        """Carries states `x` (B, *shape) from level `start` to `end`; see the function `transport`.

        `mean` is (*shape) or (B, *shape) and defaults to `self.mean`. A `guidance_scale` other than 1 follows
        the guided flow (`guided_transport`), which needs `unconditional`. Computed in float32 (float64 for
        float64), returned in `x`'s dtype and on its device.

        Raises:
            ValueError: another shape than that of the statistics, guidance without `unconditional`, or
                invalid levels.
        """
        flat, own = self._operands(x, mean)
        if guidance_scale == 1:
            moved = transport(flat, *own, start, end)
        elif self.unconditional is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs statistics with an unconditional part: fit them to pairs"
                " (tensor, prompts), or use guidance_scale=1 for a transport without guidance."
            )
        else:
            _, all_samples = self.unconditional._operands(x, None)
            basis = self._guided_basis(own, all_samples)
            moved = guided_transport(flat, own, all_samples, guidance_scale, start, end, basis)
        return moved.to(x.dtype).reshape(x.shape)

    def denoise(self, x: Tensor, level: Level, mean: Tensor | None = None) -> Tensor:
        """E[x₀ | x] for states `x` (B, *shape) at `level`; `mean` and dtypes as in `transport`."""
        flat, parts = self._operands(x, mean)
        return gaussian_denoiser(flat, *parts, level).to(x.dtype).reshape(x.shape)

    def implied_mean(self, x: Tensor, denoised: Tensor, level: Level) -> Tensor:
        """The means (B, *shape) for which `denoise(x, level, mean)` gives `denoised`; see `implied_mean`."""
        if denoised.shape != x.shape:
            raise ValueError(
                f"denoised has shape {tuple(denoised.shape)}, x {tuple(x.shape)}: they must be equal."
            )
        flat, parts = self._operands(x, denoised)
        return implied_mean(flat, *parts, level).to(x.dtype).reshape(x.shape)

    def sample(
        self,
        n: int,
        level: Level = (1.0, 0.0),
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """`n` states (n, *shape), float32, at `level`, on the device of the mean. Default: clean samples."""
        noise = randn_tensor((n, *self.shape), generator=generator, device=self.mean.device)
        # White noise is the state at the level (0, 1), so sampling is transport from there.
        return self.transport(noise, (0.0, 1.0), level)

    def class_mean(self, names: str | Sequence[str]) -> Tensor:
        """Means (B, *shape) of the named classes; one name gives B = 1. ValueError for an unknown name."""
        wanted = [names] if isinstance(names, str) else [str(name) for name in names]
        if self.class_means is None or self.class_names is None:
            raise ValueError("These statistics have no class means: fit them to pairs (tensor, label names).")
        index = {name: i for i, name in enumerate(self.class_names)}
        unknown = [name for name in wanted if name not in index]
        if unknown:
            known = ", ".join(map(repr, self.class_names[:8])) + (", …" if len(index) > 8 else "")
            raise ValueError(f"Unknown class {unknown[0]!r}; the {len(index)} known classes are {known}.")
        return self.class_means[[index[name] for name in wanted]]

    def prompt_mean(self, features: Tensor) -> Tensor:
        """Means (B, *shape), float32, of prompts with these features (B, E).

        Raises:
            ValueError: the statistics have no prompt map.
        """
        if self.prompt_map is None:
            raise ValueError(
                "These statistics have no prompt map: make one with dx.fit_prompt_map(pipe, stats)."
            )
        return self.prompt_map(features).reshape(-1, *self.shape)

    def truncate(self, rank: int) -> "GaussianStats":
        """The same statistics with `rank` ≤ r eigenpairs; the residual absorbs the variance of the others.

        Raises:
            ValueError: `rank` is negative or larger than r.
        """
        if not 0 <= rank <= self.rank:
            raise ValueError(f"rank must lie in [0, {self.rank}] (the rank fitted), got {rank}.")
        dimension = self.mean.numel()
        left = self.total_variance - float(self.eigenvalues[:rank].double().sum())
        return replace(
            self,
            eigenvectors=self.eigenvectors[:, :rank],
            eigenvalues=self.eigenvalues[:rank],
            residual=max(0.0, left) / (dimension - rank) if rank < dimension else 0.0,
            unconditional=self.unconditional
            and self.unconditional.truncate(min(rank, self.unconditional.rank)),
        )

    def isotropic(self) -> "GaussianStats":
        """The control N(μ, (tr Σ / D)·I): the same mean and total variance, without directions."""
        return self.truncate(0)

    def _operands(self, x: Tensor, mean: Tensor | None) -> tuple[Tensor, Gaussian]:
        """`x` as (B, D), and the Gaussian with mean (D,) or (B, D), on its device."""
        if x.ndim != len(self.shape) + 1 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, these statistics are for (batch, *{self.shape}): "
                "use statistics fitted at this pipeline's resolution and channels."
            )
        if mean is not None and tuple(mean.shape) not in (self.shape, tuple(x.shape)):
            raise ValueError(
                f"mean has shape {tuple(mean.shape)}, expected {self.shape} or {tuple(x.shape)}."
            )
        own, vectors, values = self._on(
            x.device, torch.float64 if x.dtype == torch.float64 else torch.float32
        )
        mean = own if mean is None else mean
        flat_mean = mean.flatten() if mean.ndim == len(self.shape) else mean.flatten(1)
        return x.flatten(1), Gaussian(flat_mean, vectors, values, self.residual)

    def _guided_basis(self, own: Gaussian, all_samples: Gaussian) -> GuidedBasis:
        """`guided_basis`, cached for the last device and dtype."""
        key = (own.eigenvectors.device, own.eigenvectors.dtype)
        if self._cache.get("basis_key") != key:
            with torch.inference_mode(False), torch.no_grad():
                self._cache.update(basis_key=key, basis=guided_basis(own, all_samples))
        return self._cache["basis"]

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors in the given place, cached for the last one: a sampling loop uses only one."""
        if self._cache.get("key") != (device, dtype):
            # Copies made in inference mode could not be used in later computations with gradients.
            with torch.inference_mode(False):
                moved = tuple(
                    tensor.to(device=device, dtype=dtype)
                    for tensor in (self.mean, self.eigenvectors, self.eigenvalues)
                )
            self._cache.update(key=(device, dtype), tensors=moved)
        return self._cache["tensors"]

    # --- files ---

    def to_dict_of_arrays(self) -> dict[str, np.ndarray]:
        """All content as numpy arrays, bit-exact and safe for `np.savez` (`config` is a JSON string)."""
        return saving.to_arrays(self._tensors(), self._config())

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], source: str = "The arrays") -> "GaussianStats":
        """The inverse of `to_dict_of_arrays`; `source` names the origin of the arrays in error messages."""
        return cls._assemble(*saving.from_arrays(arrays, source), source)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> None:
        """Writes `config.json` and `gaussian_stats.safetensors` into a folder, which is created if needed.

        The other arguments are those that `PushToHubMixin.push_to_hub` passes.

        Raises:
            ValueError: `safe_serialization=False` or a `variant`, which are not supported.
        """
        if not safe_serialization or variant is not None:
            raise ValueError("GaussianStats are saved as safetensors in float32: no pickle, no variants.")
        saving.write_folder(save_directory, self._tensors(), self._config())

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
    ) -> "GaussianStats":
        """Loads from a local folder, without network access, or from a repository on the Hub.

        Raises:
            OSError: a file is missing, or the repository cannot be reached.
            ValueError: a file is damaged, belongs to another save or class, or contains non-finite values.
        """
        hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
        hub |= {"local_files_only": local_files_only, "force_download": force_download}
        config_path, weights_path = saving.find_folder(pretrained_model_name_or_path, subfolder, hub)
        stats = cls._assemble(*saving.read_folder(config_path, weights_path), str(weights_path))
        stats._note_source("/".join(filter(None, (str(pretrained_model_name_or_path), subfolder))))
        return stats

    def _note_source(self, source: str | None) -> None:
        object.__setattr__(self, "_source", source)

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
            "prompt_map": self.prompt_map
            and {"score": self.prompt_map.score, "options": self.prompt_map.options},
            "unconditional": None if self.unconditional is None else self.unconditional._config(),
            "calibration": self.calibration,
        }

    @classmethod
    def _assemble(cls, tensors: Mapping[str, Tensor], config: dict[str, Any], source: str) -> "GaussianStats":
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
                fields["prompt_map"] = PromptMap(**prompt_map, **config["prompt_map"])
            build: Any = cls
            stats: GaussianStats = build(**tensors, **fields, unconditional=unconditional)
            if list(stats.shape) != config["shape"] or stats.rank != config["rank"]:
                raise ValueError(f"the configuration says shape {config['shape']}, rank {config['rank']}")
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{source} holds no valid GaussianStats: {error}. Fit and save them again."
            ) from error
        return stats


def _check_fields(stats: GaussianStats) -> None:
    """Raises a ValueError unless the fields describe a Gaussian."""
    dimension, rank = stats.mean.numel(), stats.eigenvalues.numel()
    if stats.mean.ndim == 0 or dimension == 0:
        raise ValueError(f"mean must have at least one dimension and one element, got shape {stats.shape}.")
    if stats.eigenvalues.ndim != 1 or tuple(stats.eigenvectors.shape) != (dimension, rank):
        raise ValueError(
            f"With a mean of {dimension} elements and eigenvalues of shape {tuple(stats.eigenvalues.shape)}, "
            f"eigenvectors must have shape ({dimension}, {rank}), got {tuple(stats.eigenvectors.shape)}."
        )
    if rank > dimension:
        raise ValueError(f"rank {rank} is larger than the {dimension} dimensions.")
    for name, tensor in stats._tensors().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} contains NaN or infinite values.")
    if not (math.isfinite(stats.residual) and stats.residual >= 0):
        raise ValueError(f"residual must be finite and not negative, got {stats.residual}.")
    values = stats.eigenvalues
    if bool((values < 0).any()) or bool((values[1:] > values[:-1]).any()):
        raise ValueError("eigenvalues must be variances: not negative, in descending order.")
    if rank and float((stats.eigenvectors.square().sum(0) - 1).abs().max()) > 1e-3:
        raise ValueError("eigenvectors must have columns of length 1.")
    if stats.num_samples < 0:
        raise ValueError(f"num_samples must not be negative, got {stats.num_samples}.")
    _check_classes(stats)


def _check_classes(stats: GaussianStats) -> None:
    names, means, counts = stats.class_names, stats.class_means, stats.class_counts
    if stats.prompt_map is not None and stats.prompt_map.offset.numel() != stats.mean.numel():
        raise ValueError(
            f"The prompt map gives means of {stats.prompt_map.offset.numel()} elements, the statistics have"
            f" {stats.mean.numel()}: fit it to these statistics."
        )
    if counts is not None and (names is None or len(counts) != len(names) or min(counts) < 1):
        raise ValueError("class_counts must hold one positive number for each of the class_names.")
    if (names is None) != (means is None):
        raise ValueError("class_names and class_means must be given together.")
    if names is None or means is None:
        return
    if tuple(means.shape) != (len(names), *stats.shape) or len(set(names)) != len(names) or not names:
        raise ValueError(
            f"class_means must have shape (K, *{stats.shape}) with K different class_names, "
            f"got {tuple(means.shape)} and {len(set(names))} different names."
        )


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Removes the tensors with that prefix from `tensors` and returns them without it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
