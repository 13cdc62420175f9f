"""What every plug-in promises, on every kind of tiny pipeline it applies to.

A method joins by adding a `Method` to `METHODS`: how to put it on, how to take it off, and where it applies.
"""

import copy
import itertools
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.asdm.unet import unet_config
from diffusers_ext.sign.teacher import untrained_projector
from tests import tiny
from tests.teleport.test_prompt_map import mapped


@dataclass(frozen=True)
class Method:
    """One row of the contract.

    Attributes:
        title: of the column; rows of one title share it.
        apply: puts the method on a pipeline, given its `tiny` name.
        remove: takes it off again.
        rearm: what a user calls after loading a saved pipeline; nothing for most methods.
        twice: what a second `apply` does: the start of the error message, or "" where it changes nothing.
        pipelines: the `tiny` names it applies to.
        saves: whether `pipe.save_pretrained` keeps the method.
        on_denoiser: whether it is put on the denoiser itself, so that pipelines that share one share the method.
    """

    title: str
    apply: Callable[[Any, str], Any]
    remove: Callable[[Any], Any]
    rearm: Callable[[Any], Any] = lambda pipe: pipe
    twice: str = ""
    pipelines: tuple[str, ...] = tiny.NAMES
    saves: bool = True
    on_denoiser: bool = False


def _teleport(mean_from: str) -> Callable[[Any, str], Any]:
    def apply(pipe: Any, name: str) -> Any:
        stats = tiny.gaussian(tiny.LATENT_SHAPES[name], rank=6)
        return dx.apply_teleport(pipe, stats, skip=0.4, mean_from=mean_from)

    return apply


def _golden_noise(pipe: Any, name: str) -> Any:
    return dx.apply_golden_noise(pipe, tiny.npnet(name))


