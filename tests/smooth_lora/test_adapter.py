"""Loading LoRA files of every layout, beside other adapters, and off again."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

import diffusers_ext as dx
from tests import tiny

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
    from diffusers_ext.smooth_lora.apply import lora_state

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
