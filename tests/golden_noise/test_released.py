"""The released architecture, against the published formula computed another way, and its two file layouts.

The reference follows arXiv:2411.09502 term by term on the weights of a checkpoint in the official layout, with
loops where the model has batched operations, and with `transformers.SwinModel` for Swin-Tiny.
"""

import copy
import functools
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

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
from tests import families

CHANNELS, SIZE, TEXT, TOKENS = 4, 16, 6, 77
SIDE = CHANNELS * SIZE // 2  # of the matrix that is decomposed


class Draw:
    """Random layers; biases and norms away from their defaults, so that a forgotten one shows."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def linear(
        self, name: str, out: int, into: int, bias: bool = True, scale: float = 1.0
    ) -> dict[str, Tensor]:
        found = {f"{name}.weight": scale * self.normal(out, into) / into**0.5}
        return found | ({f"{name}.bias": 0.1 * self.normal(out)} if bias else {})

    def conv(self, name: str, out: int, into: int, size: int) -> dict[str, Tensor]:
        weight = self.normal(out, into, size, size) / (into * size**2) ** 0.5
        return {f"{name}.weight": weight, f"{name}.bias": 0.1 * self.normal(out)}

    def norm(self, name: str, size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + 0.2 * self.normal(size), f"{name}.bias": 0.2 * self.normal(size)}


@functools.cache
def checkpoint(size: int = SIZE) -> dict[str, Any]:
    """Random weights in the official layout, unused ones included. Shared: not to be changed in place."""
    draw = Draw(0)
    side = CHANNELS * size // 2
    svd = {}
    for name, hidden in (("mlp1", 64), ("mlp2", 64), ("mlp4", 1024)):
        # Unit vectors are small beside the singular values: a larger weight lets each be seen.
        scale = 1.0 if name == "mlp4" else side**0.5
        svd |= draw.linear(f"{name}.0", hidden, side, scale=scale) | draw.linear(f"{name}.2", side, hidden)
    svd |= draw.linear("mlp3.0", side, side, scale=0.2)
    svd |= draw.linear("attention.qkv", 3 * side, side, bias=False)
    svd |= draw.linear("attention.proj", side, side)
    statistics = {f"bn.running_{name}": torch.ones(side) for name in ("mean", "var")}
    svd |= draw.norm("bn", side) | statistics | {"bn.num_batches_tracked": torch.tensor(0)}
    embedding = draw.conv("upconv", CHANNELS, 7, 1) | draw.conv("downconv", 3, CHANNELS, 1)
    embedding |= {f"swin.{name}": value for name, value in swin_weights(draw).items()}
    text = draw.linear("linear", 2 * CHANNELS, TOKENS * TEXT)
    scalars = {"alpha": torch.tensor([0.7]), "beta": torch.tensor([-0.4])}
    return {"unet_svd": svd, "unet_embedding": embedding, "embeeding": text, **scalars}


def swin_weights(draw: Draw) -> dict[str, Tensor]:
    """Under timm's names for `swin_tiny_patch4_window7_224`, as the official files have them."""
    found = draw.conv("patch_embed.proj", 96, 3, 4) | draw.norm("patch_embed.norm", 96)
    for stage, (depth, heads) in enumerate(((2, 3), (2, 6), (6, 12), (2, 24))):
        width = 96 * 2**stage
        if stage:
            found |= draw.norm(f"layers.{stage}.downsample.norm", 2 * width)
            found |= draw.linear(f"layers.{stage}.downsample.reduction", width, 2 * width, bias=False)
        for block in range(depth):
            start = f"layers.{stage}.blocks.{block}."
            found |= draw.norm(start + "norm1", width) | draw.norm(start + "norm2", width)
            found[start + "attn.relative_position_bias_table"] = draw.normal(169, heads)
            found |= draw.linear(start + "attn.qkv", 3 * width, width)
            found |= draw.linear(start + "attn.proj", width, width)
            found |= draw.linear(start + "mlp.fc1", 4 * width, width)
            found |= draw.linear(start + "mlp.fc2", width, 4 * width)
    return found | draw.norm("norm", 768) | draw.linear("head.fc", 3, 768)


def inputs(batch: int = 2, size: int = SIZE) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(9)
    noise = torch.randn(batch, CHANNELS, size, size, generator=draw)
    return noise, torch.randn(batch, TOKENS, TEXT, generator=draw)


class Terms(NamedTuple):
    """What the formula adds up, each (B, C, S, S), for one file."""

    svd: Tensor
    svd_without_attention: Tensor
    scaled_e: Tensor
    scaled_residual: Tensor

    def golden(self, attention: bool = True) -> Tensor:
        """SVD(x) + (2 sigmoid(α) − 1) e + β Swin(x + e)."""
        svd = self.svd if attention else self.svd_without_attention
        return svd + self.scaled_e + self.scaled_residual