def _smooth_lora(pipe: Any, name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        save_file(tiny.lora(name), f"{folder}/lora.safetensors")
        return dx.apply_smooth_lora(pipe, folder)


def _gri_attention(pipe: Any, name: str) -> Any:
    # Flux has 4 × 4 tokens here, of which a window has to leave some.
    return dx.apply_gri_attention(pipe, window=2 if name == "flux" else 4, pool=2)


METHODS = {
    "teleport": Method(
        "Teleportation",
        _teleport("stats"),
        dx.remove_teleport,
        rearm=dx.apply_teleport,
        twice="Teleportation is on",
    ),
    "teleport-first-call": Method(
        "Teleportation",
        _teleport("first_call"),
        dx.remove_teleport,
        rearm=dx.apply_teleport,
        twice="Teleportation is on",
    ),
    # Saved with the pipeline by the classes in pipelines/golden_noise_*, which have tests of their own.
    "golden-noise": Method(
        "Golden noise",
        _golden_noise,
        dx.remove_golden_noise,
        twice="Golden noise is on",
        pipelines=("sd", "sdxl", "sd3", "flux"),
        saves=False,
    ),
    # As any LoRA in diffusers; saving is refused, which its own tests show.
    "smooth-lora": Method(
        "Smooth-LoRA",
        _smooth_lora,
        dx.remove_smooth_lora,
        twice="An adapter called 'smooth' is on",
        pipelines=("sd", "sdxl", "sd3", "flux"),
        saves=False,
        on_denoiser=True,
    ),
    # Of networks that are pruned it is saved with them, which their own tests show.
    "gri-attention": Method(
        "GRI attention",
        _gri_attention,
        dx.remove_gri_attention,
        twice="GRI attention is on",
        pipelines=("sd", "sdxl", "sd3", "flux"),
        saves=False,
        on_denoiser=True,
    ),
}


@dataclass(frozen=True)
class Product:
    """A method that makes another pipeline of one instead of changing it.

    Attributes:
        title: its name in the tests.
        make: the new pipeline, untrained; ValueError where it cannot be made.
        pipelines: the `tiny` names of which it can be made.
    """

    title: str
    make: Callable[[Any], Any]
    pipelines: tuple[str, ...]


def _pruned(pipe: Any) -> Any:
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    unet = dx.prune_network(denoiser, dx.PruningPlan(unet_config(denoiser), (("mid.attention",),)))
    return type(pipe)(**{**pipe.components, "unet": unet})


PRODUCTS = {
    "sign": Product("SIGN", untrained_projector, ("sd", "sdxl", "ddpm", "sd3")),
    "pruning": Product("A-SDM pruning", _pruned, ("sd", "sdxl")),
}

CASES = [pytest.param(METHODS[m], name, id=f"{m}-{name}") for m in METHODS for name in METHODS[m].pipelines]
GUIDED = [case for case in CASES if case.values[1] != "ddpm"]
each = pytest.mark.parametrize(("method", "name"), CASES)


def on(method: Method, name: str, **options: Any) -> Any:
    return method.apply(tiny.build(name, **options), name)


def traces(pipe: Any) -> dict[str, Any]:
    """What a plug-in could leave behind: attributes, hooks and class of every component."""
    found: dict[str, Any] = {"classes": {key: type(value) for key, value in pipe.components.items()}}
    for key, value in pipe.components.items():
        if isinstance(value, torch.nn.Module):
            found[key] = [
                (path, sorted(vars(part)), len(part._forward_hooks), len(part._forward_pre_hooks))
                for path, part in value.named_modules()
            ]
    return {**found, "config": {key: pipe.config[key] for key in pipe.components}}


@each
def test_apply_changes_the_pictures_and_remove_restores_them(method: Method, name: str) -> None:
    pipe = tiny.build(name)
    plain, before, scheduler = tiny.images(pipe, name, 2), traces(pipe), pipe.scheduler
    method.apply(pipe, name)
    changed = tiny.images(pipe, name, 2)
    assert not torch.equal(changed, plain)
    assert torch.isfinite(changed).all()
    assert torch.equal(tiny.images(pipe, name, 2), changed)
    assert str(dx.summary(pipe)).count("\n") == 1
    assert "nothing added" not in str(dx.summary(pipe))
    method.remove(pipe)
    assert torch.equal(tiny.images(pipe, name, 2), plain)
    assert traces(pipe) == before
    assert pipe.scheduler is scheduler
    assert "nothing added" in str(dx.summary(pipe))
    method.remove(pipe)
    assert torch.equal(tiny.images(method.apply(pipe, name), name, 2), changed)


@each
def test_applying_twice(method: Method, name: str) -> None:
    pipe = on(method, name)
    once = tiny.images(pipe, name)
    if method.twice:
        with pytest.raises(ValueError, match=method.twice):
            method.apply(pipe, name)
    else:
        method.apply(pipe, name)
    assert torch.equal(tiny.images(pipe, name), once)


@each
def test_save_and_load(method: Method, name: str, tmp_path: Any) -> None:
    if not method.saves:
        pytest.skip("kept apart from the pipeline")
    pipe = on(method, name)
    expected = tiny.images(pipe, name, 2)
    pipe.save_pretrained(tmp_path)
    absent = {key: None for key, value in pipe.components.items() if value is None}
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert torch.equal(tiny.images(method.rearm(loaded), name, 2), expected)


@each
def test_pipelines_do_not_leak_into_each_other(method: Method, name: str) -> None:
    plain, other = tiny.build(name), tiny.build(name, seed=1)
    shared = type(plain)(**{**plain.components, "scheduler": type(plain.scheduler)(**plain.scheduler.config)})
    shared.set_progress_bar_config(disable=True)
    alone = [tiny.images(pipe, name) for pipe in (plain, other)]
    method.apply(plain, name)
    changed = tiny.images(plain, name)
    assert torch.equal(tiny.images(other, name), alone[1])
    if not method.on_denoiser:
        assert torch.equal(tiny.images(shared, name), alone[0])  # the same denoiser object
    assert torch.equal(tiny.images(plain, name), changed)
    method.apply(other, name)
    both = tiny.images(other, name)
    assert torch.equal(tiny.images(plain, name), changed)
    method.remove(plain)
    assert torch.equal(tiny.images(other, name), both)
    assert torch.equal(tiny.images(plain, name), alone[0])


@each
def test_an_interrupted_call_leaves_no_state(method: Method, name: str, monkeypatch: Any) -> None:
    pipe = on(method, name)
    plain = tiny.build(name)
    sharing = type(plain)(**{**pipe.components, "scheduler": type(plain.scheduler)(**plain.scheduler.config)})
    sharing.set_progress_bar_config(disable=True)
    beside = sharing if method.on_denoiser else plain
    expected = tiny.images(pipe, name), tiny.images(beside, name)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            tiny.images(pipe, name)
    assert torch.equal(tiny.images(sharing, name), expected[1])
    assert torch.equal(tiny.images(pipe, name), expected[0])


@each
def test_a_batch_is_its_images_one_by_one(method: Method, name: str) -> None:
    pipe = on(method, name)
    batch = tiny.images(pipe, name, 3)
    call = tiny.inputs(name, 3)
    for i in range(3):
        # Rows of the per-image inputs: prompts are a list, embeddings a tensor.
        one = {
            key: value[i : i + 1] if isinstance(value, list | Tensor) and len(value) == 3 else value
            for key, value in call.items()
        }
        one |= {"batch_size": 1} if "batch_size" in one else {}
        with torch.no_grad():
            image = pipe(**one, generator=tiny.generators(3)[i : i + 1]).images
        assert torch.allclose(image[0], batch[i], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each
def test_half_precision(method: Method, name: str, dtype: torch.dtype) -> None:
    exact = tiny.images(on(method, name), name, 2)
    half = tiny.images(on(method, name, dtype=dtype), name, 2)
    assert torch.isfinite(half).all()
    assert float((half - exact).abs().mean()) < (0.02 if dtype == torch.float16 else 0.15)


@pytest.mark.parametrize(("method", "name"), GUIDED)
def test_guidance_on_and_off(method: Method, name: str) -> None:
    pipe = on(method, name)
    guided, free = (tiny.images(pipe, name, 2, guided=guided) for guided in (True, False))
    assert torch.isfinite(guided).all()
    assert torch.isfinite(free).all()
    assert not torch.equal(guided, free)


# Several adapters on one denoiser are peft's business: tests/smooth_lora/test_adapter.py.
BESIDE_A_LORA = [k for k, m in METHODS.items() if "sd" in m.pipelines and not m.on_denoiser]


@pytest.mark.parametrize("method", [pytest.param(METHODS[k], id=k) for k in BESIDE_A_LORA])
def test_with_a_lora(method: Method) -> None:
    pipe = on(method, "sd")
    without = tiny.images(pipe, "sd")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name="random")
    adapted = tiny.images(pipe, "sd")
    assert not torch.equal(adapted, without)
    method.remove(pipe)
    method.apply(pipe, "sd")
    assert torch.equal(tiny.images(pipe, "sd"), adapted)
    pipe.unet.delete_adapters("random")
    assert torch.equal(tiny.images(pipe, "sd"), without)


@pytest.mark.parametrize("method", [pytest.param(m, id=k) for k, m in METHODS.items() if "sd" in m.pipelines])
def test_with_a_controlnet(method: Method) -> None:
    base = tiny.build("sd")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        controlnet = diffusers.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8,))
        for part in controlnet.parameters():
            torch.nn.init.normal_(part, std=0.2)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **base.components, controlnet=controlnet.eval(), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    plain = tiny.images(pipe, "sd", image=image)
    method.apply(pipe, "sd")
    controlled = tiny.images(pipe, "sd", image=image)
    assert torch.isfinite(controlled).all()
    weaker = tiny.images(pipe, "sd", image=image, controlnet_conditioning_scale=0.1)
    assert not torch.equal(controlled, weaker)
    method.remove(pipe)
    assert torch.equal(tiny.images(pipe, "sd", image=image), plain)


