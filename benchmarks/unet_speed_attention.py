"""GRI attention against full attention on single attention layers, for `unet_speed`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_ext.asdm.gri_attention import gri_attention, padded_width
from diffusers_ext.asdm.gri_processors import GRIAttnProcessor
from diffusers_ext.metrics.comparison import markdown_table

from .framework.statistics import paired_ratio
from .framework.timing import take_turns

WINDOW, POOL = 8, 4
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
HEADER = [
    "tokens",
    "heads × width",
    "SDPA",
    "full, ms",
    "GRI, ms",
    "GRI ÷ full",
    "layer, full, ms",
    "layer, GRI, ms",
    "layer, GRI ÷ full",
]


def layers_of(shape: str, sample_size: int, width: int) -> list[tuple[int, int, int]]:
    """(side of the image in tokens, heads, width of a head) of the two finest attentions; see `shape_config`."""
    if shape == "sd15":
        return [(sample_size, 8, width // 8), (sample_size // 2, 8, width // 4)]
    return [(sample_size // 2, width // 32, 64), (sample_size // 4, width // 16, 64)]


def attention_table(
    layers: list[tuple[int, int, int]],
    batch_size: int,
    repetitions: int,
    warmup: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """A row for each layer and SDPA backend, and what they say of flash."""
    rows, plain = [], []
    missing: dict[str, list[str]] = {}
    for side, heads, width in layers:
        work = _work(side, heads, width, batch_size, device, dtype)
        size = f"{side} × {side} tokens and {heads} heads × {width}"
        for name, backend in BACKENDS.items():
            if reason := _refusal(work, backend):
                missing.setdefault(f"{name} ({reason})", []).append(size)
                continue
            with sdpa_kernel(backend):
                found = take_turns(work, repetitions, warmup, device, f"{size}, {name}")
            full, gri, layer_full, layer_gri = found.values()
            alone, layer = paired_ratio(gri, full), paired_ratio(layer_gri, layer_full)
            times = [f"{1000 * float(np.median(seconds)):.3f}" for seconds in found.values()]
            cells = [f"{side} × {side}", f"{heads} × {width}", name]
            rows.append([*cells, *times[:2], alone.format(), *times[2:], layer.format()])
            if name == "flash":
                plain.append(f"{alone.format()} alone and {layer.format()} as a layer at {size}")
    said = "; ".join(plain) or "not measured, as PyTorch has no flash kernel here"
    text = (
        f"{markdown_table(HEADER, rows)}\n\n**GRI against flash SDPA**, time as a share of it: {said}.\n\n"
        f"GRI attention has windows of {WINDOW} × {WINDOW} and cells of {POOL} × {POOL}, and calls the same SDPA backend as"
        " full attention does. The first columns are the attention of given queries, keys and values; a layer also has its"
        f" four projections. By itself PyTorch chooses {_chosen(layers, batch_size, device, dtype)}, as it did in the UNets"
        " above."
    )
    left_out = [
        name if len(sizes) == len(layers) else f"{name} at {', '.join(sizes)}"
        for name, sizes in missing.items()
    ]
    return text + (f" Left out: {'; '.join(left_out)}." if left_out else "")


def _refusal(work: dict[str, Any], backend: SDPBackend) -> str:
    """Why a backend cannot do the work, "" if it can."""
    try:
        with sdpa_kernel(backend):
            for function in work.values():
                function()
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        return "no kernel for this device, dtype or width" if "No " in first else first
    return ""


def _work(
    side: int, heads: int, width: int, batch_size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    like: Any = {"device": device, "dtype": dtype}
    query, key, value = (torch.randn(batch_size, side * side, heads, width, **like) for _ in range(3))
    hidden = torch.randn(batch_size, side * side, heads * width, **like)
    full: Any = Attention(heads * width, heads=heads, dim_head=width).to(**like).eval()
    gri: Any = Attention(heads * width, heads=heads, dim_head=width).to(**like).eval()
    gri.set_processor(GRIAttnProcessor(WINDOW, POOL, side, side))
    return {
        "full": lambda: dispatch_attention_fn(query, key, value),
        "GRI": lambda: gri_attention(query, key, value, side, side, WINDOW, POOL),
        "layer, full": lambda: full(hidden),
        "layer, GRI": lambda: gri(hidden),
    }


def _chosen(
    layers: list[tuple[int, int, int]], batch_size: int, device: torch.device, dtype: torch.dtype
) -> str:
    """The backends that PyTorch chooses for full and for GRI attention's shapes, by name."""
    found = set()
    for side, heads, width in layers:
        window = min(WINDOW, side)
        queries, keys = window**2, window**2 + (-(-side // POOL)) ** 2
        windows = batch_size * (-(-side // window)) ** 2
        for batch, n, m, dim in (
            (batch_size, side**2, side**2, width),
            (windows, queries, keys, padded_width(width)),
        ):
            query = _empty(batch, heads, n, dim, device, dtype)
            key = _empty(batch, heads, m, dim, device, dtype)
            # The one place where PyTorch tells; private, but what its own dispatch calls.
            choice = SDPBackend(torch._fused_sdp_choice(query, key, key))
            found.add(next((name for name, backend in BACKENDS.items() if backend == choice), choice.name))
    return " and ".join(sorted(found))


def _empty(batch: int, heads: int, n: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(batch, n, heads, width, device=device, dtype=dtype).transpose(1, 2)
