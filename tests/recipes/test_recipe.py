"""Recipes: bit-equal through a folder, undone without a trace, and refused where they do not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import diffusers_ext as dx
from diffusers_ext.core.methods import Part
from diffusers_ext.recipes.recipe import rooms_with_parts
from tests import tiny
from tests.contract.test_contract import METHODS, traces

pytestmark = pytest.mark.filterwarnings("ignore")

# The stacks have all methods.
QUICK = (("sd", "golden-noise"), ("sd", "smooth-lora"), ("ddpm", "teleport"))
ALONE = [
    pytest.param(name, key, marks=() if (name, key) in QUICK else pytest.mark.slow)
    for key, method in METHODS.items()
    for name in method.pipelines
]
STACK = ("teleport", "golden-noise", "smooth-lora", "gri-attention")
STACKS = [
    pytest.param(name, "+".join(STACK), marks=() if name in ("sd", "flux") else pytest.mark.slow)
    for name in ("sd", "sdxl", "sd3", "flux")
]


def put_on(pipe: Any, name: str, keys: str) -> Any:
    for key in keys.split("+"):
        METHODS[key].apply(pipe, name)
    return pipe


def stacked(name: str = "sd") -> Any:
    return put_on(tiny.build(name), name, "+".join(STACK))


@pytest.fixture(scope="module")
def recipe() -> dx.Recipe:
    """Of the stack; tests do not change it."""
    return dx.Recipe.from_pipe(stacked(), call={"num_inference_steps": 8})


@pytest.fixture(scope="module")
def saved(recipe: dx.Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    recipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to damage."""
    return Path(shutil.copytree(saved, tmp_path / "recipe"))


# --- a folder, and back ---


@pytest.mark.parametrize(("name", "keys"), ALONE + STACKS)
def test_round_trip_and_undo_are_bit_equal(name: str, keys: str, tmp_path: Path) -> None:
    pipe = tiny.build(name)
    plain, before, scheduler = tiny.images(pipe, name, 2), traces(pipe), pipe.scheduler
    put_on(pipe, name, keys)
    changed = tiny.images(pipe, name, 2)
    recipe = dx.Recipe.from_pipe(pipe)
    assert len(recipe.methods) == len(keys.split("+"))
    recipe.save_pretrained(tmp_path)
    assert recipe.remove(pipe) is pipe
    with dx.Recipe.from_pretrained(tmp_path).on(pipe) as same:
        assert same is pipe
        assert torch.equal(tiny.images(pipe, name, 2), changed)
    assert torch.equal(tiny.images(pipe, name, 2), plain)
    assert traces(pipe) == before
    assert pipe.scheduler is scheduler
    assert not dx.summary(pipe).methods


def test_a_recipe_in_memory_goes_on_several_pipelines(recipe: dx.Recipe) -> None:
    expected = tiny.images(stacked(), "sd", 2)
    one, two = recipe.apply(tiny.build("sd")), recipe.apply(tiny.build("sd"))
    assert torch.equal(tiny.images(one, "sd", 2), expected)
    recipe.remove(one)
    assert torch.equal(tiny.images(two, "sd", 2), expected)


def test_methods_are_applied_in_the_order_of_the_registry(recipe: dx.Recipe) -> None:
    backwards = dict(reversed(recipe.methods.items()))
    found = replace(recipe, methods=backwards)
    assert list(found.methods) == list(recipe.methods) == list(rooms_with_parts())