# --- copies ---

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)),
}
each_copy = pytest.mark.parametrize(
    "copied", [pytest.param(function, id=k) for k, function in COPIES.items()]
)


def check_copies(
    name: str, apply: Callable[[Any], Any], remove: Callable[[Any], Any], copied: Callable[[Any], Any]
) -> None:
    """A copy has the methods of the original, and neither has to do with the other afterwards."""
    pipe = tiny.build(name)
    plain, before, attributes = tiny.images(pipe, name), traces(pipe), vars(pipe).keys()
    # Some text encoders cannot be pickled once they have run, so the pipeline to copy has not.
    pipe = apply(tiny.build(name))
    first, second = copied(pipe), copied(pipe)
    expected = tiny.images(pipe, name)
    for twin in (first, second):
        assert torch.equal(tiny.images(twin, name), expected)
        assert str(dx.summary(twin)) == str(dx.summary(pipe))
    for one, others in ((first, (pipe, second)), (pipe, (second,))):
        remove(one)
        assert torch.equal(tiny.images(one, name), plain)
        assert traces(one) == before
        assert vars(one).keys() == attributes
        assert "nothing added" in str(dx.summary(one))
        for other in others:
            assert torch.equal(tiny.images(other, name), expected)
    for part in second.components.values():
        if isinstance(part, torch.nn.Module) and not isinstance(part, diffusers.AutoencoderKL):
            changed = tiny.images(second, name)
            with torch.no_grad():
                for weight in part.parameters():
                    weight.mul_(1.1)
            assert not torch.equal(tiny.images(second, name), changed)
    assert torch.equal(tiny.images(pipe, name), plain)
    assert torch.equal(tiny.images(apply(first), name), expected)


