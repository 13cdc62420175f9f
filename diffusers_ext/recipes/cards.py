"""The model card of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData


def recipe_card(
    name: str,
    lines: Mapping[str, str],
    base: Mapping[str, Any],
    call: Mapping[str, Any],
    figures: Mapping[str, str | float],
) -> ModelCard:
    """The model card: base model, methods and options, a snippet that runs, and figures. Needs no network.

    Args:
        name: the folder or repository that the snippet loads.
        lines: see `Recipe.lines`.
        base, call, figures: of the recipe.
    """
    hub_model = base["name"] if base["name"] and not Path(base["name"]).exists() else None
    prompts = base["prompts"]
    data = ModelCardData(
        base_model=hub_model if hub_model and hub_model.count("/") == 1 else None,
        pipeline_tag="text-to-image" if prompts else "unconditional-image-generation",
    )
    model = base["name"] or "path/of/the/model"
    methods = [f"| {title} | {text} |" for title, text in lines.items()] or ["| none | |"]
    rows = [f"| {title} | {_figure(value)} |" for title, value in figures.items()]
    with_it = ", ".join(f"{argument}={value!r}" for argument, value in call.items())
    arguments = ", ".join(filter(None, ('"a red bag"' if prompts else "", "**recipe.call" if call else "")))
    text = f"""---
{data.to_yaml()}
---

# A recipe of diffusers-ext

What is added to `{model}`, a `{base["pipeline"]}` with a `{base["denoiser"]}`, as one thing that is applied and removed:

| Method | Options |
| --- | --- |
{chr(10).join(methods)}

```python
import diffusers_ext as dx
from diffusers import DiffusionPipeline, {base["scheduler"]}

pipe = DiffusionPipeline.from_pretrained("{model}")
pipe.scheduler = {base["scheduler"]}.from_config(pipe.scheduler.config)
recipe = dx.Recipe.from_pretrained("{name}")
with recipe.on(pipe):
    image = pipe({arguments}).images[0]
```
"""
    if call:
        text += f"\nThe arguments that go with it, in `recipe.call`: {with_it}.\n"
    if rows:
        text += "\n## Figures\n\n| Figure | Value |\n| --- | --- |\n" + "\n".join(rows) + "\n"
    return populate_model_card(ModelCard(text), tags=["diffusers-ext", "recipe"])


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
