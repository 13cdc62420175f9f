"""Training that saves memory or time, or divides the model among processes, comes to the same weights."""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from safetensors.torch import load_file

from diffusers_ext.asdm.incubation import check_xformers
from diffusers_ext.asdm.plan import PruningPlan
from diffusers_ext.training import loop, models, sharding
from diffusers_ext.training.loop import make_accelerator, train
from diffusers_ext.training.sharding import settle_sharding
from tests.asdm.networks import SMALL, network
from tests.training.launching import TWO_PROCESSES, kill_after, launch
from tests.training.scripts import ON_FLOWS, TRAINED, arguments, checkpoints_of, path_of, run, steps
from tests.training.test_loop import TwoLines
from tests.training.test_loop import arguments as loop_arguments

# One worker runs them all: they share the models and the pairs.
pytestmark = [pytest.mark.slow]


class Stop(BaseException):
    """Ends a run as a killed process does."""


def four_steps(script: str, base: Path, output: Path, *extra: str) -> list[str]:
    few = ["--use_ema", "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest", *extra]
    return [*arguments(script, base, output), *steps(script, 4), *few]


def last_checkpoint(script: str, output: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints_of(script, output)[-1] / "trained.safetensors")


@pytest.fixture(scope="module")
def plain(base: Path) -> Any:
    """The weights of each script after four steps without any of this."""
    found: dict[str, dict[str, torch.Tensor]] = {}

    def weights(script: str, *options: str) -> dict[str, torch.Tensor]:
        name = f"{script} {len(options)}"
        if name not in found:
            run(script, four_steps(script, base, base / name, *options))
            found[name] = last_checkpoint(script, base / name)
        return found[name]

    return weights


