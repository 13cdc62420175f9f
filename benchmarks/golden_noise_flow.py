"""Golden noise against its controls on the flow-matching transformer, at the same prompts and seeds."""

from __future__ import annotations

from pathlib import Path

import torch

import diffusers_ext as dx
from diffusers_ext.core.prompts import prompt_embeddings

from .flow_runs import SHORT, flow_reads, included, model_folder
from .framework.bench import Bench
from .framework.cells import Cell
from .golden_noise import FLOW_PAIRS, images, load, write
from .golden_noise_page import Job, Settings, jobs_of

WRITES = ("golden_noise_flow.md", "golden_noise_flow.png", "golden_noise_flow_pictures.png")
CARD, ROUNDS = "npnet-fashion-flow", FLOW_PAIRS["num_rounds"]


def main(bench: Bench) -> None:
    """Makes the images that are missing, and writes the page."""
    settings = bench.pick(
        Settings(strengths=(0.5, 1.5, 2.0), others=(), rounds=ROUNDS, more_steps=(20,)),
        Settings(3, 2, (1.0, 2.0), (2,), (0.5,), (), ROUNDS, (4,)),
    )
    base = model_folder(bench)
    how = "training/collect_noise_pairs.py and training/train_npnet.py, as for npnet-fashion-scenes"
    npnet = random_npnet(bench.cache_dir / "random-npnet", base) if bench.quick else included(CARD, how)
    reads = flow_reads(base)

    def cells(job: Job) -> list[Cell]:
        # Plain and re-denoised noise don't depend on the network.
        models = (base,) if job.variant in ("plain", "re-denoised") else (base, npnet)
        return [Cell(images, (job, seed, settings.prompts, *models), reads) for seed in range(settings.seeds)]

    found = bench.samples({job: cells(job) for job in jobs_of(settings)})
    write(bench, "golden_noise_flow", "FlowMatchEuler", settings, found)


def random_npnet(folder: Path, base: Path) -> Path:
    """A small network with random weights for the model in a folder."""
    torch.manual_seed(0)
    prompts = prompt_embeddings(load(base), ["a red bag"], **SHORT)
    assert prompts.pooled is not None
    (tokens, width), pooled = prompts.embeds.shape[1:], prompts.pooled.shape[1]
    dx.NPNetModel(4, width, tokens, width=32, depth=1, pooled_dim=pooled).save_pretrained(folder)
    return folder
