"""What the prompts of a call are encoded to, read and used again on every family that encodes prompts."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_ext.core.families import denoisers_of, guidance_of
from diffusers_ext.core.hooks import parameters_of
from diffusers_ext.core.prompts import (
    PromptEmbeds,
    PromptReader,
    check_encodes,
    embeddings_of,
    encoded_as,
    prompt_embeddings,
    recorded_encodings,
)
from tests import families, tiny

pytestmark = pytest.mark.filterwarnings("ignore")

ENCODES = [
    name
    for name, family in families.FAMILIES.items()
    if family.prompted and not family.modular and name != "ldm"
]
# The first has padding beside the second.
PROMPTS = ["a aaa", "a bbbbbbb"]


def call_of(name: str, guided: bool = True, **changes: Any) -> dict[str, Any]:
    call = families.inputs(name, 2, guided=guided)
    return {**call, "generator": families.generators(2), "prompt": list(PROMPTS), **changes}


def other_arguments(name: str, batch: int = 2) -> dict[str, Any]:
    """What a call without guidance has besides prompts."""
    family = families.FAMILIES[name]
    mine = {"prompt", "output_type", *family.guided, *family.unguided}
    return {k: v for k, v in families.inputs(name, batch, guided=False).items() if k not in mine}


def run(pipe: Any, call: dict[str, Any]) -> Any:
    with torch.no_grad():
        return pipe(**call)


# --- what the network is given ---


def given_to_the_network(pipe: Any, call: dict[str, Any]) -> list[Tensor]:
    """Every (tokens, width) that a denoiser is given in a call."""
    rows: list[Tensor] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            for x in value if isinstance(value, list | tuple) else [value]:
                if isinstance(x, Tensor) and x.is_floating_point() and x.ndim in (2, 3):
                    rows.extend(x.detach().clone().unbind() if x.ndim == 3 else [x.detach().clone()])

    handles = [part.register_forward_pre_hook(note, with_kwargs=True) for part in denoisers_of(pipe)]
    try:
        run(pipe, call)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def has(rows: list[Tensor], embeds: Tensor, mask: Tensor | None) -> bool:
    """Whether the embeddings of one prompt, without padding, are among the rows."""
    own = embeds if mask is None else embeds[mask]
    for row in rows:
        if row.shape[-1] == own.shape[-1] and len(row) >= len(own):
            kept = row if mask is None else row[: len(mask)][mask[: len(row)]]
            if kept.shape == own.shape and torch.equal(kept, own):
                return True
    return False


@pytest.mark.parametrize("name", ENCODES)
@pytest.mark.parametrize("guided", [True, False])
def test_a_reader_has_what_the_network_is_given(name: str, guided: bool) -> None:
    pipe = families.build(name)
    reader = PromptReader(pipe)
    handle = reader.attach()
    call = call_of(name, guided)
    if guided and "negative_prompt" not in call:
        call |= {"negative_prompt": ["z", "z"]} if "negative_prompt" in parameters_of(pipe) else {}
    rows = given_to_the_network(pipe, call)
    handle.remove()
    assert "encode_prompt" not in vars(pipe)
    prompt, negative = reader.prompt, reader.negative
    assert prompt is not None
    assert len(prompt.embeds) == 2
    masks = prompt.mask if prompt.mask is not None else [None, None]
    assert all(has(rows, x, m) for x, m in zip(prompt.embeds, masks))
    assert not torch.equal(prompt.embeds[0], prompt.embeds[1])
    if guidance_of(pipe).weight(call) == 1.0:
        assert reader.arguments["prompt"] == PROMPTS or name == "zimage"  # which changes its own list
        return
    assert negative is not None
    masks = negative.mask if negative.mask is not None else [None] * len(negative.embeds)
    assert all(has(rows, x, m) for x, m in zip(negative.embeds, masks))
    assert not any(has([x], y, None) for x in prompt.embeds for y in negative.embeds)


@pytest.mark.parametrize("name", ENCODES)
def test_the_negative_prompt_is_not_taken_for_the_prompt(name: str) -> None:
    pipe = families.build(name)
    reader = PromptReader(pipe)
    reader.attach()
    run(pipe, call_of(name))
    found, negative = reader.prompt, reader.negative
    run(pipe, {**call_of(name, guided=False)})
    alone = reader.prompt
    assert found is not None
    assert alone is not None
    # Guided, prompts may be padded to the length of the negative ones.
    assert torch.allclose(found.mean(), alone.mean(), atol=1e-6)
    if negative is not None:
        assert not torch.allclose(negative.mean(), found.mean(), atol=1e-3)


def test_a_call_forgets_the_one_before_and_nothing_outside_counts() -> None:
    pipe = tiny.build("sd")
    reader = PromptReader(pipe)
    reader.attach()
    pipe.encode_prompt(["a"], "cpu", 1, True)
    assert reader.prompt is None
    seen = []
    step = lambda *args: seen.append(reader.present) or {}  # noqa: E731
    run(pipe, call_of("sd", callback_on_step_end=step))
    assert all(seen)
    assert not reader.present
    assert reader.negative is not None
    run(pipe, call_of("sd", guided=False, negative_prompt=["z", "z"]))
    assert reader.negative is None  # without guidance, Stable Diffusion does not encode it
    embeds = torch.zeros(2, *pipe.encode_prompt(["a"], "cpu", 1, False)[0].shape[1:])
    run(pipe, call_of("sd", guided=False, prompt=None, prompt_embeds=embeds))
    assert reader.prompt is not None
    assert not reader.prompt.embeds.any()
    reader.forget()
    assert reader.prompt is None


# --- recorded, and used in other calls ---


@pytest.mark.parametrize("name", ENCODES)
def test_recorded_encodings_give_the_same_images_for_any_prompts(name: str) -> None:
    pipe = families.build(name)
    expected = families.images(pipe, name, 2)
    assert not torch.equal(families.images(pipe, name, 2, prompt=["q", "r"]), expected)
    call = {**families.inputs(name, 2), "generator": families.generators(2)}
    with torch.no_grad():
        encodings = recorded_encodings(pipe, call)
    with encoded_as(pipe, encodings):
        for _ in range(2):  # every call starts with the first one
            assert torch.equal(families.images(pipe, name, 2, prompt=["q", "r"]), expected)
    assert "encode_prompt" not in vars(pipe)
    assert torch.equal(families.images(pipe, name, 2), expected)


def test_a_call_that_fails_leaves_the_next_one_alone() -> None:
    pipe = families.build("flux")
    expected = families.images(pipe, "flux", 2)
    encodings = recorded_encodings(pipe, {**families.inputs("flux", 2), "generator": families.generators(2)})
    assert len(encodings) == 2  # the prompt's and the negative prompt's

    def fail(*args: Any) -> Any:
        raise RuntimeError

    with encoded_as(pipe, encodings):
        with pytest.raises(RuntimeError):
            families.images(pipe, "flux", 2, callback_on_step_end=fail)
        assert torch.equal(families.images(pipe, "flux", 2, prompt=["q", "r"]), expected)


def test_pipelines_without_prompts_are_refused() -> None:
    for name in ("ddpm", "ldm", "dit", "modular-flux"):
        with pytest.raises(ValueError, match="has no encode_prompt, so its prompts cannot be read"):
            check_encodes(families.build(name))
    pipe = tiny.build("sd")
    for value, shown in (("text", "str"), (torch.zeros(2, 8), r"\(2, 8\) torch\.float32"), ([], "list")):
        with pytest.raises(
            ValueError, match=f"StableDiffusionPipeline.encode_prompt returns {shown} and not"
        ):
            embeddings_of(pipe, value)
    mask, embeds = torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match="returns 2 embeddings and 1 masks"):
        embeddings_of(pipe, (embeds, embeds, mask))


# --- embeddings of prompts ---


@pytest.mark.parametrize("name", ENCODES)
def test_embeddings_of_a_batch_are_those_of_each_prompt(name: str) -> None:
    pipe = families.build(name)
    together = prompt_embeddings(pipe, PROMPTS, **other_arguments(name))
    alone = [prompt_embeddings(pipe, [text], **other_arguments(name, 1)) for text in PROMPTS]
    # Float32, in batches of another size.
    assert torch.allclose(together.mean(), torch.cat([one.mean() for one in alone]), atol=1e-5)
    for row, one in enumerate(alone):
        count = together.embeds.shape[1] if together.mask is None else int(together.mask[row].sum())
        mine = together.embeds[row] if together.mask is None else together.embeds[row][together.mask[row]]
        theirs = one.embeds[0] if one.mask is None else one.embeds[0][one.mask[0]]
        assert len(theirs) == count
        assert torch.allclose(mine, theirs, atol=1e-5)
    if together.mask is not None:
        assert not together.embeds[~together.mask].any()
        assert together.mask.sum(1).unique().numel() == 2
    assert not torch.allclose(together.mean()[0], together.mean()[1], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("sdxl", "clip_skip", (None, 1)),
        ("sd3", "clip_skip", (None, 1)),
        ("flux", "max_sequence_length", (16, 24)),
        ("sana", "complex_human_instruction", (None, ["b"])),
        ("lumina2", "system_prompt", ("a", "b")),
        ("pixart", "clean_caption", (False,)),
    ],
)
def test_options_of_the_call_reach_the_embeddings(name: str, option: str, values: tuple[Any, ...]) -> None:
    pipe = families.build(name)
    found = []
    for value in values:
        given = {**other_arguments(name), option: value}
        found.append(prompt_embeddings(pipe, PROMPTS, **given))
        call = {**given, "prompt": list(PROMPTS), **guidance_of(pipe).call(1.0)}
        masks = found[-1].mask if found[-1].mask is not None else [None, None]
        rows = given_to_the_network(pipe, call)
        assert all(has(rows, x, m) for x, m in zip(found[-1].embeds, masks))
    assert len({x.embeds.sum().item() for x in found}) == len(values)


def test_averages_leave_padding_out_and_rows_are_repeated() -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    found = PromptEmbeds(x, mask)
    assert torch.equal(found.mean(), torch.stack([x[0, 0], x[1].mean(0)]))
    assert torch.equal(PromptEmbeds(x).mean(), x.mean(1))
    twice = found.repeat_to(4)
    assert torch.equal(twice.embeds, x[[0, 0, 1, 1]])
    assert twice.mask is not None
    assert torch.equal(twice.mask, mask[[0, 0, 1, 1]])
    assert PromptEmbeds(x.half()).mean().dtype == torch.float32
    with pytest.raises(ValueError, match="3 images cannot have 2 prompts"):
        found.repeat_to(3)


# --- copies and threads ---


def reader_of(pipe: Any) -> PromptReader:
    return vars(pipe)["encode_prompt"].hooks[0].__self__


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_reads_its_own_calls(copied: Any, fails: bool) -> None:
    pipe = tiny.build("sd")
    PromptReader(pipe).attach()

    def fail(*args: Any) -> Any:
        raise RuntimeError

    if fails:
        with pytest.raises(RuntimeError):
            run(pipe, call_of("sd", callback_on_step_end=fail))
    else:
        run(pipe, call_of("sd"))
    other = copied(pipe)
    mine, its = reader_of(pipe), reader_of(other)
    assert its is not mine
    assert its.pipe is other
    assert its.prompt is None
    assert not mine.present
    assert mine.prompt is not None
    before = mine.prompt.embeds.clone()
    run(other, call_of("sd", prompt=["q", "r"]))
    assert its.prompt is not None
    assert torch.equal(mine.prompt.embeds, before)
    assert not torch.equal(its.prompt.embeds, before)


def test_two_threads_on_two_pipelines_with_the_same_networks() -> None:
    first = tiny.build("sd")
    pipes = [first, type(first)(**copy.copy(first.components), requires_safety_checker=False)]
    for pipe in pipes:
        pipe.scheduler = copy.deepcopy(first.scheduler)
        # A tokenizer of transformers cannot be used by two threads: it sets its padding on itself at each call and
        # raises "Already borrowed" or pads as the other thread asked.
        pipe.tokenizer = copy.deepcopy(first.tokenizer)
        pipe.set_progress_bar_config(disable=True)
        PromptReader(pipe).attach()
    texts, scales = [["a", "b"], ["c", "d"]], [2.0, 3.0]
    expected = [prompt_embeddings(first, text) for text in texts]
    barrier = threading.Barrier(2)

    def work(i: int) -> list[tuple[Tensor, float]]:
        barrier.wait()
        found = []
        for _ in range(3):
            run(pipes[i], call_of("sd", prompt=texts[i], guidance_scale=scales[i]))
            reader = reader_of(pipes[i])
            assert reader.prompt is not None
            found.append((reader.prompt.embeds, reader.arguments["guidance_scale"]))
        return found

    with ThreadPoolExecutor(2) as threads:
        for i, found in enumerate(threads.map(work, range(2))):
            assert all(torch.allclose(x, expected[i].embeds, atol=1e-6) for x, _ in found)
            assert {scale for _, scale in found} == {scales[i]}