def test_the_half_precision_of_a_network_is_kept(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    dx.apply_golden_noise(pipe, tiny.npnet("sd").half(), strength=0.7)
    images = tiny.images(pipe, "sd", 2)
    dx.Recipe.from_pipe(pipe).save_pretrained(tmp_path)
    found = dx.Recipe.from_pretrained(tmp_path)
    assert found.methods["golden_noise"].weights.dtype == torch.float16
    assert torch.equal(tiny.images(found.apply(tiny.build("sd")), "sd", 2), images)


def test_adapters_keep_their_scales_and_leave_others_active(tmp_path: Path) -> None:
    save_file(tiny.lora("sd"), tmp_path / "lora.safetensors")
    for number, name in enumerate(("one", "two", "style")):
        weights = {
            key: value.roll(number + 1, -1) for key, value in tiny.lora("sd").items() if "alpha" not in key
        }
        save_file(weights, tmp_path / f"{name}.safetensors")
    pipe = tiny.build("sd")
    for name in ("one", "two"):
        dx.apply_smooth_lora(pipe, tmp_path / f"{name}.safetensors", name)
    blocks = {"down": 0.3, "up": {"block_1": [0.1, 0.7]}}
    pipe.set_adapters(["one", "two"], [0.5, {"unet": blocks}])
    images = tiny.images(pipe, "sd")
    dx.Recipe.from_pipe(pipe).save_pretrained(tmp_path / "recipe")
    recipe = dx.Recipe.from_pretrained(tmp_path / "recipe")
    adapters = recipe.methods["smooth_lora"].options["adapters"]
    assert adapters["one"]["scale"] == 0.5
    assert set(adapters["two"]["scale"].values()) == {
        0.3,
        0.1,
        0.7,
        1.0,
    }  # 1 in the middle, which was not named
    assert adapters["one"]["source"] == "one.safetensors"
    assert torch.equal(tiny.images(recipe.apply(tiny.build("sd")), "sd"), images)
    # On top of a LoRA of the user's own, which acts as before once the recipe is gone.
    own = tiny.build("sd")
    own.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style", prefix=None)
    before = tiny.images(own, "sd")
    with recipe.on(own):
        assert own.unet.active_adapters() == ["style", "one", "two"]
        assert not torch.equal(tiny.images(own, "sd"), before)
    assert own.unet.active_adapters() == ["style"]
    assert torch.equal(tiny.images(own, "sd"), before)


def test_an_adapter_that_is_off_stays_off(tmp_path: Path) -> None:
    pipe = put_on(tiny.build("sd"), "sd", "smooth-lora")
    save_file(tiny.lora("sd"), tmp_path / "lora.safetensors")
    dx.apply_smooth_lora(pipe, tmp_path, "second")  # of which Diffusers makes the only active one
    recipe = dx.Recipe.from_pipe(pipe)
    found = tiny.build("sd")
    recipe.apply(found)
    assert found.unet.active_adapters() == ["second"]
    assert torch.equal(tiny.images(found, "sd"), tiny.images(pipe, "sd"))


# --- where the weights came from, and the card ---


def test_sources_and_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.gaussian(tiny.LATENT_SHAPES["sd"], rank=6).save_pretrained("stats")
    tiny.npnet("sd").save_pretrained(tmp_path / "npnet")
    pipe = tiny.build("sd")
    pipe.register_to_config(_name_or_path="someone/model")
    dx.apply_teleport(pipe, dx.GaussianStats.from_pretrained("stats"), skip=0.4)
    npnet: Any = dx.NPNetModel.from_pretrained(tmp_path / "npnet")
    dx.apply_golden_noise(pipe, npnet)
    call = {"num_inference_steps": 8}
    recipe = dx.Recipe.from_pipe(pipe, call, figures={"prompt accuracy": "98.1 [95.3, 99.3]"})
    recipe.save_pretrained("fast")
    for found in (dx.Recipe.from_pretrained("fast"), dx.Recipe.from_pretrained(tmp_path / "fast")):
        assert [part.source for part in found.methods.values()] == ["stats", "npnet"]
        # The recipe of a pipeline with a loaded recipe names the same sources.
        again = dx.Recipe.from_pipe(found.apply(tiny.build("sd")))
        assert again.lines() == found.lines() == recipe.lines()
    written = "".join(path.read_text() for path in Path("fast").rglob("*") if path.suffix in (".json", ".md"))
    assert str(tmp_path) not in written
    assert npnet.config["_name_or_path"] == tmp_path / "npnet"
    card = Path("fast/README.md").read_text()
    for text in (
        "base_model: someone/model",
        "pipeline_tag: text-to-image",
        "- recipe",
        "| teleportation | skip=0.4, mean_from='stats', from stats |",
        "| prompt accuracy | 98.1 [95.3, 99.3] |",
        'dx.Recipe.from_pretrained("fast")',
        "num_inference_steps=8",
    ):
        assert text in card


def test_the_snippet_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.build("sd").save_pretrained("model")
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        "model", safety_checker=None, feature_extractor=None, image_encoder=None
    )
    put_on(pipe, "sd", "teleport")
    call = {"num_inference_steps": 3, "height": 8, "width": 8}
    dx.Recipe.from_pipe(pipe, call).save_pretrained("fast")
    card = Path("fast/README.md").read_text()
    snippet = card.partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(snippet, found)
    assert found["image"].size == (8, 8)
    assert "base_model" not in card  # a folder of this machine is no name for it


# --- what is refused ---


def test_nothing_to_save() -> None:
    with pytest.raises(
        ValueError, match="No method that a recipe can have is on this StableDiffusionPipeline"
    ):
        dx.Recipe.from_pipe(tiny.build("sd"))


