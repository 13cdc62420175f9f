"""Trains the testbed's models: the two graders, the autoencoder, the two text-to-image models and the pixel model.

    accelerate launch training/train_base.py --model grader --train_data_dir DIR --output_dir runs/grader
    accelerate launch training/train_base.py --model judge --train_data_dir DIR --output_dir runs/judge --seed 1
    accelerate launch training/train_base.py --model vae --train_data_dir DIR --output_dir runs/vae --use_ema
    accelerate launch training/train_base.py --model scenes --train_data_dir DIR --vae runs/vae/model ...
    accelerate launch training/train_base.py --model flow --train_data_dir DIR --vae runs/vae/model ...
    accelerate launch training/train_base.py --model ddpm --train_data_dir DIR --output_dir runs/ddpm ...

DIR contains the four idx files of Fashion-MNIST (Debian: dataset-fashion-mnist). Without --train_data_dir,
the copy on the Hub is used. The trained model is saved in OUTPUT_DIR/model with its model card, ready for
`from_pretrained`. --resume_from_checkpoint latest resumes an interrupted run. On a CPU, start several
processes with `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`; `accelerate launch --cpu` starts only
one without MPI.
"""

import argparse
import json
import sys

from diffusers_ext.testbed import base_training
from diffusers_ext.training.arguments import (
    add_training_arguments,
    non_negative_float,
    positive_float,
    positive_int,
    share,
)
from diffusers_ext.training.cards import create_hub_repo, publish
from diffusers_ext.training.checkpoints import check_resume
from diffusers_ext.training.loop import make_accelerator

TRAINERS = {
    "grader": base_training.train_grader,
    "judge": base_training.train_judge,
    "vae": base_training.train_vae,
    "scenes": base_training.train_scenes,
    "flow": base_training.train_flow,
    "ddpm": base_training.train_ddpm,
}
# Title, description and tags of each model's card.
CARDS = {
    "grader": (
        "Garment grader",
        """\
A small classifier of Fashion-MNIST garments, which checks whether a scene shows the items of its prompt.

```python
from diffusers_ext.testbed.grader import GarmentClassifier

grader = GarmentClassifier.from_pretrained("FOLDER").eval()
```""",
        ["image-classification"],
    ),
    "judge": (
        "Garment judge",
        """\
A second classifier of Fashion-MNIST garments, with which the results of the first one are checked. It was trained on
the test images, which the base models and the first grader have not seen. No training, scorer or choice of settings
uses it.

```python
from diffusers_ext.testbed.judge import GarmentJudge

judge = GarmentJudge.from_pretrained("FOLDER").eval()
```""",
        ["image-classification"],
    ),
    "vae": (
        "Fashion Scenes autoencoder",
        """\
An `AutoencoderKL` with fourfold downsampling for 32 × 64 images of coloured Fashion-MNIST garments. Each of
its four latent channels has mean 0 and variance 1 on the training scenes.

```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("FOLDER")
```""",
        ["autoencoder"],
    ),
    "scenes": (
        "Fashion Scenes",
        """\
A small Stable Diffusion that generates 32 × 64 images of one or two coloured Fashion-MNIST garments from a
prompt. It is a testbed for methods and not meant for other uses.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER")
image = pipe("a red bag left of a blue boot", height=32, width=64, guidance_scale=2.0).images[0]
```""",
        ["text-to-image", "stable-diffusion"],
    ),
    "flow": (
        "Fashion Flow",
        """\
A small Stable Diffusion 3, a flow-matching transformer, that generates 32 × 64 images of one or two coloured
Fashion-MNIST garments from a prompt. It is a testbed for methods and not meant for other uses.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER")
image = pipe("a red bag left of a blue boot", height=32, width=64, guidance_scale=2.0).images[0]
```""",
        ["text-to-image", "stable-diffusion-3"],
    ),
    "ddpm": (
        "Fashion-MNIST DDPM",
        """\
An unconditional pixel-space model of 32 × 32 grey garments. It is a testbed for methods and not meant for
other uses.

```python
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

pipe = DiffusionPipeline.from_pretrained("FOLDER")
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
images = pipe(batch_size=16, num_inference_steps=20).images
```""",
        ["unconditional-image-generation"],
    ),
}


def parse_args() -> argparse.Namespace:
    """Parses the testbed's own arguments and those that all training scripts share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=list(TRAINERS))
    parser.add_argument("--train_data_dir", default=None, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--num_scenes", type=positive_int, default=60_000)
    parser.add_argument("--block_out_channels", type=positive_int, nargs=3, default=None)
    parser.add_argument(
        "--vae", default=None, help="folder of a trained autoencoder, for --model scenes and --model flow"
    )
    parser.add_argument(
        "--text_encoder",
        default=None,
        help="folder of the text encoder of a trained --model scenes to start from, for --model flow",
    )
    parser.add_argument(
        "--grader", default=None, help="folder of a trained grader, to validate prompt accuracy"
    )
    parser.add_argument("--snr_gamma", type=positive_float, default=None)
    parser.add_argument("--proportion_empty_prompts", type=share, default=0.1)
    parser.add_argument("--num_validation_images", type=positive_int, default=256)
    parser.add_argument(
        "--guidance_scale",
        type=non_negative_float,
        default=2.0,
        help="guidance scale of the validation images",
    )
    add_training_arguments(parser)
    args = parser.parse_args()
    if args.model in ("scenes", "flow") and not args.vae:
        parser.error(f"--model {args.model} needs --vae, the folder of a trained autoencoder")
    if args.text_encoder and args.model != "flow":
        parser.error("--text_encoder is for --model flow: leave it out")
    if args.model == "flow" and (args.block_out_channels or args.snr_gamma):
        parser.error(
            "--block_out_channels and --snr_gamma are not for --model flow, a transformer: leave them out"
        )
    if args.model == "judge" and args.block_out_channels:
        parser.error(
            "--block_out_channels is not for --model judge, whose layers have one width: leave it out"
        )
    return args


def main() -> None:
    """Trains the chosen model; the main process saves, prints and uploads the results."""
    args = parse_args()
    accelerator = make_accelerator(args)
    check_resume(accelerator, args, base_training.VALIDATION)
    repo_id = create_hub_repo(args) if accelerator.is_main_process else None
    record, save = TRAINERS[args.model](accelerator, args)
    if accelerator.is_main_process:
        title, about, tags = CARDS[args.model]
        task = None if args.model == "vae" else tags[0]  # the Hub has no task for an autoencoder
        publish(args, sys.argv, record, save, f"# {title}\n\n{about}", tags, repo_id, task)
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
