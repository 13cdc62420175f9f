"""Trains NPNet, which maps random noise to noise that matches the prompt better, on pairs of noises.

    accelerate launch training/train_npnet.py --pretrained_model_name_or_path MODEL \\
        --train_data_dir runs/pairs --output_dir runs/npnet --use_ema

The pairs come from training/collect_noise_pairs.py or, with --dataset_name, from a data set on the Hub that
contains such a folder. The text encoder of MODEL conditions the network. The trained network is saved in
OUTPUT_DIR/model with its model card; load it with `diffusers_ext.NPNetModel.from_pretrained`.
--resume_from_checkpoint latest resumes an interrupted run. On a CPU, start several processes with
`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

import diffusers_ext  # noqa: F401
from diffusers_ext.core.images import as_tensor, save_grid
from diffusers_ext.core.prompts import PromptEmbeds, prompt_embeddings, prompt_options
from diffusers_ext.core.storage import ShardStore, differences, show_differences
from diffusers_ext.golden_noise.npnet import NPNetModel
from diffusers_ext.golden_noise.pairs import NoisePairs
from diffusers_ext.golden_noise.scorers import load_scorer
from diffusers_ext.golden_noise.training import (
    NPNetObjective,
    PairRows,
    compare,
    relative_error,
    split_by_prompt,
)
from diffusers_ext.training.arguments import (
    add_model_arguments,
    add_training_arguments,
    below_one,
    non_negative_float,
    positive_int,
)
from diffusers_ext.training.cards import create_hub_repo, publish
from diffusers_ext.training.checkpoints import check_resume
from diffusers_ext.training.loop import make_accelerator, train
from diffusers_ext.training.models import load_frozen
from diffusers_ext.training.recipes import run_recipe
from diffusers_ext.training.start import set_train_steps

# Arguments that only act on the validation images.
VALIDATION = ("num_inference_steps", "guidance_scale")

ABOUT = """\
# Golden noise for {model}

An NPNet (Zhou et al., arXiv:2411.09502), which maps the random initial noise to noise that matches the prompt
better. Trained on {pairs} pairs of {prompts} prompts.

```python
import diffusers_ext as dx
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("BASE")
npnet = dx.NPNetModel.from_pretrained("FOLDER")
dx.apply_golden_noise(pipe, npnet)
```

In the table, `relative error` is the squared error on pairs of held-out prompts, divided by that of the
unchanged noise. Scores are means over held-out pairs: *re-denoised* is the target, *random* a random change
of the same size, *shuffled* the network with another prompt, *rescaled* the random noise with the mean and
variance of golden noise."""


def parse_args() -> argparse.Namespace:
    """Parses NPNet's own arguments and those that all training scripts share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_model_arguments(parser, "the pipeline that the pairs come from")
    add("--train_data_dir", default=None, help="folder written by collect_noise_pairs.py")
    add("--dataset_name", default=None, help="data set on the Hub that contains such a folder")
    add("--width", type=positive_int, default=128, help="features per patch")
    add("--depth", type=positive_int, default=4, help="number of blocks")
    add("--held_out_share", type=below_one, default=0.1, help="share of the prompts used for validation only")
    add("--scorer", default=None, help="scorer of the validation images; see collect_noise_pairs.py")
    add("--num_validation_images", type=positive_int, default=64)
    add("--num_inference_steps", type=positive_int, default=30, help="steps of the validation images")
    add(
        "--guidance_scale",
        type=non_negative_float,
        default=None,
        help="guidance scale of the validation images; default: 5.5, or 1 for a model without guidance",
    )
    add_training_arguments(parser)
    args = parser.parse_args()
    if (args.train_data_dir is None) == (args.dataset_name is None):
        parser.error("give either --train_data_dir or --dataset_name")
    return args


def main() -> None:
    """Trains NPNet; the main process saves, prints and uploads the results."""
    args = parse_args()
    accelerator = make_accelerator(args)
    check_resume(accelerator, args, VALIDATION)
    repo_id = create_hub_repo(args) if accelerator.is_main_process else None
    folder = args.train_data_dir or snapshot_download(
        args.dataset_name, repo_type="dataset", cache_dir=args.cache_dir
    )
    pairs = NoisePairs.load(folder)
    training, held_out = split_by_prompt(pairs, args.held_out_share)
    set_train_steps(args, accelerator, len(training))
    pipe, stored = load_frozen(args, accelerator)
    made_by = ShardStore.recipe_of(folder)
    differ = differences(made_by["model"], stored)
    if differ:
        raise ValueError(
            f"{folder} holds pairs of another model ({show_differences(differ)}): give the model that they were"
            " collected with, or collect pairs with this one."
        )
    made_of = {"model": stored, "data": {"pairs": pairs.digest(), "call": made_by["call"]}}
    recipe = run_recipe(accelerator, args, made_of, VALIDATION)
    # The size of the images, and what acts on the encoding of the prompts.
    call = made_by["call"]
    npnet = build(
        args,
        training,
        prompt_embeddings(pipe, training.prompts[:1], **call),
        prompt_options(pipe, call),
    )

    def encode(found: dict[str, Any]) -> dict[str, Tensor]:
        prompts = prompt_embeddings(pipe, found.pop("prompts"), **call)
        batch = {**found, "prompt_embeds": prompts.embeds.float()}
        if prompts.pooled is not None:
            batch["pooled_prompt_embeds"] = prompts.pooled.float()
        return batch if prompts.mask is None else {**batch, "encoder_attention_mask": prompts.mask}

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        few = held_out.subset(torch.arange(min(args.num_validation_images, len(held_out))))
        scorer = load_scorer(args.scorer, accelerator.device) if args.scorer else None
        options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
        scores, images = compare(npnet, pipe, few, scorer, **options, **call)
        rows = [as_tensor(images[name])[:8] for name in ("plain", "npnet", "re-denoised")]
        save_grid(torch.cat(rows), len(rows[0]), Path(args.output_dir) / f"validation-{step}.png")
        return {"relative error": relative_error(npnet, pipe, held_out, **call), **scores}

    objective, read = NPNetObjective(npnet), PairRows(training)
    record = train(accelerator, args, objective, read, validate, recipe=recipe, encode=encode)
    if accelerator.is_main_process:
        record |= {
            "parameters": npnet.num_parameters(),
            "pairs": len(training),
            "held-out pairs": len(held_out),
        }
        name = Path(args.pretrained_model_name_or_path).name
        about = ABOUT.format(model=name, pairs=len(training), prompts=len(set(training.prompts)))
        publish(
            args,
            sys.argv,
            record,
            npnet.cpu().half().save_pretrained,
            about,
            ["golden-noise", "npnet"],
            repo_id,
            "text-to-image",
        )
        print(json.dumps(record, indent=1))


def build(
    args: argparse.Namespace, pairs: NoisePairs, prompts: PromptEmbeds, options: dict[str, Any]
) -> NPNetModel:
    """An untrained network for these pairs and for prompts that were encoded with these options."""
    tokens, width = prompts.embeds.shape[1:]
    return NPNetModel(
        latent_channels=pairs.noise.shape[1],
        text_dim=width,
        # Where prompts are padded to the longest of a batch, others may have more tokens.
        max_tokens=max(tokens, options.get("max_sequence_length") or 0),
        width=args.width,
        depth=args.depth,
        prompt_options=options,
        pooled_dim=None if prompts.pooled is None else prompts.pooled.shape[1],
    )


if __name__ == "__main__":
    main()
