"""The flow-matching transformer: its training computes what the stock pipeline computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import nn
from torch.nn import functional as F

from diffusers_ext.testbed import base_models, flow_models
from diffusers_ext.testbed.embedded import card_dir

PROMPTS = ["a red bag left of a blue boot", "a green coat"]


@pytest.fixture
def objective() -> flow_models.VelocityObjective:
    torch.manual_seed(0)
    tokenizer = base_models.build_tokenizer()
    transformer = flow_models.build_transformer(num_layers=2)
    # The zeros of the start would hide what attention does.
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    first, second = (flow_models.build_clip(tokenizer, width) for width in flow_models.WIDTHS)
    return flow_models.VelocityObjective(transformer, first, second).eval()


@torch.no_grad()
def test_a_weighted_token_is_as_many_equal_tokens(objective: flow_models.VelocityObjective) -> None:
    ids = base_models.tokenize(base_models.build_tokenizer(), PROMPTS)
    tokens, pooled = objective.encode(ids)
    call: dict[str, Any] = {
        "hidden_states": torch.randn(2, 4, 8, 16),
        "pooled_projections": pooled,
        "timestep": torch.tensor([500.0, 900.0]),
    }
    weighted = objective.transformer(
        **call,
        encoder_hidden_states=F.pad(tokens, (0, 0, 0, 1)),
        joint_attention_kwargs={"log_counts": torch.tensor(flow_models.T5_TOKENS, dtype=torch.float32).log()},
    ).sample
    objective.transformer.set_attn_processor(JointAttnProcessor2_0())  # type: ignore[arg-type]
    stock = [
        objective.transformer(**call, encoder_hidden_states=F.pad(tokens, (0, 0, 0, n))).sample
        for n in flow_models.T5_TOKENS
    ]
    # Sums of 288 float32 terms of order 1, through two blocks.
    torch.testing.assert_close(weighted[0], stock[0][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(weighted[1], stock[1][1], rtol=0, atol=1e-5)
    assert (weighted[0] - stock[1][0]).abs().max() > 1e-3


@torch.no_grad()
def test_the_pipeline_encodes_and_loads_as_trained(
    objective: flow_models.VelocityObjective, tmp_path: Path
) -> None:
    tokenizer = base_models.build_tokenizer()
    vae: Any = AutoencoderKL.from_pretrained(card_dir("fashion-scenes") / "vae")
    flow_models.flow_pipeline(objective, tokenizer, vae).save_pretrained(tmp_path)
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    own, own_pooled = objective.encode(base_models.tokenize(tokenizer, PROMPTS))
    torch.testing.assert_close(tokens[:, : base_models.MAX_TOKENS], own)
    torch.testing.assert_close(pooled, own_pooled)
    assert tokens.shape[1] == base_models.MAX_TOKENS + flow_models.T5_TOKENS[1]
    assert not tokens[:, base_models.MAX_TOKENS :].any()
    images = pipe(PROMPTS, height=32, width=64, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 64, 3)


@torch.no_grad()
def test_the_loss_is_the_squared_error_of_the_velocity() -> None:
    tokenizer = base_models.build_tokenizer()
    clips = [flow_models.build_clip(tokenizer, width) for width in flow_models.WIDTHS]
    # At its start the transformer predicts 0.
    fresh = flow_models.VelocityObjective(flow_models.build_transformer(num_layers=1), *clips)
    x, noise = torch.randn(2, 4, 8, 16), torch.randn(2, 4, 8, 16)
    loss = fresh(x, noise, torch.rand(2), base_models.tokenize(tokenizer, PROMPTS), torch.ones(2))
    torch.testing.assert_close(loss, (noise - x).square().mean())


def test_a_text_encoder_to_start_from() -> None:
    tokenizer = base_models.build_tokenizer()
    start = base_models.build_text_encoder(tokenizer)
    made = flow_models.build_clip(tokenizer, 96, start)
    ids = base_models.tokenize(tokenizer, PROMPTS)
    # The tokens are the output of the last but one of three layers: that of the last of the start's two.
    found = made(ids, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(found, start(ids, output_hidden_states=True).hidden_states[-1])
    with pytest.raises(ValueError, match="to start from has width 96, and 32 is needed"):
        flow_models.build_clip(tokenizer, 32, start)


def test_noise_levels_and_token_counts() -> None:
    draw = torch.Generator().manual_seed(0)
    sigmas = flow_models.draw_sigmas(
        *(f(20_000, generator=draw) for f in (torch.randn, torch.rand, torch.rand))
    )
    assert 0 <= float(sigmas.min()) < float(sigmas.max()) <= 1
    # Half of them uniform; of the logistic of a standard normal .0016 are above .95.
    assert float((sigmas > 0.95).float().mean()) == pytest.approx((0.05 + 0.0016) / 2, abs=0.005)
    counts = flow_models.draw_counts(torch.tensor([0.2, 0.7]))
    assert counts.tolist() == [2, 256]