@pytest.mark.parametrize("how", ["gradient checkpointing", "torch.compile"])
@pytest.mark.parametrize("script", [*TRAINED, *ON_FLOWS])
def test_a_run_is_stopped_with_it_and_resumed_without(
    script: str, how: str, base: Path, plain: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    used = []
    options = EXTRA.get(script.split()[0], []) if how == "torch.compile" else []
    expected = plain(script, *options)

    def stop(self: Any, images: int, tick: Any = loop._Clock.tick) -> None:
        tick(self, images)
        if self.step == 3:
            raise Stop

    with monkeypatch.context() as patch:
        extra = []
        if how == "torch.compile":
            patch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
            compiled = torch.compile
            patch.setattr(
                torch, "compile", lambda *args, **options: used.append(1) or compiled(*args, **options)
            )
        else:
            extra = ["--gradient_checkpointing"]
            checkpoint = models.checkpoint
            patch.setattr(
                models, "checkpoint", lambda *args, **options: used.append(1) or checkpoint(*args, **options)
            )
        patch.setattr(loop._Clock, "tick", stop)
        with pytest.raises(Stop):
            run(script, four_steps(script, base, tmp_path, *options, *extra))
    assert used
    run(script, four_steps(script, base, tmp_path, *options))
    found = last_checkpoint(script, tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


# --- FSDP2: two processes on the CPU ---


def fsdp(monkeypatch: Any, **settings: str) -> None:
    """What `accelerate launch --use_fsdp --fsdp_version 2` puts into the environment."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    for name, value in {**asked, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", **settings}.items():
        monkeypatch.setenv(name, value)


# Those that differentiate through a network with constant weights, or twice, are refused.
EXTRA = {"train_smooth_lora": ["--estimator", "finite_difference"]}
SHARDED = [name for name in (*TRAINED, *ON_FLOWS) if name != "train_sign"]


@pytest.mark.parametrize("script", SHARDED)
def test_shards_are_trained_as_a_whole_model_is(
    script: str, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    # With Adam's own ε, a weight whose gradient is only rounding moves by the learning rate all the same.
    extra = [*EXTRA.get(script.split()[0], []), "--adam_epsilon", "1e-3", "--validation_steps", "2"]
    one, two = ([*arguments(script, base, tmp_path / name), *steps(script, 3), "--use_ema"] for name in "12")
    for argv, rows in ((one, "4"), (two, "2")):
        argv += [*extra, "--train_batch_size", rows]
    run(script, one)
    fsdp(monkeypatch)
    file = path_of(script)
    # Killed at a random moment after the first checkpoint, and resumed.
    more = ["--checkpointing_steps", "1", "--resume_from_checkpoint", "latest"]
    kill_after([file, *two, *more], lambda: checkpoints_of(script, tmp_path / "2"), 0.3, TWO_PROCESSES)
    launch([file, *two, *more], TWO_PROCESSES)
    for kind in ("model", "optimizer", "ema"):
        whole, shards = (state(script, tmp_path / name, kind) for name in "12")
        assert whole.keys() == shards.keys()
        change = max(float(value.abs().max()) for value in whole.values())
        worst = max(float((value - shards[name]).abs().max()) for name, value in whole.items())
        # float32 rounding, which finite differences divide by their step of 0.01.
        assert worst < 2e-5 * max(change, 1)
    ours, theirs = (json.loads((tmp_path / name / "model" / "training.json").read_text()) for name in "12")
    differ = {name for name in ours if isinstance(ours[name], float) and name not in ("seconds",)}
    assert all(theirs[name] == pytest.approx(ours[name], rel=1e-3) for name in differ)


def state(script: str, output: Path, kind: str) -> dict[str, torch.Tensor]:
    """What a checkpoint has of the trained weights, of the optimizer or of the averages."""
    folder = checkpoints_of(script, output)[-1]
    sharded = not (folder / "trained.safetensors").exists()
    custom = torch.load(folder / "custom_checkpoint_2.pkl", weights_only=True)
    if kind == "model":
        return custom["model"] if sharded else load_file(folder / "trained.safetensors")
    if kind == "ema":
        shadow = (custom["ema"] if sharded else custom)["shadow_params"]
        return {str(number): value for number, value in enumerate(shadow)}
    found = custom["optimizer"] if sharded else torch.load(folder / "optimizer.bin", weights_only=True)
    return {f"{index} {name}": v for index, part in found["state"].items() for name, v in part.items()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"FSDP_VERSION": "1", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
            "asks for fsdp_version 1: pass --fsdp_version 2",
        ),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, r"parameters on the CPU \(fsdp_offload_params\): omit it"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use the script's --gradient_checkpointing"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DEEPSPEED, .* launch with --use_fsdp"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for MEGATRON_LM, .* launch with --use_fsdp"),
        ({"precision": "fp16"}, "mixed precision fp16 with FSDP: use bf16"),
        ({"backend": "eager"}, r"FSDP with torch\.compile: omit one of them"),
        ({"optimizer": "muon"}, "--optimizer muon needs whole matrices: use --optimizer adamw"),
        ({"optimizer": "8-bit"}, "--use_8bit_adam was not tested: omit one of them"),
    ],
)
def test_other_ways_of_sharding_are_refused(settings: dict[str, str], message: str, monkeypatch: Any) -> None:
    fsdp(monkeypatch, **{name: value for name, value in settings.items() if name.isupper()})
    backend = DynamoBackend(settings.get("backend", "no").upper())
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.MULTI_CPU,
        mixed_precision=settings.get("precision", "no"),
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend)),
    )
    optimizer = settings.get("optimizer", "adamw")
    given = argparse.Namespace(optimizer=optimizer, use_8bit_adam=optimizer == "8-bit")
    with pytest.raises(ValueError, match=message):
        settle_sharding(given, accelerator)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("train_sign", "with constant weights: launch with --multi_gpu"),
        ("train_smooth_lora", "differentiates twice, .*: pass --estimator finite_difference"),
    ],
)
def test_methods_that_cannot_be_sharded_are_refused_by_name(
    script: str, message: str, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sharding, "is_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match=message):
        run(script, arguments(script, base, tmp_path))


def test_second_derivatives_of_compiled_networks_are_refused(
    base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match=r"torch\.compile, .*: pass --estimator finite_difference"):
        run("train_smooth_lora", [*arguments("train_smooth_lora", base, tmp_path), "--estimator", "vjp"])


# --- xFormers ---

OPTION = "--enable_xformers_memory_efficient_attention"


@pytest.mark.parametrize("script", TRAINED)
def test_xformers_is_refused_without_it_and_without_a_gpu(
    script: str, tmp_path: Path, monkeypatch: Any
) -> None:
    argv = [*arguments(script, tmp_path / "nothing is loaded", tmp_path), OPTION]
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "diffusers-ext\[xformers\]"'):
        run(script, argv)
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    with pytest.raises(ValueError, match="needs a GPU: omit it"):
        run(script, argv)


def test_gri_attention_is_not_replaced() -> None:
    unet = network(SMALL)
    with pytest.raises(ValueError, match="would replace the plan's GRI attention"):
        check_xformers(PruningPlan(dict(unet.config), (("gri.0",),)))


@pytest.mark.gpu
@pytest.mark.parametrize("script", TRAINED)
def test_xformers_trains_what_pytorch_trains(
    script: str, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    pytest.importorskip("xformers")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    argv = [*EXTRA.get(script, []), "--adam_epsilon", "1e-3"]
    if script == "train_npnet":
        with pytest.raises(ValueError, match="NPNetModel has no attention that xFormers can replace"):
            run(script, four_steps(script, base, tmp_path / "with", *argv, OPTION))
        return
    run(script, four_steps(script, base, tmp_path / "without", *argv))
    run(script, four_steps(script, base, tmp_path / "with", *argv, OPTION))
    one, other = (last_checkpoint(script, tmp_path / name) for name in ("without", "with"))
    # Another order of sums in float32.
    assert all(torch.allclose(value, other[name], atol=1e-4) for name, value in one.items())


# --- loss scaling ---


def test_gradients_are_unscaled_once_and_clipped_by_network(tmp_path: Path, monkeypatch: Any) -> None:
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: norms.append(float(clip(*a, **k))))
    found = []
    for scale in (None, 1024.0):
        norms.clear()
        args = loop_arguments(tmp_path / str(scale), "--max_train_steps", "2")
        accelerator = make_accelerator(args)
        if scale:  # what Accelerate makes for fp16 on a GPU
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            accelerator.native_amp = True
            monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
            monkeypatch.setattr(accelerator, "autocast", nullcontext)
        model = TwoLines(apart=True)
        train(accelerator, args, model, lambda rows: {"x": rows.normal(3)})
        found.append(([*norms], [p.detach().clone() for p in model.parameters()]))
    assert len(found[0][0]) == 2 * 2
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert all(
        torch.equal(a, b) for a, b in zip(found[0][1], found[1][1])
    )  # powers of two scale without rounding
