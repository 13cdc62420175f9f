"""Mean, leading eigenvectors and total variance of a stream of samples, in a single pass.

The method is based on one identity (Chan, Golub & LeVeque 1983): when a block of `m` samples is added to `n`
earlier ones, the scatter `Σ (x − mean)(x − mean)ᵀ` grows by the scatter of the block about its own mean plus
`n·m/(n + m) · δ δᵀ`, where `δ` is the difference of the two means. Both terms are Gram matrices of rows, so a
block is represented by its centred rows and one correction row. Applied class by class, this gives the exact
pooled within-class scatter.
"""

import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

BLOCK_ROWS = 256
EXACT_UP_TO = 2048
_CHUNK_COLUMNS = 8192


class Moments(NamedTuple):
    """The result of `fit_moments`. Tensors are on the CPU, `eigenvalues` in descending order."""

    mean: Tensor
    eigenvectors: Tensor
    eigenvalues: Tensor
    residual: float
    num_samples: int
    class_means: Tensor | None
    class_names: tuple[str, ...] | None
    class_counts: tuple[int, ...] | None


@torch.no_grad()
def fit_moments(
    batches: Iterable[Any],
    rank: int,
    *,
    oversampling: int | None = None,
    progress: bool = False,
    exact_up_to: int = EXACT_UP_TO,
) -> tuple[Moments, Moments | None]:
    """Fits a mean and a rank-`rank` plus isotropic covariance; the contract is that of `GaussianStats.fit`.

    With labels the first result is the within-class fit and the second the fit of all samples. Without labels
    the second result is None.

    `exact_up_to` is the largest dimension D whose D × D float64 scatter matrix is kept in memory. Above it
    the scatter is kept as `rank + oversampling` rows.
    """
    rank = operator.index(rank)
    extra = max(64, 2 * rank) if oversampling is None else operator.index(oversampling)
    if rank < 0 or extra < 0:
        raise ValueError(f"rank and oversampling must be at least 0, got rank={rank}, oversampling={extra}.")

    reader = _BlockReader(batches, progress=progress)
    scatter: _Scatter | None = None
    for block, classes in reader:
        if scatter is None:
            dimension = block.shape[1]
            if rank > dimension:
                raise ValueError(
                    f"rank={rank} is larger than the {dimension} dimensions of shape {reader.shape}: "
                    f"pass rank={dimension} or less."
                )
            scatter = (
                _DenseScatter(dimension, block.device)
                if dimension <= exact_up_to
                else _LowRankScatter(dimension, block.device, max(1, rank + extra))
            )
        scatter.update(block, classes)
    if scatter is None:
        raise ValueError("No samples to fit: the iterable of batches is empty (an already used generator?).")
    within = _finish(scatter, reader, rank, scatter.counts.numel())
    if reader.names is None:
        return within, None
    scatter.add_between()
    total = _finish(scatter, reader, rank, 1)
    return within, total._replace(class_means=None, class_names=None, class_counts=None)


def _finish(scatter: "_Scatter", reader: "_BlockReader", rank: int, means_fitted: int) -> Moments:
    counts = scatter.counts
    samples, classes, dimension = int(counts.sum()), counts.numel(), scatter.dimension
    freedom = samples - means_fitted
    groups = f" in {classes} classes" if reader.names is not None else ""
    if samples < 2 or freedom < 1:
        raise ValueError(
            f"A covariance needs at least 2 samples (with labels: 2 of one class), got {samples}{groups}."
        )
    if rank > freedom:
        raise ValueError(
            f"rank={rank} is larger than the {freedom} degrees of freedom of {samples} samples{groups}: "
            f"pass rank={freedom} or less, or more samples."
        )
    values, vectors = scatter.spectrum(rank)
    values = values / freedom
    total = scatter.trace() / freedom
    # Rounding can make the difference slightly negative if no variance is left.
    residual = max(0.0, total - float(values.sum())) / (dimension - rank) if dimension > rank else 0.0
    mean = (counts @ scatter.means[:classes]) / samples
    shape = reader.shape
    return Moments(
        mean=mean.reshape(shape).float().cpu(),
        eigenvectors=_fix_signs(vectors).float().cpu(),
        eigenvalues=values.float().cpu(),
        residual=residual,
        num_samples=samples,
        class_means=None
        if reader.names is None
        else scatter.means[:classes].float().cpu().reshape(-1, *shape),
        class_names=None if reader.names is None else tuple(reader.names),
        class_counts=None if reader.names is None else tuple(int(n) for n in counts),
    )


def _fix_signs(vectors: Tensor) -> Tensor:
    """Makes each column's largest entry positive, so that equal fits give equal files."""
    if vectors.shape[1] == 0:
        return vectors
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


