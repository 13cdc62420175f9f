"""Pairs of noises on disk: safetensors shards, each whole or not there, and a manifest that says how they were made.

A shard holds one batch of attempts: `noise` and `golden` (n, C, H, W) float16, `index` (n,) int64, which attempt
each row is, `scores` (n, 2) float32 where there was a scorer, and the prompts in its metadata. Its being there means
that the whole batch was tried, kept or not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import whole_file, write_json

MANIFEST = "manifest.json"
_FORMAT = 1


def shard_path(folder: str | Path, batch: int) -> Path:
    """Where batch number `batch` lies."""
    return Path(folder) / f"pairs-{batch:06d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor], prompts: Sequence[str], tried: int) -> None:
    """Writes a shard in one rename."""
    content = {name: value.contiguous() for name, value in tensors.items()}
    with whole_file(path) as partial:
        save_file(content, partial, {"prompts": json.dumps(list(prompts)), "tried": str(tried)})


def write_manifest(folder: str | Path, settings: dict[str, Any]) -> None:
    """Writes the manifest, or compares it with the one of an earlier run into the same folder.

    Raises:
        ValueError: the folder's pairs were made otherwise; the message names what differs.
    """
    path = Path(folder) / MANIFEST
    wanted = json.loads(json.dumps({"format": _FORMAT, **settings}))
    if path.is_file():
        have = read_manifest(folder)
        differ = sorted(key for key in wanted.keys() | have.keys() if wanted.get(key) != have.get(key))
        if differ:
            shown = "; ".join(f"{key}: {have.get(key)!r} there, {wanted.get(key)!r} now" for key in differ)
            raise ValueError(
                f"{folder} holds pairs that were made otherwise ({shown}): choose another folder, or delete it."
            )
        return
    write_json(path, wanted)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest.

    Raises:
        ValueError: there is none, or it is not whole.
    """
    path = Path(folder) / MANIFEST
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} holds no noise pairs: {path.name} is missing or not whole ({error}). Make pairs with"
            " training/collect_noise_pairs.py."
        ) from error


@dataclass(frozen=True)
class ShardSummary:
    """Pairs kept and tried in one shard."""

    kept: int
    tried: int


def read_summary(path: Path) -> ShardSummary:
    """Of a shard, from its header alone."""
    with _opened(path) as file:
        return ShardSummary(file.get_slice("index").get_shape()[0], int(file.metadata()["tried"]))


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole shard ({error}): delete it and collect again; only that batch is redone."
        ) from error


@dataclass(frozen=True)
class NoisePairs:
    """Pairs in memory.

    Attributes:
        noise: (n, C, H, W) float16, random.
        golden: like `noise`, the target.
        prompts: n texts.
        index: (n,) int64, the attempt's number.
    """

    noise: Tensor
    golden: Tensor
    prompts: list[str]
    index: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def load(cls, folder: str | Path) -> NoisePairs:
        """All shards of a folder.

        Raises:
            ValueError: no manifest, no pairs, or a shard that is not whole, does not belong, or holds a value
                that is not finite; it is named.
        """
        read_manifest(folder)
        parts = [_read(path) for path in sorted(Path(folder).glob("pairs-*.safetensors"))]
        parts = [part for part in parts if len(part)]
        if not parts:
            raise ValueError(
                f"{folder} holds no pairs: the collector has not kept any yet; lower its --margin."
            )
        shapes = {tuple(part.noise.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"{folder} holds pairs of different shapes: {sorted(shapes)}.")
        return cls(
            torch.cat([p.noise for p in parts]),
            torch.cat([p.golden for p in parts]),
            [prompt for p in parts for prompt in p.prompts],
            torch.cat([p.index for p in parts]),
        )

    def subset(self, rows: Tensor) -> NoisePairs:
        """The given rows (m,) int64."""
        chosen = [self.prompts[i] for i in rows.tolist()]
        return NoisePairs(self.noise[rows], self.golden[rows], chosen, self.index[rows])


def _read(path: Path) -> NoisePairs:
    with _opened(path) as file:
        names = set(file.keys())
        if not {"noise", "golden", "index"} <= names or "prompts" not in (file.metadata() or {}):
            raise ValueError(
                f"{path} is no shard of noise pairs: it holds {', '.join(sorted(names)) or 'nothing'}, expected"
                " noise, golden and index with the prompts in its metadata."
            )
        noise, golden, index = (file.get_tensor(name) for name in ("noise", "golden", "index"))
        prompts = json.loads(file.metadata()["prompts"])
    if noise.shape != golden.shape or not len(noise) == len(index) == len(prompts):
        raise ValueError(
            f"{path} does not hold pairs: noise {tuple(noise.shape)}, golden {tuple(golden.shape)},"
            f" {len(index)} indices and {len(prompts)} prompts."
        )
    if not (torch.isfinite(noise).all() and torch.isfinite(golden).all()):
        raise ValueError(f"{path} holds values that are not finite: delete it and collect again.")
    return NoisePairs(noise, golden, prompts, index)
