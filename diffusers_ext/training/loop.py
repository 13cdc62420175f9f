"""The training loop of all training scripts.

See `rows` for the data and the randomness of a step.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    is_compiled_module,
    set_seed,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checkpoints import resume, save_checkpoint, save_with_checkpoints
from .models import save_memory
from .optimizers import check_optimizer, dropped_in_step, frozen, layers_of, make_optimizer
from .recipes import Recipe, run_recipe
from .rows import Batch, Rows, batches
from .sharding import ShardedState, is_sharded, take_whole, to_shard
from .start import images_per_step, lock_folder, settle_with_launch

logger = logging.getLogger(__name__)


def make_accelerator(
    args: argparse.Namespace, idle_parameters: bool = False, trackers: bool = True
) -> Accelerator:
    """Creates the accelerator of a run, its folder and its trackers.

    What the arguments leave open and `accelerate launch` decides is written to `args`.

    Args:
        args: as from `add_training_arguments`.
        idle_parameters: whether the loss of some steps does not depend on all trained parameters, which then
            stay unchanged.
        trackers: whether to start those of `--report_to`.

    Raises:
        ValueError: the arguments contradict `accelerate launch`, the machine cannot do what they ask for, or another
            run writes to the folder.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps or 1,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to if trackers else None,
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir)),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=idle_parameters)],
    )
    settle_with_launch(args, accelerator)
    check_optimizer(args, accelerator)
    torch.backends.cuda.matmul.allow_tf32 |= args.allow_tf32
    set_seed(args.seed)
    if accelerator.is_main_process:
        lock_folder(args.output_dir)
    accelerator.wait_for_everyone()
    if args.report_to and trackers:
        accelerator.init_trackers("diffusers-ext", {k: v for k, v in vars(args).items() if _loggable(v)})
    return accelerator


def _loggable(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool))


def train(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: nn.Module,
    read: Callable[[Rows], dict[str, Any]],
    validate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    last: bool = True,
    recipe: Recipe | None = None,
    encode: Callable[[dict[str, Any]], Batch] | None = None,
) -> dict[str, Any]:
    """Trains `model`, whose forward turns a batch into a scalar loss, and leaves the EMA weights in it.

    It ends the accelerator's trackers and, unless another model is trained in this process, its process
    group.

    Args:
        accelerator: as from `make_accelerator`.
        args: as from `add_training_arguments`.
        model: `model(**batch)` returns the mean loss over the batch's rows. If it has a method `networks`,
            gradients are clipped separately for each module that the method returns, and the EMA is that of the first one.
            Then it may have a method `rate_factors`, see `make_optimizer`, and a method `moves(step)`: whether the step
            trains the first one, so that the EMA counts it.
        read: what a batch of the given rows is made of: tensors on the CPU, and lists of texts. It draws from nothing
            but the rows. For --dataloader_num_workers it must be picklable.
        validate: called with the model (EMA weights in place) and the step; returns values to log.
        last: end the process group. If False, the next model needs a new accelerator, and the caller ends the
            group with `accelerator.end_training()`.
        recipe: what the weights depend on; default: the arguments alone.
        encode: makes the batch, in this process, from what `read` returned, with its tensors on the device; default:
            that is the batch.

    Returns:
        The record for the model card: steps, images, seconds, hardware, the last loss, the last validation,
            and `resumptions` with other arguments, if there were any.

    Raises:
        ValueError: the loss is not finite (checked every 50 steps and before each checkpoint);
            `--resume_from_checkpoint` does not match the run's folder or its recipe; or `--optimizer` cannot train the
            model.
    """
    save_memory(args, model)
    trained = to_shard(accelerator, model)
    rate = args.learning_rate * (images_per_step(args, accelerator) if args.scale_lr else 1)
    optimizer: Any = make_optimizer(args, trained, rate)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    clock = _Clock()
    wrapped, optimizer = accelerator.prepare(trained, optimizer)
    parts: Any = getattr(trained, "networks", None)
    networks = [trained] if parts is None else parts()
    # Not before `prepare`, which replaces parameters by their shards.
    groups = [_trainable(network) for network in networks]
    layers = [layers_of(network) for network in networks] if args.optimizer == "drop_muon" else []
    averaged, moves = groups[0], getattr(trained, "moves", None)
    ema = EMAModel(averaged, decay=args.ema_decay, use_ema_warmup=True, power=0.75) if args.use_ema else None
    averages: Any = ema
    if is_sharded(accelerator):
        averages = ShardedState(accelerator, trained, optimizer, ema)
    else:
        save_with_checkpoints(accelerator, model)
    for state in (lr_scheduler, clock, averages):
        if state is not None:
            accelerator.register_for_checkpointing(state)
    recipe = recipe or run_recipe(accelerator, args)
    checkpoint, changes = resume(accelerator, args, recipe)
    if ema is not None:
        ema.to(accelerator.device)

    num_steps = args.max_train_steps
    saved = clock.step if checkpoint is not None else None
    limit = args.checkpoints_total_limit
    images = images_per_step(args, accelerator)
    results: dict[str, float] = {}
    bar = tqdm(
        total=num_steps, initial=clock.step, disable=not accelerator.is_local_main_process, mininterval=5
    )
    upcoming = batches(accelerator, args, read, encode, clock.step)
    clock.start()
    wrapped.train()
    # DistributedDataParallel asks once which parameters have gradients, and a compiled network would be compiled again.
    stops_early = accelerator.num_processes == 1 and not is_compiled_module(wrapped)
    while clock.step < num_steps:
        dropped = dropped_in_step(layers, args.seed, clock.step)
        with frozen(dropped if stops_early else []):
            loss = _optimization_step(accelerator, args, wrapped, optimizer, groups, upcoming, dropped)
        lr_scheduler.step()
        if ema is not None and (moves is None or moves(clock.step)):
            ema.step(averaged)
        clock.tick(images)
        bar.update()
        save_now = clock.step % args.checkpointing_steps == 0 or clock.step == num_steps
        if clock.step % 50 == 0 or save_now:
            clock.loss = _checked_loss(accelerator, loss, clock.step)
            bar.set_postfix(loss=f"{clock.loss:.4f}")
            accelerator.log({"loss": clock.loss, "lr": lr_scheduler.get_last_lr()[0]}, step=clock.step)
        if save_now and clock.step < num_steps:
            save_checkpoint(accelerator, args.output_dir, clock.step, limit, recipe, changes)
        if validate and args.validation_steps and clock.step % args.validation_steps == 0:
            take_whole(model, trained, ema)
            results = _validate(
                accelerator, model, ema if model is trained else None, averaged, validate, clock.step
            )
            wrapped.train()
    bar.close()
    if clock.step != saved:
        save_checkpoint(accelerator, args.output_dir, clock.step, limit, recipe, changes)
    if ema is not None:
        ema.copy_to(averaged)
    take_whole(model, trained)
    model.to(accelerator.device).eval()
    if validate:
        results = _validate(accelerator, model, None, averaged, validate, clock.step)
    if last:
        accelerator.end_training()
    else:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.free_memory()
    return {
        "steps": clock.step,
        "images": clock.images,
        "seconds": round(clock.seconds),
        "hardware": describe_hardware(accelerator),
        "loss": clock.loss,
        **results,
        **({"resumptions": changes} if changes else {}),
    }


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _optimization_step(
    accelerator: Accelerator,
    args: argparse.Namespace,
    wrapped: nn.Module,
    optimizer: Any,
    groups: list[list[nn.Parameter]],
    upcoming: Iterator[Batch],
    dropped: list[nn.Parameter],
) -> Tensor:
    """One optimizer step over all accumulation steps, not of `dropped`; returns this process's mean loss."""
    losses = []
    for _ in range(args.gradient_accumulation_steps):
        batch = next(upcoming)
        with accelerator.accumulate(wrapped):
            with accelerator.autocast():  # FSDP2 does not wrap the model in it
                loss = wrapped(**batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                for parameter in dropped:
                    parameter.grad = None
                # Not `accelerator.clip_grad_norm_`, which unscales the gradients in every call.
                accelerator.unscale_gradients()
                for parameters in groups:
                    nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses).mean()


