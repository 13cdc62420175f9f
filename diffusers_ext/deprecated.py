"""Names of version 0.1 that still work for one release."""

from __future__ import annotations

import warnings

RENAMED = {
    "analyse_pruning": "profile_network",
    "encode_pictures": "encode_images",
    "prune_unet": "prune_network",
    "record_probes": "record_calibration_inputs",
}


def renamed(name: str) -> str | None:
    """The new name of a public name of version 0.1, with a warning; None for any other name."""
    new = RENAMED.get(name)
    if new is not None:
        warnings.warn(
            f"diffusers_ext.{name} is now called {new}; the old name goes with version 0.3.",
            FutureWarning,
            stacklevel=3,
        )
    return new