# The quick run has all methods at once below.
@pytest.mark.slow
@each_copy
@each
def test_a_copy_is_an_independent_pipeline(method: Method, name: str, copied: Callable[[Any], Any]) -> None:
    check_copies(name, lambda pipe: method.apply(pipe, name), method.remove, copied)


@each_copy
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_a_copy_with_all_methods(name: str, copied: Callable[[Any], Any]) -> None:
    methods = [METHODS[k] for k in ("teleport", "golden-noise", "smooth-lora", "gri-attention")]
    methods = [method for method in methods if name in method.pipelines]
    stats = None if name == "flux" else mapped(tiny.build(name), guided=name == "sd")

    def apply(pipe: Any) -> Any:
        for method in methods[1:]:
            method.apply(pipe, name)
        # A prompt map adds a hook on encode_prompt; Flux has no text encoder here.
        return methods[0].apply(pipe, name) if stats is None else dx.apply_teleport(pipe, stats, skip=0.4)

    def remove(pipe: Any) -> None:
        for method in methods:
            method.remove(pipe)

    check_copies(name, apply, remove, copied)


def test_a_copied_denoiser_serves_the_same_pipeline() -> None:
    pipe = METHODS["teleport"].apply(tiny.build("sd3"), "sd3")
    expected = tiny.images(pipe, "sd3")
    pipe.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(tiny.images(pipe, "sd3"), expected)


@each_copy
def test_a_copy_guards_and_saves_its_own_weights(copied: Callable[[Any], Any], tmp_path: Any) -> None:
    method = METHODS["smooth-lora"]
    pipe = tiny.build("sd")
    pipe.unet.conv_in.requires_grad_(False)
    trainable = {key: weight.requires_grad for key, weight in pipe.unet.named_parameters()}
    method.apply(pipe, "sd")
    twin = copied(pipe)
    method.remove(pipe)
    with pytest.raises(ValueError, match="smooth"):
        twin.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    method.remove(twin)
    assert {key: weight.requires_grad for key, weight in twin.unet.named_parameters()} == trainable
    with torch.no_grad():
        twin.unet.conv_in.bias += 1
    twin = copied(twin)
    method.apply(twin, "sd")
    method.remove(twin)
    twin.save_pretrained(tmp_path / "saved")
    saved = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "saved", subfolder="unet")
    assert torch.equal(saved.conv_in.bias, pipe.unet.conv_in.bias + 1)


