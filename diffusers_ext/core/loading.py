"""Makes diffusers accept this package's components in `model_index.json` (placeholder)."""

from collections.abc import Mapping, Sequence


def register_components(package: str, base_classes: Mapping[str, Sequence[str]]) -> None:
    from diffusers.pipelines import pipeline_loading_utils

    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(package, {k: list(v) for k, v in base_classes.items()})
