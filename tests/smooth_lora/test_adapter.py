"""Loading LoRA files of every layout, beside other adapters, and off again."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import diffusers_ext as dx
from diffusers_ext.smooth_lora.apply import apply_smooth_lora, check_pipeline
from tests import families, tiny

RANK = 3


def matrices(unet: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return tiny.lora_matrices(unet, RANK)


def old_layout(unet: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    weights = {}
    for name, (down, up) in matrices(unet).items():
        attention, _, kind = name.removesuffix(".0").rpartition(".")
        for side, value in (("down", down), ("up", up)):
            weights[f"{prefix}{attention}.processor.{kind}_lora.{side}.weight"] = value
    return weights


def merged(name: str = "sd") -> Any:
    pipe = tiny.build(name)
    denoiser = pipe.unet
    with torch.no_grad():
        for layer, (down, up) in matrices(denoiser).items():
            denoiser.get_submodule(layer).weight += up @ down
    return pipe


def write(weights: dict[str, torch.Tensor], folder: Path, name: str = "smooth.safetensors") -> Path:
    save_file(weights, folder / name)
    return folder / name


def layouts(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    new = {}
    for name, (down, up) in matrices(unet).items():
        new |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    alpha = {f"unet.{name}.lora_A.weight": down for name, (down, _) in matrices(unet).items()}
    alpha |= {f"unet.{name}.lora_B.weight": up / 2 for name, (_, up) in matrices(unet).items()}
    alpha |= {f"unet.{name}.alpha": torch.tensor(2.0 * RANK) for name in matrices(unet)}
    return {
        "released": old_layout(unet),
        "released with a prefix": old_layout(unet, "unet."),
        "peft": new,
        "bare peft": {key.removeprefix("unet."): value for key, value in new.items()},
        "wrapped": {f"base_model.model.{key}": value for key, value in new.items()},
        "with alphas": alpha,
    }


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("layout", list(layouts(tiny.build("sd").unet)))
def test_every_layout_is_the_manual_merge(layout: str, name: str, tmp_path: Path) -> None:
    pipe = tiny.build(name)
    plain, weights = tiny.images(pipe, name, 2), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    file = write(layouts(pipe.unet)[layout], tmp_path)
    assert dx.apply_smooth_lora(pipe, file) is pipe
    expected = tiny.images(merged(name), name, 2)
    assert (expected - plain).abs().max() > 0.05
    assert torch.allclose(tiny.images(pipe, name, 2), expected, atol=1e-5)
    dx.remove_smooth_lora(pipe)
    after = pipe.unet.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in after.items())
    # peft has moved the weights in memory, and with them the kernel that torch takes.
    assert torch.allclose(tiny.images(pipe, name, 2), plain, atol=1e-5)
    assert "save_pretrained" not in vars(pipe)
    dx.remove_smooth_lora(pipe)


def test_adapters_side_by_side(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    plain = tiny.images(pipe, "sd")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "other")
    other = tiny.images(pipe, "sd")
    dx.apply_smooth_lora(pipe, write(old_layout(tiny.build("sd").unet), tmp_path))
    pipe.set_adapters(["other", "smooth"], [1.0, 0.0])
    assert torch.allclose(tiny.images(pipe, "sd"), other, atol=1e-6)
    pipe.set_adapters(["smooth"], [1.0])
    assert torch.allclose(tiny.images(pipe, "sd"), tiny.images(merged(), "sd"), atol=1e-5)
    pipe.set_adapters(["other", "smooth"], [1.0, 1.0])
    both = tiny.images(pipe, "sd")
    assert not torch.allclose(both, other, atol=1e-3)
    dx.remove_smooth_lora(pipe)
    pipe.set_adapters(["other"], [1.0])
    assert torch.allclose(tiny.images(pipe, "sd"), other, atol=1e-6)
    pipe.unet.delete_adapters("other")
    assert torch.allclose(tiny.images(pipe, "sd"), plain, atol=1e-6)


def test_fused_and_saved(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    dx.apply_smooth_lora(pipe, write(old_layout(pipe.unet), tmp_path))
    expected = tiny.images(pipe, "sd")
    with pytest.raises(ValueError, match=r"smooth are on this pipeline: .*filled with random weights"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pipe.fuse_lora()
    assert torch.allclose(tiny.images(pipe, "sd"), expected, atol=1e-5)
    pipe.unfuse_lora()
    assert torch.allclose(tiny.images(pipe, "sd"), expected, atol=1e-5)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "out")
    loaded = type(pipe).from_pretrained(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(tiny.images(loaded, "sd"), expected, atol=1e-3)


def test_what_does_not_fit_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    plain, weights = tiny.images(pipe, "sd"), old_layout(pipe.unet)
    first = next(iter(weights))

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            dx.apply_smooth_lora(pipe, write(changed, tmp_path, "wrong.safetensors"))
        assert not getattr(pipe.unet, "peft_config", None)
        assert "save_pretrained" not in vars(pipe)
        assert torch.equal(tiny.images(pipe, "sd"), plain)

    refused(
        {**weights, "elsewhere.to_q.lora_A.weight": torch.zeros(1)},
        r"1 of its \d+ keys have no layer there \(elsewhere",
    )
    refused({"conv.weight": torch.zeros(1)}, "1 of its 1 keys have no layer")
    refused(
        {**weights, first: torch.zeros(RANK + 1, weights[first].shape[1])},
        f"rank {RANK + 1} down and {RANK} up",
    )
    refused({key: value for key, value in weights.items() if key != first}, "only one of its two matrices")
    refused({**weights, first: torch.zeros(RANK, 5)}, r"the LoRA is for \(\d+, 5\)")
    (tmp_path / "cut.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ValueError, match="corrupted or not a safetensors file"):
        dx.apply_smooth_lora(pipe, tmp_path / "cut.safetensors")
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="no other format is supported"):
        dx.apply_smooth_lora(pipe, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match="expected one safetensors file"):
        dx.apply_smooth_lora(pipe, tmp_path)
    with pytest.raises(OSError, match=r"none\.safetensors does not exist"):
        dx.apply_smooth_lora(pipe, tmp_path / "none.safetensors")
    dx.apply_smooth_lora(pipe, write(weights, tmp_path))
    with pytest.raises(ValueError, match="'smooth' is on this pipeline already"):
        dx.apply_smooth_lora(pipe, tmp_path, weight_name="smooth.safetensors")


def test_a_trained_adapter_is_saved_so_that_diffusers_loads_it(tmp_path: Path) -> None:
    from diffusers_ext.training.lora import lora_state

    pipe = tiny.build("sd")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "smooth")
    expected = tiny.images(pipe, "sd")
    write(lora_state(pipe.unet), tmp_path, "pytorch_lora_weights.safetensors")
    stock = tiny.build("sd")
    stock.load_lora_weights(str(tmp_path))
    assert torch.allclose(tiny.images(stock, "sd"), expected, atol=1e-6)
    ours = dx.apply_smooth_lora(tiny.build("sd"), tmp_path)
    assert torch.allclose(tiny.images(ours, "sd"), expected, atol=1e-6)


# --- the scale of a file, wherever it stands ---


def adapted(name: str = "sd", **config: Any) -> Any:
    """A pipeline with a random adapter of PEFT, whose images are the reference of what it saves."""
    pipe = tiny.build(name)
    given = {"r": 4, "target_modules": ["to_q", "to_v", "proj_in"], "init_lora_weights": False, **config}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        denoiser.add_adapter(peft.LoraConfig(**given), "smooth")
    return pipe


SCALES = {
    "alpha": {"lora_alpha": 16},
    "patterns": {
        "lora_alpha": 16,
        "rank_pattern": {"down_blocks.0.attentions.0.proj_in": 2, "attn2.to_v": 3},
        "alpha_pattern": {"attn1.to_q": 1, "^down_blocks.0.attentions.0.proj_in": 7},
    },
    "rank-stabilized": {"lora_alpha": 8, "use_rslora": True, "rank_pattern": {"to_v": 2}},
    "ranks only": {"lora_alpha": 4, "rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_v": 2}},
}


@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize("place", ["pipeline header", "model header", "adapter_config.json"])
def test_a_scale_outside_the_tensors_is_applied(place: str, scale: str, tmp_path: Path) -> None:
    saved = adapted(**SCALES[scale])
    expected = tiny.images(saved, "sd")
    state = peft.get_peft_model_state_dict(saved.unet, adapter_name="smooth")
    config = saved.unet.peft_config["smooth"]
    if place == "pipeline header":
        type(saved).save_lora_weights(
            tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict()
        )
    elif place == "model header":
        saved.unet.save_lora_adapter(tmp_path, "smooth")
    else:
        save_file(
            {f"base_model.model.{k}": v for k, v in state.items()}, tmp_path / "adapter_model.safetensors"
        )
        config.save_pretrained(tmp_path)
    pipe = dx.apply_smooth_lora(tiny.build("sd"), tmp_path)
    assert torch.allclose(tiny.images(pipe, "sd"), expected, atol=1e-5)
    plain = dx.remove_smooth_lora(pipe)
    assert not torch.allclose(tiny.images(plain, "sd"), expected, atol=1e-3)


def test_a_scale_survives_saving_what_was_trained_here(tmp_path: Path) -> None:
    from diffusers_ext.training.lora import lora_state

    saved = adapted(**SCALES["patterns"])
    write(lora_state(saved.unet), tmp_path, "pytorch_lora_weights.safetensors")
    stock = tiny.build("sd")
    stock.load_lora_weights(str(tmp_path))
    assert torch.allclose(tiny.images(stock, "sd"), tiny.images(saved, "sd"), atol=1e-5)


def test_a_scale_that_is_not_known_is_refused(tmp_path: Path) -> None:
    saved, pipe = adapted(lora_alpha=16), tiny.build("sd")
    plain = tiny.images(pipe, "sd")
    weights = {
        f"unet.{k}": v for k, v in peft.get_peft_model_state_dict(saved.unet, adapter_name="smooth").items()
    }
    beside = tmp_path / "adapter_config.json"

    def refused(message: str, **extra: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            dx.apply_smooth_lora(pipe, write({**weights, **extra}, tmp_path))
        assert not getattr(pipe.unet, "peft_config", None)
        assert torch.equal(tiny.images(pipe, "sd"), plain)

    refused(r"have no layer there \(elsewhere.alpha\)", **{"elsewhere.alpha": torch.tensor(2.0)})
    # A layer of the model, but not of the file.
    refused(r"no layer there \(conv_in.alpha\)", **{"unet.conv_in.alpha": torch.tensor(2.0)})
    alpha = {key.replace("lora_A.weight", "alpha"): torch.tensor(2.0) for key in weights if "lora_A" in key}
    config = saved.unet.peft_config["smooth"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    for changed, message in [
        ({"r": 5}, "rank 4 for .* its configuration says 5"),
        ({"rank_pattern": {"to_v": 2}}, "rank 4 for .*to_v, but its configuration says 2"),
        ({"use_dora": True}, "is about a DoRA adapter"),
        ({"peft_type": "LOHA"}, "is about a LOHA adapter"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the weights of the model too"),
    ]:
        beside.write_text(json.dumps({**config, **changed}, default=str))
        refused(message)
    beside.write_text(json.dumps(config, default=str))
    refused("both .alpha keys and a configuration", **alpha)
    beside.write_text("{")
    refused("no readable configuration")
    beside.unlink()
    vector = {key.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(8) for key in weights}
    refused("It is a DoRA adapter", **vector)
    refused("for the denoiser only", **{"text_encoder.layers.0.q.lora_A.weight": torch.zeros(4, 8)})


# --- kohya's layout ---


def kohya(unet: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """A file with attention, feed-forward and convolution layers and mixed alphas, and a UNet with its weights."""
    weights, merged_unet = {}, copy.deepcopy(unet)
    draw = torch.Generator().manual_seed(3)
    for index, (name, layer) in enumerate(unet.named_modules()):
        wanted = name.endswith(("to_q", "to_out.0", "ff.net.2", "proj_in", "resnets.0.conv1"))
        if not wanted or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        kernel = layer.weight.shape[2:]
        down = torch.randn(3, layer.weight.shape[1], *kernel, generator=draw)
        up = 0.1 * torch.randn(layer.weight.shape[0], 3, *(1 for _ in kernel), generator=draw)
        key, alpha = f"lora_unet_{name.replace('.', '_')}", 1.0 + index % 4
        weights |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        weights[f"{key}.alpha"] = torch.tensor(alpha)
        change = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
        with torch.no_grad():
            merged_unet.get_submodule(name).weight += alpha / 3 * change
    return weights, merged_unet


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_kohya_files_are_the_manual_merge(name: str, tmp_path: Path) -> None:
    pipe, reference = tiny.build(name), tiny.build(name)
    weights, reference.unet = kohya(pipe.unet)
    expected = tiny.images(reference, name)
    dx.apply_smooth_lora(pipe, write(weights, tmp_path))
    assert torch.allclose(tiny.images(pipe, name), expected, atol=1e-4)


def test_kohya_files_of_sdxl_have_names_of_another_unet(tmp_path: Path) -> None:
    pipe, reference = tiny.build("sdxl"), tiny.build("sdxl")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = tiny.lora_matrices(pipe.unet, RANK)[layer]
    key = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    weights = {
        f"{key}.lora_down.weight": down,
        f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(6.0),
    }
    with torch.no_grad():
        reference.unet.get_submodule(layer).weight += 2 * up @ down
    dx.apply_smooth_lora(pipe, write(weights, tmp_path))
    assert torch.allclose(tiny.images(pipe, "sdxl"), tiny.images(reference, "sdxl"), atol=1e-5)


def test_kohya_files_that_diffusers_does_not_convert_are_refused(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    weights, _ = kohya(pipe.unet)
    first = next(iter(weights)).partition(".")[0]
    changes = {
        "does not understand": {f"{first}.lora_mid.weight": torch.zeros(1)},
        "no complete converter": {f"{first}.dora_scale": torch.zeros(1)},
        "have no layer there": {
            "lora_unet_elsewhere.lora_down.weight": torch.zeros(3, 8),
            "lora_unet_elsewhere.lora_up.weight": torch.zeros(8, 3),
        },
        "converter drops some": {
            "lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.zeros(3, 8),
            "lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.zeros(8, 3),
        },
    }
    for message, extra in changes.items():
        with pytest.raises(ValueError, match=message):
            dx.apply_smooth_lora(pipe, write({**weights, **extra}, tmp_path))
        assert not getattr(pipe.unet, "peft_config", None)


# --- what is done to the pipeline before and after ---


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_fused_projections_are_refused_before_and_after(name: str, tmp_path: Path) -> None:
    part = "unet" if name == "sd" else "transformer"
    saved = adapted(name, target_modules=["to_q", "to_k", "to_v"])
    getattr(saved, part).save_lora_adapter(tmp_path, "smooth")
    expected, pipe = tiny.images(saved, name), tiny.build(name)
    denoiser = getattr(pipe, part)
    plain = tiny.images(pipe, name)
    denoiser.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"would have no effect: call pipe.unfuse_qkv_projections\(\) first"):
        dx.apply_smooth_lora(pipe, tmp_path)
    assert not getattr(denoiser, "peft_config", None)
    denoiser.unfuse_qkv_projections()
    dx.apply_smooth_lora(pipe, tmp_path)
    assert torch.allclose(tiny.images(pipe, name), expected, atol=1e-5)
    with pytest.raises(
        ValueError, match="smooth are on this pipeline: the fused projections would be made without"
    ):
        denoiser.fuse_qkv_projections()
    dx.remove_smooth_lora(pipe)
    denoiser.fuse_qkv_projections()
    assert torch.allclose(tiny.images(pipe, name), plain, atol=1e-5)
    assert "fuse_qkv_projections" not in vars(denoiser)


def test_an_adapter_in_the_weights_is_not_removed_in_silence(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    plain = tiny.images(pipe, "sd")
    dx.apply_smooth_lora(pipe, write(old_layout(pipe.unet), tmp_path))
    expected = tiny.images(pipe, "sd")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"fused into the weights.*pipe.unfuse_lora\(\)"):
        dx.remove_smooth_lora(pipe)
    assert torch.allclose(tiny.images(pipe, "sd"), expected, atol=1e-5)
    pipe.unfuse_lora()
    dx.remove_smooth_lora(pipe)
    assert torch.allclose(tiny.images(pipe, "sd"), plain, atol=1e-5)
    assert not getattr(pipe.unet, "peft_config", None)


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed bytes of another shape, like the layers of bitsandbytes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.bias = layer.bias
        packed = layer.weight.detach().contiguous().view(torch.uint8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.reshape(-1).view(torch.float32).reshape(self.out_features, self.in_features)
        return F.linear(x, weight, self.bias)


def test_a_quantized_base(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    plain, weights = tiny.images(pipe, "sd"), old_layout(pipe.unet)
    for name in matrices(pipe.unet):
        parent, _, child = name.rpartition(".")
        setattr(pipe.unet.get_submodule(parent), child, PackedLinear(pipe.unet.get_submodule(name)))
    assert torch.equal(tiny.images(pipe, "sd"), plain)
    dx.apply_smooth_lora(pipe, write(weights, tmp_path))
    assert torch.allclose(tiny.images(pipe, "sd"), tiny.images(merged(), "sd"), atol=1e-5)
    dx.remove_smooth_lora(pipe)
    assert torch.allclose(tiny.images(pipe, "sd"), plain, atol=1e-6)
    wrong = {key: value[:, :5].contiguous() if "down" in key else value for key, value in weights.items()}
    with pytest.raises(ValueError, match=r"the LoRA is for \(\d+, 5\)"):
        dx.apply_smooth_lora(pipe, write(wrong, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_denoiser(in_place: bool, tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    file = write(old_layout(pipe.unet), tmp_path)
    plain = tiny.images(pipe, "sd", steps=2)
    torch._dynamo.reset()
    if in_place:
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert torch.allclose(tiny.images(pipe, "sd", steps=2), plain, atol=1e-5)
    dx.apply_smooth_lora(pipe, file)
    assert "adapter 'smooth' of rank 3" in str(dx.summary(pipe))
    assert torch.allclose(tiny.images(pipe, "sd", steps=2), tiny.images(merged(), "sd", steps=2), atol=1e-5)
    dx.remove_smooth_lora(pipe)
    assert torch.allclose(tiny.images(pipe, "sd", steps=2), plain, atol=1e-5)


def test_a_deep_copy_has_the_adapter_of_its_own(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    trainable = {name for name, p in pipe.unet.named_parameters() if p.requires_grad}
    plain = tiny.images(pipe, "sd")
    dx.apply_smooth_lora(pipe, write(old_layout(pipe.unet), tmp_path))
    expected, copied = tiny.images(pipe, "sd"), copy.deepcopy(pipe)
    dx.remove_smooth_lora(pipe)
    assert "adapter 'smooth'" in str(dx.summary(copied))
    assert torch.allclose(tiny.images(copied, "sd"), expected, atol=1e-6)
    with pytest.raises(ValueError, match="smooth are on this pipeline"):
        copied.save_pretrained(tmp_path / "copied")
    with pytest.raises(ValueError, match="smooth are on this pipeline"):
        copied.unet.save_pretrained(tmp_path / "copied")
    pipe.save_pretrained(tmp_path / "plain")
    dx.remove_smooth_lora(copied)
    copied.save_pretrained(tmp_path / "copied")
    assert torch.allclose(tiny.images(copied, "sd"), plain, atol=1e-6)
    assert {name for name, p in copied.unet.named_parameters() if p.requires_grad} == trainable


def test_a_second_denoiser_is_refused(tmp_path: Path) -> None:
    pipe = families.build("wan22")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "smooth")
    pipe.transformer.save_lora_adapter(tmp_path, "smooth")
    pipe.transformer.unload_lora()
    with pytest.raises(ValueError, match=r"WanPipeline has further denoisers \(transformer_2\).*load_into_"):
        dx.apply_smooth_lora(pipe, tmp_path)
    assert not getattr(pipe.transformer, "peft_config", None)
    one = dx.apply_smooth_lora(families.build("wan"), tmp_path)
    assert list(one.transformer.peft_config) == ["smooth"]


def test_what_peft_cannot_adapt_is_refused(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    weights = {
        "conv_norm_out.lora_A.weight": torch.zeros(2, 8),
        "conv_norm_out.lora_B.weight": torch.zeros(8, 2),
    }
    with pytest.raises(
        ValueError, match="conv_norm_out is a GroupNorm, and PEFT adds LoRAs to linear layers"
    ):
        dx.apply_smooth_lora(pipe, write(weights, tmp_path))


def test_a_repository_has_its_configuration_beside_the_weights(tmp_path: Path, monkeypatch: Any) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from diffusers_ext.smooth_lora import weights as module

    saved = adapted(lora_alpha=16)
    state = peft.get_peft_model_state_dict(saved.unet, adapter_name="smooth")
    saved.unet.peft_config["smooth"].save_pretrained(tmp_path)
    absent: list[type[Exception]] = []

    def download(repo: str, name: str, **kwargs: Any) -> str:
        assert (repo, kwargs) == ("user/lora", {"revision": "v1"})
        if absent and name == "adapter_config.json":
            raise absent[0]("not there")
        return str(tmp_path / name)

    def images(prefix: str) -> torch.Tensor:
        write({f"{prefix}{k}": v for k, v in state.items()}, tmp_path, "pytorch_lora_weights.safetensors")
        return tiny.images(dx.apply_smooth_lora(tiny.build("sd"), "user/lora", revision="v1"), "sd")

    monkeypatch.setattr(module, "hf_hub_download", download)
    assert torch.allclose(images("base_model.model."), tiny.images(saved, "sd"), atol=1e-5)
    unscaled = tiny.images(adapted(lora_alpha=4), "sd")
    for kind in (EntryNotFoundError, LocalEntryNotFoundError):
        absent[:] = [kind]
        assert torch.allclose(images("unet."), unscaled, atol=1e-5)
    # PEFT's own layout has a configuration, which an offline cache may lack.
    with pytest.raises(LocalEntryNotFoundError):
        images("base_model.model.")


@pytest.mark.parametrize("name", ["pixart", "hunyuan-dit", "dit", "ddpm"])
def test_a_denoiser_without_loras_is_refused_with_what_would_work(name: str) -> None:
    pipe = families.build(name)
    kind = type(families.denoisers(pipe, name)[0]).__name__
    message = f"cannot load a LoRA into a {kind}, .* Use a pipeline whose denoiser has load_lora_adapter"
    for refused in (check_pipeline, lambda pipe: apply_smooth_lora(pipe, "nowhere")):
        with pytest.raises(ValueError, match=message):
            refused(pipe)
