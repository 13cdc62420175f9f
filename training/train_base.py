"""Trains the testbed: the grader, the autoencoder, the text-to-image model and the pixel model.

    accelerate launch training/train_base.py --model grader --train_data_dir DIR --output_dir runs/grader
    accelerate launch training/train_base.py --model vae    --train_data_dir DIR --output_dir runs/vae --use_ema
    accelerate launch training/train_base.py --model scenes --train_data_dir DIR --vae runs/vae/model ...
    accelerate launch training/train_base.py --model ddpm   --train_data_dir DIR --output_dir runs/ddpm --use_ema

DIR holds Fashion-MNIST's four idx files (Debian: dataset-fashion-mnist); without --train_data_dir the Hub's copy
is used. The finished model is in OUTPUT_DIR/model, ready for `DiffusionPipeline.from_pretrained`.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from diffusers_ext.data import base_models, fashion_scenes
from diffusers_ext.evaluation.grader import GarmentClassifier, augment, grade, to_tensor
from diffusers_ext.training_utils import Rows, add_training_arguments, make_accelerator, train


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=["grader", "vae", "scenes", "ddpm"])
    parser.add_argument("--train_data_dir", default=None, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--num_scenes", type=int, default=60_000)
    parser.add_argument("--block_out_channels", type=int, nargs=3, default=None)
    parser.add_argument("--vae", default=None, help="a trained autoencoder (for --model scenes)")
    parser.add_argument("--grader", default=None, help="a trained grader, to validate alignment with")
    parser.add_argument("--snr_gamma", type=float, default=None)
    parser.add_argument("--proportion_empty_prompts", type=float, default=0.1)
    parser.add_argument("--num_validation_images", type=int, default=256)
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the validation pictures")
    add_training_arguments(parser)
    args = parser.parse_args()
    if args.model == "scenes" and not args.vae:
        parser.error("--model scenes needs --vae, the folder of a trained autoencoder")
    return args


def main() -> None:
    args = parse_args()
    accelerator = make_accelerator(args)
    record = {"grader": train_grader, "vae": train_vae, "scenes": train_scenes, "ddpm": train_ddpm}[args.model](
        accelerator, args
    )
    if accelerator.is_main_process:
        model_dir = Path(args.output_dir) / "model"
        (model_dir / "training.json").write_text(json.dumps({**vars(args), **record}, indent=1))
        print(json.dumps(record, indent=1))
        if args.push_to_hub:
            from huggingface_hub import HfApi

            repo = HfApi().create_repo(args.hub_model_id or Path(args.output_dir).name, exist_ok=True)
            HfApi().upload_folder(repo_id=repo.repo_id, folder_path=model_dir)


def train_grader(accelerator, args):
    images, items = map(torch.from_numpy, fashion_scenes.load_garments(args.train_data_dir, "train"))
    test, test_items = map(torch.from_numpy, fashion_scenes.load_garments(args.train_data_dir, "test"))
    classifier = GarmentClassifier(tuple(args.block_out_channels or (32, 64, 64)))

    class Objective(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = classifier

        def forward(self, grey, target):
            return F.cross_entropy(self.classifier(grey), target, label_smoothing=0.05)

    def make_batch(rows: Rows):
        index = rows.indices(len(images))
        return {"grey": augment(images[index, None] / 255, rows.generator), "target": items[index]}

    def validate(model, step):
        logits = torch.cat([model.classifier(x[:, None] / 255) for x in test.to(accelerator.device).split(1000)])
        return {"test_accuracy": float((logits.argmax(1).cpu() == test_items).float().mean())}

    record = train(accelerator, args, Objective(), make_batch, validate)
    if accelerator.is_main_process:
        classifier.cpu().save_pretrained(Path(args.output_dir) / "model")
    return record


def train_vae(accelerator, args):
    vae = base_models.build_vae(args.block_out_channels or (24, 48, 64))
    pictures, _ = fashion_scenes.scene_arrays(args.train_data_dir, "train", args.num_scenes, args.seed)
    test, prompts = fashion_scenes.scene_arrays(args.train_data_dir, "test", args.num_validation_images, args.seed)
    grader = GarmentClassifier.from_pretrained(args.grader).eval() if args.grader else None
    objective = base_models.VaeObjective(vae)

    def make_batch(rows: Rows):
        index = rows.indices(len(pictures)).numpy()
        return {"pictures": to_tensor(pictures[index]) * 2 - 1, "noise": rows.normal(4, 8, 16)}

    def validate(model, step):
        real = to_tensor(test).to(accelerator.device)
        back = reconstruct(model.vae, real).cpu()
        save_grid([real.cpu()[:16], back[:16]], Path(args.output_dir) / f"validation-{step}.png")
        results = {"test_mse": float((back - real.cpu()).square().mean() * 4)}
        return results | (grade_means(grader, back, prompts) if grader else {})

    record = train(accelerator, args, objective, make_batch, validate)
    if accelerator.is_main_process:
        base_models.standardise_latents(vae.cpu(), to_tensor(pictures[:4096]) * 2 - 1)
        vae.save_pretrained(Path(args.output_dir) / "model")
    return record


@torch.no_grad()
def reconstruct(vae, pictures):
    """Pictures in [0, 1] through the autoencoder and back."""
    parts = [vae.decode(vae.encode(p * 2 - 1).latent_dist.mode()).sample for p in pictures.split(256)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def grade_means(grader, pictures, prompts):
    return {name: float(right.mean()) for name, right in grade(grader, pictures, prompts).items()}


@torch.no_grad()
def scene_latents(accelerator, args, vae):
    """Latents of the training scenes, encoded once and kept in the run's folder for a resumed run."""
    path = Path(args.output_dir) / "latents.safetensors"
    pictures, prompts = fashion_scenes.scene_arrays(args.train_data_dir, "train", args.num_scenes, args.seed)
    if accelerator.is_main_process and not path.is_file():
        vae = vae.to(accelerator.device)
        chunks = np.array_split(pictures, max(1, len(pictures) // 256))
        latents = [base_models.encode(vae, (to_tensor(c) * 2 - 1).to(accelerator.device)).cpu() for c in chunks]
        save_file({"latents": torch.cat(latents)}, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
    accelerator.wait_for_everyone()
    latents = load_file(path)["latents"]
    if len(latents) != len(pictures):
        raise ValueError(f"{path} holds {len(latents)} scenes, expected {len(pictures)}: delete it and start again.")
    return latents, prompts


def train_scenes(accelerator, args):
    tokenizer = base_models.build_tokenizer()
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    unet = base_models.build_unet(args.block_out_channels or (64, 96, 128))
    scheduler = base_models.stable_diffusion_scheduler()
    latents, prompts = scene_latents(accelerator, args, vae)
    input_ids = base_models.tokenize(tokenizer, prompts)
    empty = base_models.tokenize(tokenizer, [""])
    text_encoder = base_models.build_text_encoder(tokenizer)
    objective = base_models.NoiseObjective(unet, scheduler, text_encoder, args.snr_gamma)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)

    def make_batch(rows: Rows):
        index = rows.indices(len(latents))
        dropped = rows.uniform(1) < args.proportion_empty_prompts
        return {
            "x": latents[index],
            "noise": rows.normal(*latents.shape[1:]),
            "timesteps": rows.integers(scheduler.config.num_train_timesteps),
            "input_ids": torch.where(dropped, empty, input_ids[index]),
        }

    def validate(model, step):
        grader = GarmentClassifier.from_pretrained(args.grader).eval() if args.grader else None
        held_out = [fashion_scenes.caption(s) for s in fashion_scenes.draw_scenes("test", args.num_validation_images, 0)]
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
        generator = torch.Generator().manual_seed(0)
        chunks = [held_out[i : i + 64] for i in range(0, len(held_out), 64)]
        pictures = np.concatenate(
            [
                pipe(
                    c,
                    height=32,
                    width=64,
                    num_inference_steps=20,
                    guidance_scale=args.guidance_scale,
                    generator=generator,
                    output_type="np",
                ).images
                for c in chunks
            ]
        )
        pipe.scheduler = scheduler
        save_grid([to_tensor(pictures[i : i + 8]) for i in range(0, 48, 8)], Path(args.output_dir) / f"validation-{step}.png")
        return grade_means(grader, pictures, held_out) if grader else {}

    record = train(accelerator, args, objective, make_batch, validate)
    if accelerator.is_main_process:
        pipe.to("cpu").to(torch.float16).save_pretrained(Path(args.output_dir) / "model")
    return record | {"parameters": base_models.count_parameters(unet, text_encoder, vae)}


def train_ddpm(accelerator, args):
    images, _ = fashion_scenes.load_garments(args.train_data_dir, "train")
    images = torch.from_numpy(images)
    unet = base_models.build_pixel_unet(args.block_out_channels or (32, 64, 64))
    scheduler = DDPMScheduler(clip_sample=False)
    objective = base_models.NoiseObjective(unet, scheduler, snr_gamma=args.snr_gamma)

    def make_batch(rows: Rows):
        index = rows.indices(len(images))
        return {
            "x": images[index, None] / 127.5 - 1,
            "noise": rows.normal(1, 32, 32),
            "timesteps": rows.integers(scheduler.config.num_train_timesteps),
        }

    def validate(model, step):
        solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
        pipe = DDPMPipeline(unet, solver)  # type: ignore[arg-type]
        pipe.set_progress_bar_config(disable=True)
        pictures = pipe(
            batch_size=64, num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        save_grid([to_tensor(pictures[i : i + 16]) for i in range(0, 64, 16)], Path(args.output_dir) / f"validation-{step}.png")
        return {}

    record = train(accelerator, args, objective, make_batch, validate)
    if accelerator.is_main_process:
        DDPMPipeline(unet.cpu().half(), scheduler).save_pretrained(Path(args.output_dir) / "model")
    return record | {"parameters": base_models.count_parameters(unet)}


def save_grid(rows, path):
    """One PNG with the pictures (n, c, h, w) in [0, 1] of each row side by side."""
    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    array = (grid.movedim(0, 2).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(array.squeeze()).resize((array.shape[1] * 2, array.shape[0] * 2)).save(path)


if __name__ == "__main__":
    main()