@pytest.mark.parametrize("key", STACK)
def test_a_method_that_is_on_already_is_named_and_nothing_is_added(key: str, recipe: dx.Recipe) -> None:
    pipe = put_on(tiny.build("sd"), "sd", key)
    images, before = tiny.images(pipe, "sd"), traces(pipe)
    titles = dict(zip(STACK, ("teleportation", "golden noise", "Smooth-LoRA", "GRI attention")))
    with pytest.raises(ValueError, match=f"StableDiffusionPipeline. {titles[key]} is on it already"):
        recipe.apply(pipe)
    assert traces(pipe) == before
    assert torch.equal(tiny.images(pipe, "sd"), images)


def test_all_conflicts_are_named_together(recipe: dx.Recipe) -> None:
    pipe = stacked()
    with pytest.raises(
        ValueError, match=r"(?s)teleportation is on.*noise is on.*LoRA is on.*attention is on"
    ):
        recipe.apply(pipe)


def test_a_network_that_is_a_component_counts_as_on(recipe: dx.Recipe) -> None:
    from diffusers_ext.golden_noise.pipelines import GoldenNoiseStableDiffusionPipeline

    pipe = GoldenNoiseStableDiffusionPipeline.from_pipe(tiny.build("sd"), npnet=tiny.npnet("sd"))
    with pytest.raises(ValueError, match="golden noise is on it already"):
        recipe.apply(pipe)
    found = dx.Recipe.from_pipe(pipe)
    images = tiny.images(found.apply(tiny.build("sd")), "sd")
    assert torch.equal(images, tiny.images(pipe, "sd"))


def test_a_method_that_the_pipeline_refuses_is_named(recipe: dx.Recipe) -> None:
    from diffusers import LCMScheduler

    pipe = tiny.build("sd")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"teleportation does not work on it: .*LCMScheduler"):
        recipe.apply(pipe)
    assert not dx.summary(pipe).methods


def test_another_denoiser_or_other_latents_are_named(recipe: dx.Recipe) -> None:
    with pytest.raises(ValueError, match=r"made for a UNet2DConditionModel .* has a UNet2DModel"):
        recipe.apply(tiny.build("ddpm"))
    with pytest.raises(ValueError, match=r"another model .*config\.cross_attention_dim: 16 there, 32 now"):
        recipe.apply(tiny.build("sdxl"))
    pipe = tiny.build("sd")
    pipe.vae.register_to_config(scaling_factor=0.5)
    with pytest.raises(ValueError, match=r"latents\.scaling_factor: 0\.18215 there, 0\.5 now"):
        recipe.apply(pipe)
    # Entries that other versions of Diffusers have do not count.
    pipe = tiny.build("sd")
    pipe.unet.register_to_config(an_entry_of_the_next_version=3)
    recipe.apply(pipe)


@pytest.mark.parametrize("wrong", [pytest.param("key", marks=pytest.mark.slow), "shape"])
def test_a_method_that_fails_takes_the_ones_before_it_off(wrong: str, recipe: dx.Recipe) -> None:
    pipe = tiny.build("sd")
    images, before, scheduler = tiny.images(pipe, "sd"), traces(pipe), pipe.scheduler
    part = recipe.methods["smooth_lora"]
    good = part.weights["smooth"]
    first = next(iter(good))
    bad = (
        {**good, first: good[first][:, :1]}
        if wrong == "shape"
        else {**good, "unet.nothing.lora_A.weight": good[first]}
    )
    # A second adapter: the first one is on when it fails, and so are teleportation and golden noise.
    adapters = dict.fromkeys(("smooth", "second"), part.options["adapters"]["smooth"])
    broken = Part({"adapters": adapters}, {"smooth": good, "second": bad})
    with pytest.raises(ValueError, match="nothing" if wrong == "key" else "shape"):
        replace(recipe, methods={**recipe.methods, "smooth_lora": broken}).apply(pipe)
    assert traces(pipe) == before
    assert pipe.scheduler is scheduler
    assert torch.equal(tiny.images(pipe, "sd"), images)
    recipe.apply(pipe)


def test_a_failed_removal_removes_the_others() -> None:
    recipe, pipe = dx.Recipe.from_pipe(stacked()), stacked()
    dx.remove_gri_attention(pipe)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="'smooth' is fused into the weights"):
        recipe.remove(pipe)
    assert list(dx.summary(pipe).methods) == ["Smooth-LoRA"]
    pipe.unfuse_lora()
    assert not dx.summary(recipe.remove(pipe)).methods


def test_values_that_are_not_json(recipe: dx.Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="call and figures must hold finite values of JSON only"):
        replace(recipe, call={"generator": torch.Generator()}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="call and figures must hold finite"):
        replace(recipe, figures={"score": float("nan")}).save_pretrained(tmp_path)
    assert not (tmp_path / "recipe.json").exists()


