"""The losses of pruned flows against their formulas, and the training of intervals from the teacher's own states."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import diffusers_ext as dx
from diffusers_ext.asdm.block_scores import similarity
from diffusers_ext.asdm.distill import DistillWeights
from diffusers_ext.asdm.flow_distill import FlowDistillObjective, IntervalObjective, pooled_loss, token_loss
from diffusers_ext.asdm.networks import network_config
from diffusers_ext.asdm.prune import teacher_blocks
from diffusers_ext.asdm.streams import ports_of
from diffusers_ext.asdm.transformers import LISTS
from diffusers_ext.training.transformers import encode_captions, flow_of, without_padding
from tests import families
from tests.asdm.transformers import deep

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def made(name: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """A deep teacher, how it is called, and a batch."""
    pipe = deep(name)
    flow = flow_of(pipe)
    draw = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, *families.FAMILIES[name].latents, generator=draw)
    texts = encode_captions(pipe, ["a red bag", "a boot"], max_sequence_length=16)
    return (
        pipe.transformer,
        flow,
        {"latents": latents, "noise": noise, "sigmas": torch.tensor([0.3, 0.8]), **texts},
    )


def student_of(teacher: Any, *cuts: str) -> tuple[Any, dx.PruningPlan]:
    plan = dx.PruningPlan(network_config(teacher), (cuts,))
    return dx.prune_network(teacher, plan), plan


def objective(teacher: Any, flow: Any, *cuts: str, **options: Any) -> FlowDistillObjective:
    student, plan = student_of(teacher, *cuts)
    return FlowDistillObjective(student, teacher, flow, teacher_blocks(plan), guidance=3.5, **options)


def first_list(teacher: Any) -> str:
    return next(iter(LISTS[type(teacher).__name__]))


def test_token_loss_is_the_distance_of_the_directions() -> None:
    image, text = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 0.0]]])
    other = torch.tensor([[[4.0, 3.0], [0.0, 50.0]]]), torch.tensor([[[0.0, 1.0]]])
    # Directions (.6, .8) and (.8, .6), then equal ones; in the text a right angle.
    assert float(token_loss((image, text), other)) == pytest.approx((0.08 / 2 + 2.0) / 2)
    assert float(token_loss((image, None), other)) == pytest.approx(0.04)
    assert float(token_loss((1e4 * image.half(), None), (other[0].half(), None))) == pytest.approx(
        0.04, abs=1e-3
    )
    # The second token of the image does not count.
    first = torch.tensor([[True, False]])
    assert float(token_loss((image, text), other, (first, None))) == pytest.approx((0.08 + 2.0) / 2)
    with pytest.raises(
        ValueError, match=r"student have the shape \(1, 2, 2\), those of the teacher \(1, 1, 2\)"
    ):
        token_loss((image, None), (text, None))


def test_pooled_loss_does_not_depend_on_the_order_of_the_tokens() -> None:
    states = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert float(pooled_loss(states, states.flip(1))) == pytest.approx(0, abs=1e-6)
    assert float(pooled_loss(states, -states)) == pytest.approx(2)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    padded = torch.where(mask[..., None], states, 9.0)
    assert float(pooled_loss(states, padded, mask)) == pytest.approx(0, abs=1e-6)
    assert float(pooled_loss(states, padded)) > 0.1


@pytest.mark.parametrize("name", families.TRANSFORMERS)
def test_a_student_with_all_blocks_differs_from_the_data_alone(name: str) -> None:
    teacher, flow, batch = made(name)
    found = objective(teacher, flow).losses(**batch)
    assert {key: float(value.detach()) for key, value in found.items() if key != "task"} == pytest.approx(
        {"output": 0, "feature": 0, "semantic": 0}, abs=1e-6
    )
    noisy = torch.lerp(batch["latents"], batch["noise"], batch["sigmas"][:, None, None, None])
    texts = {key: value for key, value in batch.items() if key.startswith(("prompt", "pooled"))}
    with torch.no_grad():
        velocity = flow.velocity(teacher, noisy, batch["sigmas"], 3.5, **texts)
    wanted = (velocity - (batch["noise"] - batch["latents"])).square().mean()
    assert float(found["task"].detach()) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", families.TRANSFORMERS)
def test_the_target_of_a_block_is_the_output_of_its_interval(name: str) -> None:
    teacher, flow, batch = made(name)
    blocks = first_list(teacher)
    given = objective(teacher, flow, f"block:{blocks}.2", weights=DistillWeights(0, 0, 1, 0))
    before = given.losses(**batch)
    assert set(before) == {"feature"}
    # A student whose block 1 does what the teacher's blocks 1 and 2 do has no loss.
    own = getattr(given.student, blocks)
    pair = _Both(getattr(teacher, blocks)[1], getattr(teacher, blocks)[2])
    own[1].forward = pair
    after = given.losses(**batch)["feature"]
    # Rounding of directions of float32, 1e-7, squared.
    assert abs(float(after.detach())) < 1e-6 * float(before["feature"].detach())


class _Both:
    """Two blocks, one after the other, called as one."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        self.one, self.other = one, other

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ports = ports_of(self.one)
        image, text = ports.leaving(self.one(*args, **kwargs))
        named = {**dict(zip(ports.names, args)), **kwargs, ports.names[0]: image}
        return self.other(**(named if text is None else {**named, "encoder_hidden_states": text}))