class _BlockReader:
    """Checks batches and regroups them into blocks of `BLOCK_ROWS` rows: (rows (m, D), class indices (m,)).

    The blocks, and thus the result, do not depend on how the samples are split into batches. A yielded block
    is a view of a buffer that the next block overwrites.
    """

    def __init__(self, batches: Iterable[Any], *, progress: bool):
        # Iterating over a single tensor would yield its samples and treat their channels as samples.
        self._batches = [batches] if isinstance(batches, Tensor) else batches
        self._progress = progress
        self._index: dict[str, int] | None = None
        self.shape: tuple[int, ...] = ()

    @property
    def names(self) -> list[str] | None:
        return None if self._index is None else list(self._index)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        buffer = classes = None
        filled = 0
        for position, batch in enumerate(
            tqdm(self._batches, desc="Gaussian fit", disable=not self._progress)
        ):
            x, ids = self._read(position, batch, first=buffer is None)
            if x.shape[0] == 0:
                continue
            if buffer is None or classes is None:
                # Metal has no float64.
                device = torch.device("cpu") if x.device.type == "mps" else x.device
                dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
                buffer = torch.empty(BLOCK_ROWS, x.shape[1], dtype=dtype, device=device)
                classes = torch.zeros(BLOCK_ROWS, dtype=torch.long)
            taken = 0
            while taken < x.shape[0]:
                step = min(BLOCK_ROWS - filled, x.shape[0] - taken)
                buffer[filled : filled + step] = x[taken : taken + step]
                classes[filled : filled + step] = ids[taken : taken + step]
                filled, taken = filled + step, taken + step
                if filled == BLOCK_ROWS:
                    yield buffer, classes.to(buffer.device)
                    filled = 0
        if buffer is not None and classes is not None and filled:
            yield buffer[:filled], classes[:filled].to(buffer.device)

    def _read(self, position: int, batch: Any, *, first: bool) -> tuple[Tensor, Tensor]:
        """One batch as (rows (b, D), class indices (b,)); a ValueError names the batch that is wrong."""
        x, labels = _split_batch(position, batch)
        if x.shape[0] and first:
            self.shape = tuple(x.shape[1:])
            self._index = None if labels is None else {}
        if x.shape[0] and tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"Batch {position} has samples of shape {tuple(x.shape[1:])}, before it {self.shape}: "
                "all samples of a fit must have the same shape."
            )
        if not torch.isfinite(x).all():
            raise ValueError(f"Batch {position} contains NaN or infinite values: remove them before fitting.")
        ids = torch.zeros(x.shape[0], dtype=torch.long)
        if x.shape[0]:
            if (labels is None) != (self._index is None):
                raise ValueError(f"Batch {position}: either every batch or none must come with labels.")
            if labels is not None and self._index is not None:
                ids = torch.tensor([self._index.setdefault(name, len(self._index)) for name in labels])
        return x.detach().flatten(1), ids


def _split_batch(position: int, batch: Any) -> tuple[Tensor, list[str] | None]:
    labels = None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        batch, labels = batch if len(batch) == 2 else (batch[0], None)
    if not isinstance(batch, Tensor):
        raise ValueError(
            f"Batch {position} must be a tensor (batch, *shape) or a pair (tensor, label names), "
            f"got {type(batch).__name__}."
        )
    if batch.ndim < 2 or 0 in batch.shape[1:]:
        raise ValueError(f"Batch {position} must have shape (batch, *shape), got {tuple(batch.shape)}.")
    if not batch.is_floating_point():
        raise ValueError(
            f"Batch {position} has dtype {batch.dtype}: pass floating point values in the scale that the "
            "model denoises (pixels in [-1, 1], or scaled latents)."
        )
    if labels is None:
        return batch, None
    names = [str(label) for label in (labels.tolist() if isinstance(labels, Tensor) else labels)]
    if isinstance(labels, str) or len(names) != batch.shape[0]:
        raise ValueError(
            f"Batch {position} has {batch.shape[0]} samples and needs as many label names, got {labels!r}."
        )
    return batch, names


class _Scatter:
    """Class means and within-class scatter of all rows seen; without labels there is one class."""

    def __init__(self, dimension: int, device: torch.device):
        self.dimension = dimension
        self.counts = torch.zeros(0, dtype=torch.float64, device=device)
        self.means = torch.zeros(1, dimension, dtype=torch.float64, device=device)

    def update(self, block: Tensor, classes: Tensor) -> None:
        """Adds a block of rows (m, D) whose classes are given by index (m,)."""
        present, index, sizes = classes.unique(return_inverse=True, return_counts=True)
        self._grow(int(present.max()) + 1)
        before = self.counts[present]
        share = sizes / (before + sizes)
        weight = (before * share).sqrt()
        self._open(block.shape[0] + present.numel())
        for start in range(0, self.dimension, _CHUNK_COLUMNS):
            columns = slice(start, start + _CHUNK_COLUMNS)
            x = block[:, columns].double()
            block_means = x.new_zeros(present.numel(), x.shape[1]).index_add_(0, index, x) / sizes[:, None]
            delta = block_means - self.means[present, columns]
            self.means[present, columns] += delta * share[:, None]
            self._add(torch.cat([x - block_means[index], delta * weight[:, None]]), columns)
        self.counts[present] += sizes
        self._close()

    def add_between(self) -> None:
        """Turns the within-class scatter into the total one by adding Σ n_k (m_k − m)(m_k − m)ᵀ."""
        n = self.counts.numel()
        mean = self.counts @ self.means[:n] / self.counts.sum()
        for low in range(0, n, BLOCK_ROWS):
            part = slice(low, min(low + BLOCK_ROWS, n))
            self._open(part.stop - low)
            for start in range(0, self.dimension, _CHUNK_COLUMNS):
                columns = slice(start, start + _CHUNK_COLUMNS)
                offset = self.means[part, columns] - mean[columns]
                self._add(offset * self.counts[part, None].sqrt(), columns)
            self._close()

    def _grow(self, classes: int) -> None:
        if classes > self.counts.numel():
            self.counts = torch.cat([self.counts, self.counts.new_zeros(classes - self.counts.numel())])
        if classes > self.means.shape[0]:
            means = self.means.new_zeros(max(classes, 2 * self.means.shape[0]), self.dimension)
            means[: self.means.shape[0]] = self.means
            self.means = means

    def _open(self, new_rows: int) -> None: ...

    def _add(self, rows: Tensor, columns: slice) -> None:
        raise NotImplementedError

    def _close(self) -> None: ...

    def trace(self) -> float:
        raise NotImplementedError

    def spectrum(self, rank: int) -> tuple[Tensor, Tensor]:
        """The `rank` largest eigenvalues of the scatter, descending, and their eigenvectors (D, rank)."""
        raise NotImplementedError


