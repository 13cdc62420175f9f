import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from diffusers_ext.core.autoencoders import encode_pixels
from diffusers_ext.core.images import as_tensor
from diffusers_ext.testbed import base_models
from diffusers_ext.testbed import fashion_scenes as fs


@pytest.fixture(scope="module")
def tokenizer():
    return base_models.build_tokenizer()


WORDS = sorted({w for name in (*fs.ITEMS, *fs.COLORS, "left", "of", "a") for w in name.split("-")})


@pytest.mark.parametrize("word", WORDS)
def test_every_word_is_one_token(tokenizer, word):
    assert len(tokenizer.tokenize(word)) == 1


def test_a_caption_survives_tokenizing_and_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    captions = [fs.caption(s) for s in fs.scenes("test")[:40]]
    ids = base_models.tokenize(tokenizer, captions)
    assert ids.shape == (40, base_models.MAX_TOKENS)
    assert (ids[:, -1] == tokenizer.eos_token_id).all()  # nothing was cut off
    assert len(torch.unique(ids, dim=0)) == 40
    assert torch.equal(ids, base_models.tokenize(loaded, captions))
    decoded = loaded.decode(ids[0], skip_special_tokens=True)
    assert decoded.replace(" ", "") == captions[0].replace(" ", "")


def test_standardised_latents_and_the_same_reconstructions():
    torch.manual_seed(0)
    vae = base_models.build_vae((8, 8, 8)).eval()
    pictures = as_tensor(fs.scene_arrays(fs.SAMPLE_DIR, "train", 40, seed=0)[0]) * 2 - 1

    @torch.no_grad()
    def statistics():
        posterior = vae.encode(pictures).latent_dist
        return vae.decode(posterior.mode()).sample, vae.decode(posterior.mean + posterior.std).sample

    before = statistics()
    base_models.standardise_latents(vae, pictures, batch_size=16)
    # Float32 rounding: the map is folded into the weights instead of applied.
    for a, b in zip(before, statistics()):
        assert torch.allclose(a, b, atol=1e-5)
    with torch.no_grad():
        latents = encode_pixels(vae, pictures)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4)


def test_an_autoencoder_without_latent_layers_is_refused():
    vae = AutoencoderKL(
        norm_num_groups=8, block_out_channels=(8,), use_quant_conv=False, use_post_quant_conv=False
    )
    with pytest.raises(ValueError, match="no 1 × 1 latent layers"):
        base_models.standardise_latents(vae, torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_noise_objective_equals_the_plain_formula(snr_gamma):
    torch.manual_seed(0)
    unet = base_models.build_pixel_unet((8, 8, 16)).eval()
    scheduler = base_models.stable_diffusion_scheduler()
    objective = base_models.NoiseObjective(unet, scheduler, snr_gamma=snr_gamma)
    x, noise = torch.randn(2, 3, 1, 32, 32)
    timesteps = torch.tensor([10, 400, 900])
    a = scheduler.alphas_cumprod[timesteps].view(3, 1, 1, 1)
    with torch.no_grad():
        loss = objective(x, noise, timesteps)
        error = (
            (unet(a.sqrt() * x + (1 - a).sqrt() * noise, timesteps).sample - noise).square().mean((1, 2, 3))
        )
    snr = (a / (1 - a)).flatten()
    weight = torch.ones(3) if snr_gamma is None else torch.minimum(snr, torch.tensor(snr_gamma)) / snr
    assert torch.allclose(loss, (weight * error).mean(), rtol=1e-5)


def test_noise_objective_trains_unet_and_text_encoder(tokenizer):
    torch.manual_seed(0)
    unet, text_encoder = base_models.build_unet((32, 32, 32)), base_models.build_text_encoder(tokenizer)
    objective = base_models.NoiseObjective(unet, base_models.stable_diffusion_scheduler(), text_encoder)
    ids = base_models.tokenize(tokenizer, ["a red bag", "a blue boot"])
    objective(torch.randn(2, 4, 8, 16), torch.randn(2, 4, 8, 16), torch.tensor([5, 500]), ids).backward()
    assert all(p.grad is not None for p in objective.parameters())
    total = sum(p.numel() for p in objective.parameters())
    assert base_models.count_parameters(unet, text_encoder) == total


def test_vae_objective_adds_colour_and_kl_to_the_errors():
    torch.manual_seed(0)
    vae = base_models.build_vae((8, 8, 8))
    pictures, noise = torch.rand(2, 3, 32, 64) * 2 - 1, torch.randn(2, 4, 8, 16)
    with torch.no_grad():
        plain = base_models.VaeObjective(vae, kl_weight=0, color_weight=0)(pictures, noise)
        more = base_models.VaeObjective(vae)(pictures, noise)
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    error = decoded - pictures
    assert torch.allclose(plain, error.abs().mean() + error.square().mean(), rtol=1e-5)
    assert more > plain