@torch.no_grad()
def reference(weights: dict[str, Any], noise: Tensor, text: Tensor) -> Terms:
    """One image after the other."""
    swin = reference_swin(weights["unet_embedding"])
    scale = 2 / (1 + torch.exp(-weights["alpha"])) - 1
    rows = []
    for x, c in zip(noise, text):
        e = _embedding(weights["embeeding"], x, c)
        residual = _residual(weights["unet_embedding"], swin, x + e)
        svds = [_svd(weights["unet_svd"], x, attention) for attention in (True, False)]
        rows.append([*svds, scale * e, weights["beta"] * residual])
    return Terms(*(torch.stack(term) for term in zip(*rows)))


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
        change = _mlp(w, "mlp4", h.mean(0))
    else:
        # The authors' network without attention, the one they trained on SDXL, averages last.
        change = torch.stack([_mlp(w, "mlp4", row) for row in h]).mean(0)
    new = u @ torch.diag(change + s) @ vh
    n = len(new) // 2
    return torch.stack([new[:n, :n], new[:n, n:], new[n:, :n], new[n:, n:]])


def reference_swin(weights: dict[str, Tensor]) -> Any:
    """`transformers.SwinModel` with the same weights, found by their order: its names differ between releases."""
    model: Any = SwinModel(SwinConfig(image_size=224), add_pooling_layer=False).eval()
    ours = {
        k.removeprefix("swin."): v for k, v in weights.items() if k.startswith("swin.") and ".head." not in k
    }
    state = model.state_dict()  # releases differ in whether the table of relative positions is in it
    for name, _ in model.named_parameters():
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


@pytest.fixture(scope="module")
def released_size_file(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("npnet") / "npnet.pth"
    torch.save(checkpoint(128), path)
    return path


def flat(weights: dict[str, Any]) -> dict[str, Tensor]:
    names = {"unet_svd": "unet_svd", "unet_embedding": "unet_embedding", "embeeding": "text_embedding"}
    parts = {f"{ours}.{k}": v.contiguous() for name, ours in names.items() for k, v in weights[name].items()}
    return parts | {"alpha": weights["alpha"], "beta": weights["beta"]}


def close(found: Tensor, expected: Tensor) -> bool:
    # Float32 rounding is 2e-7 here; the least of the errors tried, GELU's tanh form, is 1e-4.
    return float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def same_weights(one: Any, two: Any) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_it_is_the_published_formula(file: Path) -> None:
    noise, text = inputs()
    terms = reference(checkpoint(), noise, text)
    for attention in (True, False):
        model = dx.NPNetModel.from_original(file, svd_attention=attention, sample_size=SIZE)
        with torch.no_grad():
            golden = model(noise, text).sample
        assert close(golden, terms.golden(attention))
        assert not close(golden, terms.golden(not attention))
    # Every term has its share, and prompts differ, so each of them was compared.
    size = terms.golden().abs().max()
    assert all(term.abs().max() > 0.1 * size for term in (*terms, terms.svd - noise))
    swapped = reference(checkpoint(), noise[:1], text[1:]).golden()
    assert not close(swapped, terms.golden()[:1])


@torch.no_grad()
def test_at_the_released_size(released_size_file: Path) -> None:
    model = dx.NPNetModel.from_original(released_size_file)
    noise, text = inputs(1, 128)
    assert close(model(noise, text).sample, reference(checkpoint(128), noise, text).golden())


@torch.no_grad()
def test_the_command_that_converts(released_size_file: Path, tmp_path: Path) -> None:
    arguments = ["convert", "npnet", str(released_size_file), str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, [*arguments, "--no-svd-attention"])
    assert done.exit_code == 0, done.output
    loaded: Any = dx.NPNetModel.from_pretrained(tmp_path / "out")
    model = dx.NPNetModel.from_original(released_size_file, svd_attention=False)
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
    model = dx.NPNetModel.from_original(file, sample_size=SIZE)
    whole = checkpoint()
    scalars = {name: whole[name][0] for name in ("alpha", "beta")}
    # What older releases of timm store besides, which follows from the window's size.
    extras = {
        "swin.layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
        "swin.layers.0.blocks.1.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long),
    }
    other = {**whole, **scalars, "unet_embedding": {**whole["unet_embedding"], **extras}}
    torch.save(other, tmp_path / "old.pth")
    save_file(flat(whole), tmp_path / "port.safetensors")
    save_file(flat(other), tmp_path / "old.safetensors")
    for name in ("old.pth", "port.safetensors", "old.safetensors"):
        assert same_weights(dx.NPNetModel.from_original(tmp_path / name, sample_size=SIZE), model), name


@torch.no_grad()
def test_saving_converted_weights(file: Path, tmp_path: Path) -> None:
    model = dx.NPNetModel.from_original(file, sample_size=SIZE)
    model.save_pretrained(tmp_path)
    noise, text = inputs()
    loaded: Any = dx.NPNetModel.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), model.buffers()))
    # Weights that lie in the file's memory may take another kernel; a copy lies as the model's own.
    assert torch.equal(copy.deepcopy(loaded)(noise, text).sample, model(noise, text).sample)
    half: Any = dx.NPNetModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    golden = half(noise.half(), text.half()).sample
    assert golden.dtype == torch.float16
    # Twelve Swin blocks in half precision.
    assert float((golden.float() - model(noise, text).sample).abs().mean()) < 0.02