def test_an_unknown_method(recipe: dx.Recipe) -> None:
    with pytest.raises(ValueError, match=r"no method called sixth\. The methods are teleport, golden_noise"):
        dx.Recipe({"sixth": Part()}, recipe.base)


# --- versions and damaged files ---


def edit_json(folder: Path, *path: str, value: Any) -> None:
    content = json.loads((folder / "recipe.json").read_text())
    entry = content
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    (folder / "recipe.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 2, "has format 2, written by diffusers-ext 9.9, and this version, .*, reads format 1"),
        (("format",), None, "is no recipe of diffusers-ext: it has no format"),
        (("base",), None, "lacks base"),
        (
            ("methods", "sixth"),
            {"options": {}},
            "method sixth, written by diffusers-ext 9.9, .* does not know",
        ),
        (
            ("methods", "teleport", "options"),
            {"jump": 1},
            "teleport with the options jump, written by .* 9.9",
        ),
        (("methods", "golden_noise", "options", "dtype"), "int8", "must be one of float32, .* got 'int8'"),
        (
            ("methods", "teleport"),
            {"options": {"skip": 0.4, "sigma": None, "mean_from": "stats"}},
            "no valid teleport",
        ),
        (("files", "../secret"), "0", "outside of the folder"),
    ],
)
def test_files_of_other_versions(path: tuple[str, ...], value: Any, message: str, folder: Path) -> None:
    edit_json(folder, "diffusers_ext", value="9.9")
    edit_json(folder, *path, value=value)
    with pytest.raises(ValueError, match=message):
        dx.Recipe.from_pretrained(folder)


def test_damaged_and_missing_files(folder: Path, saved: Path, tmp_path: Path) -> None:
    weights = folder / "smooth_lora" / "0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match=r"0\.safetensors is not the file that recipe\.json describes"):
        dx.Recipe.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(OSError, match=r"No file .*0\.safetensors"):
        dx.Recipe.from_pretrained(folder)
    (folder / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe\.json is not valid JSON"):
        dx.Recipe.from_pretrained(folder)
    (folder / "recipe.json").unlink()
    with pytest.raises(OSError, match="is this a recipe"):
        dx.Recipe.from_pretrained(folder)
    with pytest.raises(OSError, match="'no/recipe' is not a local directory"):
        dx.Recipe.from_pretrained("no/recipe")


def test_saving_again_keeps_foreign_files(recipe: dx.Recipe, folder: Path) -> None:
    (folder / "teleport" / "notes.txt").write_text("mine")
    part = recipe.methods["teleport"]
    replace(
        recipe, methods={"teleport": replace(part, options={**part.options, "skip": 0.2})}
    ).save_pretrained(folder)
    found = dx.Recipe.from_pretrained(folder)
    assert list(found.methods) == ["teleport"]
    assert found.methods["teleport"].options["skip"] == 0.2
    assert (folder / "teleport" / "notes.txt").read_text() == "mine"


# --- the pipeline classes ---


def test_a_pipeline_class_takes_a_recipe(saved: Path, recipe: dx.Recipe, tmp_path: Path) -> None:
    from diffusers_ext.recipes.pipelines import RecipeStableDiffusionPipeline

    plain, expected = tiny.images(tiny.build("sd"), "sd"), tiny.images(stacked(), "sd")
    pipe: Any = RecipeStableDiffusionPipeline.from_pipe(tiny.build("sd"))
    assert torch.equal(tiny.images(pipe, "sd"), plain)
    pipe.load_recipe(saved)
    with pytest.raises(ValueError, match="A recipe is on this pipeline already"):
        pipe.load_recipe(recipe)
    assert torch.equal(tiny.images(pipe, "sd"), expected)
    with pytest.raises(ValueError, match="smooth are on this pipeline"):  # what the LoRA says comes first
        pipe.save_pretrained(tmp_path)
    assert torch.equal(tiny.images(pipe.unload_recipe(), "sd"), plain)
    pipe.save_pretrained(tmp_path)
    absent = {key: None for key, value in pipe.components.items() if value is None}
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path,
        custom_pipeline=dx.pipeline_path("recipe"),
        recipe=str(saved),
        trust_remote_code=True,
        **absent,
    )
    assert torch.equal(tiny.images(loaded, "sd"), expected)
    assert loaded.loaded_recipe.call == {"num_inference_steps": 8}
    part = {"teleport": recipe.methods["teleport"]}
    pipe.load_recipe(replace(recipe, methods=part))
    with pytest.raises(ValueError, match="A recipe is on this pipeline, and it is saved by itself"):
        pipe.save_pretrained(tmp_path)