class _DenseScatter(_Scatter):
    """The D × D matrix itself, in float64. Its D fits in one chunk of columns."""

    def __init__(self, dimension: int, device: torch.device):
        super().__init__(dimension, device)
        self._matrix = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    def _add(self, rows: Tensor, columns: slice) -> None:
        self._matrix.addmm_(rows.T, rows)

    def trace(self) -> float:
        return float(self._matrix.trace())

    def spectrum(self, rank: int) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self._matrix)
        return values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]


class _LowRankScatter(_Scatter):
    """At most `size` orthogonal rows (σ_i v_iᵀ) whose Gram matrix over the columns approximates the scatter.

    Each block is stacked under the rows, and the stack is rotated (by the eigenvectors of its small Gram
    matrix in float64) and cut back to `size` rows. Up to `size` rows in total, nothing is lost. Above, the
    directions with the smallest variance are cut. The trace is accumulated separately, so it is exact, and
    the lost variance is added to the isotropic residual.
    """

    def __init__(self, dimension: int, device: torch.device, size: int):
        super().__init__(dimension, device)
        self._size = size
        self._squares = torch.zeros(0, dtype=torch.float64, device=device)
        self._rows = torch.empty(size + BLOCK_ROWS + 1, dimension, device=device)
        self._trace = 0.0

    @property
    def _kept(self) -> int:
        return self._squares.numel()

    def _open(self, new_rows: int) -> None:
        needed = self._kept + new_rows
        if needed > self._rows.shape[0]:
            rows = self._rows.new_empty(needed, self.dimension)
            rows[: self._kept] = self._rows[: self._kept]
            self._rows = rows
        self._cross = self._squares.new_zeros(new_rows, self._kept)
        self._own = self._squares.new_zeros(new_rows, new_rows)

    def _add(self, rows: Tensor, columns: slice) -> None:
        self._rows[self._kept : self._kept + rows.shape[0], columns] = rows.float()
        self._cross.addmm_(rows, self._rows[: self._kept, columns].double().T)
        self._own.addmm_(rows, rows.T)

    def _close(self) -> None:
        self._trace += float(self._own.trace())
        # The kept rows are orthogonal up to rounding, which only makes the cut slightly suboptimal: the
        # rotation is orthogonal in any case, so it does not change the variance.
        gram = torch.cat(
            [
                torch.cat([self._squares.diag(), self._cross.T], dim=1),
                torch.cat([self._cross, self._own], dim=1),
            ]
        )
        values, rotation = torch.linalg.eigh(gram)
        keep = min(self._size, values.numel())
        turn = rotation.flip(1)[:, :keep].T.float()
        self._squares = values.flip(0)[:keep].clamp(min=0)
        for start in range(0, self.dimension, _CHUNK_COLUMNS):
            columns = slice(start, start + _CHUNK_COLUMNS)
            self._rows[:keep, columns] = turn @ self._rows[: values.numel(), columns]

    def trace(self) -> float:
        return self._trace

    def spectrum(self, rank: int) -> tuple[Tensor, Tensor]:
        rows = self._rows[: self._kept]
        gram = torch.zeros(self._kept, self._kept, dtype=torch.float64, device=rows.device)
        for chunk in rows.split(_CHUNK_COLUMNS, dim=1):
            chunk = chunk.double()
            gram.addmm_(chunk, chunk.T)
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
        # Smaller eigenvalues are float32 rounding errors; QR replaces their directions with arbitrary ones.
        real = values > 1e-12 * values[:1]
        values = torch.where(real, values, 0.0)
        scaled = vectors * torch.where(real, values, torch.inf).rsqrt()
        basis, _ = torch.linalg.qr(rows.T @ scaled.float())
        return values, basis
