"""The released architecture, against the published formula computed another way, and its two file layouts.

The reference follows arXiv:2411.09502 term by term on the weights of a checkpoint in the official layout, with
loops where the model has batched operations, and with `transformers.SwinModel` for Swin-Tiny.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import SwinConfig, SwinModel
from typer.testing import CliRunner

import diffusers_ext as dx
from diffusers_ext import cli
from diffusers_ext.golden_noise.swin import SwinTiny

CHANNELS, SIZE, TEXT, TOKENS = 4, 16, 6, 77
SIDE = CHANNELS * SIZE // 2  # of the matrix that is decomposed


def checkpoint(seed: int = 0, size: int = SIZE) -> dict[str, Any]:
    """Random weights in the official layout, unused ones included."""
    draw = torch.Generator().manual_seed(seed)
    side = CHANNELS * size // 2

    def linear(name: str, out: int, into: int, bias: bool = True) -> dict[str, Tensor]:
        found = {f"{name}.weight": torch.randn(out, into, generator=draw) / into**0.5}
        return found | ({f"{name}.bias": 0.1 * torch.randn(out, generator=draw)} if bias else {})

    svd = {}
    for name, hidden in (("mlp1", 64), ("mlp2", 64), ("mlp4", 1024)):
        svd |= linear(f"{name}.0", hidden, side) | linear(f"{name}.2", side, hidden)
    svd |= linear("mlp3.0", side, side)
    svd |= linear("attention.qkv", 3 * side, side, bias=False) | linear("attention.proj", side, side)
    svd |= {f"bn.{name}": torch.ones(side) for name in ("weight", "bias", "running_mean", "running_var")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        swin = {f"swin.{name}": value for name, value in SwinTiny().state_dict().items()}
    for name, value in swin.items():
        # Biases and norms away from their defaults, so that a forgotten one shows.
        scale = 0.5 if "bias" in name else 0.1 if value.ndim == 1 else 0.0
        swin[name] = value + scale * torch.randn(value.shape, generator=draw)
    swin |= {"swin.head.fc.weight": torch.zeros(3, 768), "swin.head.fc.bias": torch.zeros(3)}
    for name, out, into in (("upconv", CHANNELS, 7), ("downconv", 3, CHANNELS)):
        swin |= {k: v[..., None, None] if v.ndim == 2 else v for k, v in linear(name, out, into).items()}
    text = linear("linear", 2 * CHANNELS, TOKENS * TEXT)
    scalars = {"alpha": torch.tensor([0.7]), "beta": torch.tensor([0.4])}
    return {"unet_svd": svd, "unet_embedding": swin, "embeeding": text, **scalars}


def inputs(batch: int = 2, size: int = SIZE) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(9)
    noise = torch.randn(batch, CHANNELS, size, size, generator=draw)
    return noise, torch.randn(batch, TOKENS, TEXT, generator=draw)


def reference(weights: dict[str, Any], noise: Tensor, text: Tensor, attention: bool = True) -> Tensor:
    """SVD(x) + (2 sigmoid(α) − 1) e + β Swin(x + e), one image after the other."""
    swin = reference_swin(weights["unet_embedding"])
    rows = []
    for x, c in zip(noise, text):
        e = _embedding(weights["embeeding"], x, c)
        scale = 2 / (1 + torch.exp(-weights["alpha"])) - 1
        residual = _residual(weights["unet_embedding"], swin, x + e)
        rows.append(_svd(weights["unet_svd"], x, attention) + scale * e + weights["beta"] * residual)
    return torch.stack(rows)


def _embedding(w: dict[str, Tensor], x: Tensor, c: Tensor) -> Tensor:
    scale, shift = (w["linear.weight"] @ c.reshape(-1) + w["linear.bias"]).split(CHANNELS)
    normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()
    return normed * (1 + scale)[:, None, None] + shift[:, None, None]


def _mlp(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = (x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"]).clamp_min(0)
    return hidden @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"]


def _svd(w: dict[str, Tensor], x: Tensor, attention: bool) -> Tensor:
    matrix = torch.cat([torch.cat([x[0], x[1]], 1), torch.cat([x[2], x[3]], 1)], 0)
    u, s, vh = torch.linalg.svd(matrix)
    h = _mlp(w, "mlp1", u.T) + _mlp(w, "mlp2", vh) + (w["mlp3.0.weight"] @ s + w["mlp3.0.bias"])
    if attention:
        heads, width = [], len(s) // 8
        q, k, v = (h @ part.T for part in w["attention.qkv.weight"].chunk(3))
        for n in range(8):
            own = slice(n * width, (n + 1) * width)
            heads.append(torch.softmax(q[:, own] @ k[:, own].T / width**0.5, 1) @ v[:, own])
        h = torch.cat(heads, 1) @ w["attention.proj.weight"].T + w["attention.proj.bias"]
    new = u @ torch.diag(_mlp(w, "mlp4", h.mean(0)) + s) @ vh
    n = len(new) // 2
    return torch.stack([new[:n, :n], new[:n, n:], new[n:, :n], new[n:, n:]])


def reference_swin(weights: dict[str, Tensor]) -> Any:
    """`transformers.SwinModel` with the same weights, found by their order: its names differ between releases."""
    model: Any = SwinModel(SwinConfig(image_size=224), add_pooling_layer=False).eval()
    ours = {
        k.removeprefix("swin."): v for k, v in weights.items() if k.startswith("swin.") and ".head." not in k
    }
    state = {}
    for name in model.state_dict():
        if ".downsample." in name:
            stage = int(name.split("layers.")[1].split(".")[0])
            state[name] = ours[f"layers.{stage + 1}.downsample.{name.split('.downsample.')[1]}"]
        elif ".blocks." in name:
            state[name] = _block_weight(ours, name)
        elif "embeddings" in name:
            state[name] = ours[
                "patch_embed." + ("norm." if "norm" in name else "proj.") + name.rsplit(".", 1)[1]
            ]
        else:
            state[name] = ours["norm." + name.rsplit(".", 1)[1]]
    model.load_state_dict(state)
    return model


def _block_weight(ours: dict[str, Tensor], name: str) -> Tensor:
    _, stage, _, block, part = name.removeprefix("encoder.").split(".", 4)
    start, kind = f"layers.{stage}.blocks.{block}.", name.rsplit(".", 1)[1]
    if "relative_position_bias_table" in part:
        return ours[start + "attn.relative_position_bias_table"]
    for number, names in enumerate((("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))):
        if any(n in part for n in names):
            return ours[f"{start}attn.qkv.{kind}"].chunk(3)[number]
    places = {"o_proj": "attn.proj", "attention.output.dense": "attn.proj", "layernorm_before": "norm1"}
    places |= {"layernorm_after": "norm2", "fc1": "mlp.fc1", "intermediate": "mlp.fc1", "fc2": "mlp.fc2"}
    places |= {"output.dense": "mlp.fc2"}
    return ours[start + next(v for k, v in places.items() if k in part) + "." + kind]


def _residual(w: dict[str, Tensor], swin: Any, x: Tensor) -> Tensor:
    picture = torch.einsum("oc,chw->ohw", w["downconv.weight"][:, :, 0, 0], _nearest(x, 224, 224))
    features = swin((picture + w["downconv.bias"][:, None, None])[None]).last_hidden_state[0]
    # Positions' rows taken for channels, columns for rows, features for columns.
    seven = _nearest(features.reshape(7, 7, 768), *x.shape[1:])
    return (
        torch.einsum("oc,chw->ohw", w["upconv.weight"][:, :, 0, 0], seven) + w["upconv.bias"][:, None, None]
    )


def _nearest(x: Tensor, height: int, width: int) -> Tensor:
    rows = torch.arange(height) * x.shape[1] // height
    columns = torch.arange(width) * x.shape[2] // width
    return x[:, rows][:, :, columns]


@pytest.fixture(scope="module")
def file(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("npnet") / "sdxl.pth"
    torch.save(checkpoint(), path)
    return path


def flat(weights: dict[str, Any]) -> dict[str, Tensor]:
    names = {"unet_svd": "unet_svd", "unet_embedding": "unet_embedding", "embeeding": "text_embedding"}
    parts = {f"{ours}.{k}": v.contiguous() for name, ours in names.items() for k, v in weights[name].items()}
    return parts | {"alpha": weights["alpha"], "beta": weights["beta"]}


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def same_weights(one: Any, two: Any) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@torch.no_grad()
@pytest.mark.parametrize("attention", [True, False])
def test_it_is_the_published_formula(attention: bool, file: Path) -> None:
    model = dx.NPNetModel.from_original(file, svd_attention=attention, sample_size=SIZE)
    noise, text = inputs()
    expected = reference(checkpoint(), noise, text, attention)
    assert close(model(noise, text), expected)
    other = reference(checkpoint(), noise, text, not attention)
    assert not close(model(noise, text), other)
    # Every term has its share, so each of them was compared.
    for key in ("alpha", "beta"):
        without = {**checkpoint(), key: torch.zeros(1)}
        assert not close(reference(without, noise, text, attention), expected)


@torch.no_grad()
def test_at_the_released_size(tmp_path: Path) -> None:
    torch.save(checkpoint(size=128), tmp_path / "npnet.pth")
    model = dx.NPNetModel.from_original(tmp_path / "npnet.pth")
    noise, text = inputs(1, 128)
    assert close(model(noise, text), reference(checkpoint(size=128), noise, text))


@torch.no_grad()
def test_the_command_that_converts(tmp_path: Path) -> None:
    torch.save(checkpoint(size=128), tmp_path / "npnet.pth")
    arguments = ["convert", "npnet", str(tmp_path / "npnet.pth"), str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, [*arguments, "--no-svd-attention"])
    assert done.exit_code == 0, done.output
    loaded: Any = dx.NPNetModel.from_pretrained(tmp_path / "out")
    model = dx.NPNetModel.from_original(tmp_path / "npnet.pth", svd_attention=False)
    assert same_weights(loaded, model)
    assert loaded.config.svd_attention is False
    done = CliRunner().invoke(cli.app, ["convert", "npnet", str(tmp_path / "none.pth"), str(tmp_path / "x")])
    assert done.exit_code == 1
    assert "none.pth does not exist" in done.output.replace("\n", "")
    assert not (tmp_path / "x").exists()


@torch.no_grad()
def test_the_swin_part_is_transformers_swin() -> None:
    weights = checkpoint()["unet_embedding"]
    ours = SwinTiny().eval()
    ours.load_state_dict(
        {k[5:]: v for k, v in weights.items() if k.startswith("swin.") and ".head." not in k}
    )
    picture = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = reference_swin(weights)(picture).last_hidden_state
    assert close(ours(picture).flatten(1, 2), expected)


@torch.no_grad()
def test_both_layouts_and_scalars_of_either_shape(file: Path, tmp_path: Path) -> None:
    noise, text = inputs()
    expected = dx.NPNetModel.from_original(file, sample_size=SIZE)(noise, text)
    weights = flat(checkpoint())
    weights["unet_embedding.swin.layers.0.blocks.1.attn_mask"] = torch.zeros(2)
    weights["unet_embedding.swin.layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(2)
    save_file(
        {**weights, "alpha": weights["alpha"][0], "beta": weights["beta"][0]}, tmp_path / "port.safetensors"
    )
    port = dx.NPNetModel.from_original(tmp_path / "port.safetensors", sample_size=SIZE)
    assert torch.equal(port(noise, text), expected)


@torch.no_grad()
def test_saving_converted_weights(file: Path, tmp_path: Path) -> None:
    model = dx.NPNetModel.from_original(file, sample_size=SIZE)
    model.save_pretrained(tmp_path)
    noise, text = inputs()
    loaded: Any = dx.NPNetModel.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    # Weights that lie elsewhere in memory may take another kernel.
    assert torch.allclose(loaded(noise, text), model(noise, text), atol=1e-4)
    half: Any = dx.NPNetModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    golden = half(noise.half(), text.half())
    assert golden.dtype == torch.float16
    # Twelve Swin blocks in half precision.
    assert float((golden.float() - model(noise, text)).abs().mean()) < 0.02


@torch.no_grad()
def test_rows_are_conditioned_one_by_one_and_the_residual_has_seven_rows(file: Path) -> None:
    model = dx.NPNetModel.from_original(file, sample_size=SIZE)
    noise, text = inputs(3)
    batch = model(noise, text)
    one = torch.cat([model(noise[i : i + 1], text[i : i + 1]) for i in range(3)])
    assert torch.allclose(batch, one, atol=1e-4)
    residual = model.released.unet_embedding(noise)
    assert len(torch.unique(residual[0, 0], dim=0)) <= 7


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it-ran"),)

    torch.save({**checkpoint(), "alpha": Code()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Code()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name} was not loaded: it holds more than tensors"):
            dx.NPNetModel.from_original(tmp_path / name)
    assert not (tmp_path / "it-ran").exists()


def test_partial_and_other_files_are_refused_by_name(file: Path, tmp_path: Path) -> None:
    def refused(weights: Any, message: str) -> None:
        torch.save(weights, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=message):
            dx.NPNetModel.from_original(tmp_path / "x.pth", sample_size=SIZE)

    whole = checkpoint()
    svd = whole["unet_svd"]
    partial = {k: v for k, v in svd.items() if k != "mlp1.0.weight"}
    refused({**whole, "unet_svd": partial}, r"missing: unet_svd\.mlp1\.0\.weight")
    refused({**whole, "unet_svd": {**svd, "mlp9": svd["mlp1.0.bias"]}}, r"not expected: unet_svd\.mlp9")
    turned = {**svd, "mlp1.0.weight": svd["mlp1.0.weight"].T}
    refused(
        {**whole, "unet_svd": turned},
        r"of another shape: unet_svd\.mlp1\.0\.weight \(32, 64\) instead of \(64, 32\)",
    )
    refused({k: v for k, v in whole.items() if k != "beta"}, "expected the keys alpha, beta, embeeding")
    refused(torch.zeros(3), "got Tensor")
    refused({**whole, "embeeding": {}}, r"text_embedding\.linear\.weight is missing")
    refused({**whole, "embeeding": {"linear.weight": torch.zeros(8, 5)}}, r"has shape \(8, 5\)")
    with pytest.raises(ValueError, match=r"of another shape: unet_svd.*instead of"):
        dx.NPNetModel.from_original(file)  # which expects latents of 128 × 128
    for name, data in (
        ("x.pth", file.read_bytes()[:5000]),
        ("x.pth", b""),
        ("x.safetensors", b"12345678901"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            dx.NPNetModel.from_original(tmp_path / name)
    with pytest.raises(OSError, match=r"none\.pth"):
        dx.NPNetModel.from_original(tmp_path / "none.pth")
    with pytest.raises(OSError, match=r"none\.safetensors"):
        dx.NPNetModel.from_original(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("noise", "text", "message"),
    [
        ((1, 4, 8, 16), (1, 77, 6), "works at 16 × 16 latents only, got 8 × 16"),
        ((1, 4, 16, 16), (1, 76, 6), "made for 77 tokens, got 76"),
        ((1, 4, 16, 16), (1, 77, 7), "width 6, got 7"),
        ((2, 4, 16, 16), (1, 77, 6), "one row for each of the 2 noises"),
    ],
)
def test_wrong_sizes_are_named(noise: Any, text: Any, message: str, file: Path) -> None:
    model = dx.NPNetModel.from_original(file, sample_size=SIZE)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(noise), torch.zeros(text))


def test_nearest_is_torchs() -> None:
    x = torch.randn(1, 7, 768)
    assert torch.equal(_nearest(x, 16, 128), F.interpolate(x[None], [16, 128])[0])