@pytest.mark.parametrize("name", families.TRANSFORMERS)
def test_sharded_blocks_have_the_ports_of_their_class(name: str) -> None:
    teacher, _, _ = made(name)
    for path in LISTS[type(teacher).__name__]:
        block = teacher.get_submodule(path)[0]
        shard = copy.copy(block)
        shard.__class__ = type("FSDP", (FSDPModule, type(block)), {})  # as `fully_shard` does
        assert ports_of(shard) == ports_of(block)


def test_only_what_is_weighted_is_computed() -> None:
    teacher, flow, batch = made("sd3")
    given = objective(teacher, flow, "block:transformer_blocks.2", weights=DistillWeights(1, 0, 0, 0))
    calls: list[Any] = []
    handle = teacher.register_forward_hook(lambda *given: calls.append(given))
    assert set(given.losses(**batch)) == {"task"}
    handle.remove()
    assert not calls
    whole = objective(teacher, flow, "block:transformer_blocks.2", weights=DistillWeights(1, 2, 3, 0.5))
    found = whole.losses(**batch)
    weighted = found["task"] + 2 * found["output"] + 3 * found["feature"] + 0.5 * found["semantic"]
    torch.testing.assert_close(whole(**batch), weighted)
    assert whole.semantic_block == "transformer_blocks.1"


@pytest.mark.parametrize("name", ["qwen", "zimage", "sana", "lumina2"])
@torch.no_grad()
def test_a_row_has_the_loss_that_it_has_alone_whatever_the_captions_of_the_others(name: str) -> None:
    teacher, flow, batch = made(name)
    blocks = first_list(teacher)
    # Z-Image pads to multiples of 32 tokens.
    mask = torch.arange(50) < torch.tensor([[5], [50]])
    width = batch["prompt_embeds"].shape[-1]
    embeds = torch.randn(2, 50, width, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    batch = {**batch, "prompt_embeds": embeds, "prompt_mask": mask}
    student, plan = student_of(teacher, f"block:{blocks}.2")
    given = [
        FlowDistillObjective(student, teacher, flow, teacher_blocks(plan), guidance=3.5),
        IntervalObjective(copy.deepcopy(student), teacher, flow, plan.shape().intervals(), guidance=3.5),
    ]
    for one in given:
        both = one.losses(**without_padding(batch))
        rows = [
            one.losses(**without_padding({key: value[i : i + 1] for key, value in batch.items()}))
            for i in range(2)
        ]
        for key, value in both.items():
            # Products of one row and of two are summed in another order.
            torch.testing.assert_close(value, (rows[0][key] + rows[1][key]) / 2, rtol=1e-4, atol=1e-6)


def test_similarity_does_not_count_padding() -> None:
    teacher, flow, batch = made("qwen")
    calls: list[Any] = []
    handle = teacher.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    for padding in (0, 8):
        embeds, mask = batch["prompt_embeds"][:1], batch["prompt_mask"][:1]
        texts = {
            "prompt_embeds": nn.functional.pad(embeds, (0, 0, 0, padding)),
            "prompt_mask": nn.functional.pad(mask, (0, padding)),
        }
        flow.velocity(teacher, batch["latents"][:1], batch["sigmas"][:1], **texts)
    handle.remove()
    short, long = (similarity(teacher, [call]) for call in calls)
    assert short == pytest.approx(long, rel=1e-4)


@pytest.mark.parametrize("name", families.TRANSFORMERS)
def test_a_block_learns_its_interval_from_the_teachers_own_states(name: str) -> None:
    teacher, flow, batch = made(name)
    blocks = first_list(teacher)
    # The last block too, which is another kind of block in Stable Diffusion 3.
    student, plan = student_of(teacher, f"block:{blocks}.1", f"block:{blocks}.3")
    given = IntervalObjective(student, teacher, flow, plan.shape().intervals(), guidance=3.5)
    assert set(given.intervals) == {f"{blocks}.0", f"{blocks}.1"}
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert trained == {
        n for n, _ in student.named_parameters() if n.startswith((f"{blocks}.0.", f"{blocks}.1."))
    }
    first = given.losses(**batch)
    # The second block gets what enters the teacher's block 2, whatever the student's first block does.
    with torch.no_grad():
        for value in student.get_submodule(f"{blocks}.0").parameters():
            value.add_(0.1)
    second = given.losses(**batch)
    assert torch.equal(second[f"{blocks}.1"], first[f"{blocks}.1"])
    assert not torch.equal(second[f"{blocks}.0"], first[f"{blocks}.0"])
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        loss = given(**batch)
        loss.backward()
        optimizer.step()
    assert float(given(**batch).detach()) < 0.9 * float(sum(second.values()).detach()) / 2
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_wrong_students_are_refused() -> None:
    teacher, flow, _ = made("sd3")
    with pytest.raises(ValueError, match="Student and teacher are the same object"):
        FlowDistillObjective(teacher, teacher, flow, {})
    student, plan = student_of(teacher)
    with pytest.raises(ValueError, match="has all blocks of the teacher, so no block stands for others"):
        IntervalObjective(student, teacher, flow, plan.shape().intervals())