@torch.no_grad()
def test_rows_are_conditioned_one_by_one_and_the_residual_has_seven_rows(file: Path) -> None:
    model = dx.NPNetModel.from_original(file, sample_size=SIZE)
    noise, text = inputs()
    batch = model(noise, text).sample
    one = torch.cat([model(noise[i : i + 1], text[i : i + 1]).sample for i in range(2)])
    assert torch.allclose(batch, one, atol=1e-4)
    other = model(noise, torch.stack([text[0], text[0]])).sample
    assert torch.allclose(other[0], batch[0], atol=1e-4)
    assert not torch.allclose(other[1], batch[1], atol=0.1)
    for image in model.released.unet_embedding(noise):
        assert [len(torch.unique(channel, dim=0)) for channel in image] == [7] * CHANNELS


@torch.no_grad()
def test_hunyuan_dit_gives_the_padding_as_it_is_encoded() -> None:
    """As the released code does, although the text encoder of HunyuanDiT returns a mask."""
    pipe = families.build("hunyuan-dit")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = dx.NPNetModel(text_dim=32, legacy=True, sample_size=8).eval()
    for scalar in (model.released.alpha, model.released.beta):
        scalar.fill_(1.0)
    call = {**families.inputs("hunyuan-dit", 2), "generator": families.generators(2)}
    del call["output_type"]
    encoded, _, mask, _ = pipe.encode_prompt(call["prompt"], do_classifier_free_guidance=True)
    assert not mask.all()
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in families.generators(2)])
    golden = model(noise, encoded).sample
    assert torch.allclose(dx.golden_latents(pipe, model, **call), golden, atol=1e-5)
    assert torch.equal(model(noise, encoded, mask.bool()).sample, golden)
    assert not torch.allclose(model(noise, encoded * mask[..., None]).sample, golden, atol=1e-2)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it-ran"),)

    torch.save({"unet_svd": {"mlp1.0.bias": torch.zeros(64)}, "alpha": Code()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Code()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name} was not loaded: it holds more than tensors"):
            dx.NPNetModel.from_original(tmp_path / name)
    assert not (tmp_path / "it-ran").exists()


def test_partial_and_other_files_are_refused_by_name(tmp_path: Path) -> None:
    def refused(weights: Any, message: str) -> None:
        torch.save(weights, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=message):
            dx.NPNetModel.from_original(tmp_path / "x.pth", sample_size=SIZE)

    # Of the right shapes, but with one number each, so that the files are small.
    parts = {
        name: {key: value.new_zeros(()).expand(value.shape) for key, value in part.items()}
        for name, part in checkpoint().items()
        if isinstance(part, dict)
    }
    whole = {**parts, "alpha": torch.zeros(1), "beta": torch.zeros(1)}
    svd, embedding = whole["unet_svd"], whole["unet_embedding"]
    partial = {k: v for k, v in svd.items() if k != "mlp1.0.weight"}
    refused({**whole, "unet_svd": partial}, r"missing: unet_svd\.mlp1\.0\.weight")
    refused({**whole, "unet_svd": {**svd, "mlp9": svd["mlp1.0.bias"]}}, r"not expected: unet_svd\.mlp9")
    turned = {**svd, "mlp1.0.weight": svd["mlp1.0.weight"].T}
    refused(
        {**whole, "unet_svd": turned},
        r"of another shape: unet_svd\.mlp1\.0\.weight \(32, 64\) instead of \(64, 32\)",
    )
    headless = {k: v for k, v in embedding.items() if k != "swin.layers.2.blocks.5.attn.qkv.bias"}
    refused(
        {**whole, "unet_embedding": headless},
        r"missing: unet_embedding\.swin\.layers\.2\.blocks\.5\.attn\.qkv\.bias\.$",
    )
    refused({**whole, "beta": torch.zeros(3)}, r"of another shape: beta \(3,\) instead of \(1,\)")
    refused({**whole, "unet_svd": None, "beta": "0"}, r"no tensors at beta, unet_svd\.$")
    refused({**whole, "unet_svd": {**svd, "mlp1.0.bias": 1}}, r"no tensors at unet_svd\.mlp1\.0\.bias")
    refused({k: v for k, v in whole.items() if k != "beta"}, "expected the keys alpha, beta, embeeding")
    refused({"state_dict": svd}, "embeeding, unet_embedding, unet_svd, got state_dict")
    refused(torch.zeros(3), "got Tensor")
    refused({**whole, "embeeding": {}}, r"text_embedding\.linear\.weight is missing")
    refused({**whole, "embeeding": {"linear.weight": torch.zeros(8, 5)}}, r"has shape \(8, 5\)")
    other_channels = {"linear.weight": torch.zeros(32, TOKENS * TEXT)}
    refused({**whole, "embeeding": other_channels}, r"has shape \(32, 462\), expected \(8, 77 · text width\)")


def test_latents_of_another_size_are_refused_with_the_right_one(file: Path) -> None:
    with pytest.raises(ValueError, match="latents of 16 × 16, not 128 × 128: pass sample_size=16"):
        dx.NPNetModel.from_original(file)


def test_broken_and_absent_files(tmp_path: Path) -> None:
    small = {"unet_svd": {"mlp1.0.bias": torch.zeros(64)}, "alpha": torch.zeros(1)}
    torch.save(small, tmp_path / "new.pth")
    torch.save(small, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(small["unet_svd"], tmp_path / "port.safetensors")
    for name in ("new.pth", "old.pth", "port.safetensors"):
        data = (tmp_path / name).read_bytes()
        # Nothing, a piece, all but the end; and what is no such file from the start.
        for broken in (b"", data[:30], data[: len(data) // 2], data[:-3], b"12345678901", b"\x80\x02."):
            (tmp_path / f"broken-{name}").write_bytes(broken)
            with pytest.raises(ValueError, match=f"broken-{name}"):
                dx.NPNetModel.from_original(tmp_path / f"broken-{name}")
    with pytest.raises(OSError, match=r"none\.pth"):
        dx.NPNetModel.from_original(tmp_path / "none.pth")
    with pytest.raises(OSError, match=r"none\.safetensors"):
        dx.NPNetModel.from_original(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("noise", "text", "message"),
    [
        ((1, 4, 8, 16), (1, 77, 6), "works at 16 × 16 latents only, got 8 × 16"),
        ((1, 3, 16, 16), (1, 77, 6), r"noise \(B, 4, H, W\), got \(1, 3, 16, 16\)"),
        ((4, 16, 16), (1, 77, 6), r"noise \(B, 4, H, W\), got \(4, 16, 16\)"),
        ((1, 4, 16, 16), (77, 6), r"\(1, tokens, 6\).*got \(77, 6\)"),
        ((1, 4, 16, 16), (1, 76, 6), "made for 77 tokens, got 76"),
        ((1, 4, 16, 16), (1, 77, 7), "width 6, got 7"),
        ((2, 4, 16, 16), (1, 77, 6), "one row for each of the 2 noises"),
    ],
)
def test_wrong_sizes_are_named(noise: Any, text: Any, message: str) -> None:
    with torch.device("meta"):  # no weights are needed to refuse
        model = dx.NPNetModel(CHANNELS, TEXT, TOKENS, legacy=True, sample_size=SIZE)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(noise), torch.zeros(text))


def test_nearest_is_torchs() -> None:
    x = torch.randn(1, 7, 768)
    assert torch.equal(_nearest(x, 16, 128), F.interpolate(x[None], [16, 128])[0])


@pytest.mark.parametrize(("channels", "size"), [(16, 16), (2, 16), (4, 6)])
def test_sizes_that_do_not_fold_into_a_square(channels: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"{channels} channels of {size} × {size} do not allow it"):
        dx.NPNetModel(channels, TEXT, legacy=True, sample_size=size)


@torch.no_grad()
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting_leaves_the_singular_values_alone(file: Path, storage: torch.dtype) -> None:
    model = dx.NPNetModel.from_original(file, sample_size=SIZE)
    noise, text = inputs()
    exact = model(noise, text).sample
    model.enable_layerwise_casting(storage_dtype=storage)
    assert {p.dtype for p in model.released.unet_svd.parameters()} == {torch.float32}
    assert model.released.text_embedding.linear.weight.dtype == storage
    assert float((model(noise, text).sample - exact).abs().mean()) < 0.05


def test_gradient_checkpointing_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        dx.NPNetModel.from_original(file, sample_size=SIZE).enable_gradient_checkpointing()