def _checked_loss(accelerator: Accelerator, loss: Tensor, step: int) -> float:
    mean: Any = accelerator.reduce(loss, "mean")
    if not torch.isfinite(mean):
        raise ValueError(
            f"The loss is {float(mean)} at step {step}: lower --learning_rate, or check the data."
        )
    return float(mean)


def _validate(
    accelerator: Accelerator,
    model: nn.Module,
    ema: EMAModel | None,
    trainable: list[nn.Parameter],
    validate: Callable[[nn.Module, int], dict[str, float]],
    step: int,
) -> dict[str, float]:
    results: dict[str, float] = {}
    if accelerator.is_main_process:
        if ema is not None:
            ema.store(trainable)
            ema.copy_to(trainable)
        model.eval()
        with torch.no_grad():
            results = validate(model, step)
        if ema is not None:
            ema.restore(trainable)
        accelerator.log(results, step=step)
        logger.info("step %d: %s", step, json.dumps(results))
    accelerator.wait_for_everyone()
    return results


class _Clock:
    """Steps, images and seconds over all parts of a resumed run, and the last recorded loss."""

    def __init__(self) -> None:
        self.step, self.images, self.seconds, self.loss = 0, 0, 0.0, float("nan")

    def start(self) -> None:
        self._last = time.monotonic()

    def tick(self, images: int) -> None:
        now = time.monotonic()
        self.step, self.images = self.step + 1, self.images + images
        self.seconds, self._last = self.seconds + now - self._last, now

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "images": self.images, "seconds": self.seconds, "loss": self.loss}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.images = int(state["step"]), int(state["images"])
        self.seconds, self.loss = float(state["seconds"]), float(state["loss"])


def describe_hardware(accelerator: Accelerator) -> str:
    """A description of the devices of a run, for its model card."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} × {torch.cuda.get_device_name()}"
    return f"{accelerator.num_processes} process(es), {torch.get_num_threads()} CPU threads each"