@each_copy
@pytest.mark.parametrize(("product", "name"), [(p, name) for p in PRODUCTS.values() for name in p.pipelines])
def test_a_copy_of_a_product(product: Product, name: str, copied: Callable[[Any], Any]) -> None:
    made = product.make(tiny.build(name))
    made.set_progress_bar_config(disable=True)
    if name == "sd3" and copied is not copy.deepcopy:
        pytest.skip(
            "transformers' hooks of a text encoder that was called, as for the held time, cannot be pickled"
        )
    twin = copied(made)
    call = {"prompt": "a aaa"} if "prompt" in tiny.inputs(name) else {"batch_size": 1}
    call |= {"num_inference_steps": 2, "output_type": "pt"}
    images = [pipe(**call, generator=tiny.generators(1)[0]).images for pipe in (made, twin)]
    assert torch.equal(*images)


def test_loading_in_a_fresh_process(tmp_path: Any) -> None:
    METHODS["teleport"].apply(pipe := tiny.build("ddpm"), "ddpm").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "diffusers_ext",
        "TeleportScheduler",
    ]
    code = (
        "import sys, diffusers_ext, diffusers\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "print(type(pipe.scheduler).__name__, type(pipe.scheduler.inner).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    expected = f"TeleportScheduler {type(pipe.scheduler.inner).__name__}"
    assert done.stdout.strip().endswith(expected), done.stderr


@pytest.mark.parametrize("name", METHODS["golden-noise"].pipelines)
@pytest.mark.parametrize(
    "methods", list(itertools.combinations(["teleport", "golden-noise", "smooth-lora"], 2))
)
@pytest.mark.parametrize("taken_off_first", [0, 1])
@pytest.mark.parametrize("put_on_first", [0, 1])
def test_methods_stack_and_come_off_in_any_order(
    methods: tuple[str, str], name: str, put_on_first: int, taken_off_first: int
) -> None:
    pair = [METHODS[method] for method in methods]
    pipe = tiny.build(name)
    plain, before, scheduler = tiny.images(pipe, name, 2), traces(pipe), pipe.scheduler
    alone = [tiny.images(on(method, name), name, 2) for method in pair]
    for method in (pair[put_on_first], pair[1 - put_on_first]):
        method.apply(pipe, name)
    both = tiny.images(pipe, name, 2)
    assert not any(torch.equal(both, images) for images in (plain, *alone))
    assert str(dx.summary(pipe)).count("\n") == 2
    pair[taken_off_first].remove(pipe)
    assert torch.equal(tiny.images(pipe, name, 2), alone[1 - taken_off_first])
    pair[1 - taken_off_first].remove(pipe)
    assert torch.equal(tiny.images(pipe, name, 2), plain)
    assert traces(pipe) == before
    assert pipe.scheduler is scheduler
    assert not {"encode_prompt", "prepare_latents", "check_inputs"} & vars(pipe).keys()


# --- other families ---

REFUSED = [(METHODS[m], name) for m in METHODS for name in tiny.NAMES if name not in METHODS[m].pipelines]


@pytest.mark.parametrize(("method", "name"), REFUSED, ids=lambda value: getattr(value, "title", value))
def test_other_families_are_refused_by_name(method: Method, name: str) -> None:
    pipe = tiny.build(name)
    plain, before = tiny.images(pipe, name), traces(pipe)
    stand_in = "sd"  # whatever weights the method needs; it must not come so far
    with pytest.raises(ValueError, match=type(pipe).__name__):
        method.apply(pipe, stand_in)
    assert torch.equal(tiny.images(pipe, name), plain)
    assert traces(pipe) == before


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("product", [pytest.param(p, id=k) for k, p in PRODUCTS.items()])
def test_pipelines_made_of_a_family(product: Product, name: str) -> None:
    pipe = tiny.build(name)
    if name not in product.pipelines:
        kinds = {type(pipe), *(type(part) for part in pipe.components.values())}
        with pytest.raises(ValueError, match="|".join(kind.__name__ for kind in kinds)):
            product.make(pipe)
        return
    made = product.make(pipe)
    made.set_progress_bar_config(disable=True)
    call = {"prompt": "a aaa"} if "prompt" in tiny.inputs(name) else {"batch_size": 1}
    images = made(**call, num_inference_steps=2, generator=tiny.generators(1)[0], output_type="pt").images
    assert torch.isfinite(images).all()
