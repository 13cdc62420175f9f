import argparse
import itertools
import logging

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffusers_ext.training.arguments import add_training_arguments
from diffusers_ext.training.checkpoints import list_checkpoints, resolve_checkpoint, save_checkpoint
from diffusers_ext.training.loop import make_accelerator, train
from diffusers_ext.training.optimizers import dropped_in_step
from diffusers_ext.training.rows import rows_of_step


def arguments(output_dir, *extra):
    parser = add_training_arguments(argparse.ArgumentParser())
    fixed = ["--output_dir", str(output_dir), "--max_train_steps", "6", "--train_batch_size", "4"]
    return parser.parse_args([*fixed, "--lr_scheduler", "constant", *extra])


class Line(torch.nn.Module):
    """The squared error of a straight line: the smallest objective there is."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return (self.weight * x - 2 * x).square().mean()


class TwoLines(torch.nn.Module):
    """Two lines that share nothing, the second with a gradient a million times the first's."""

    def __init__(self, apart):
        super().__init__()
        self.lines = torch.nn.ModuleList([Line(), Line()])
        if apart:
            self.networks = lambda: list(self.lines)

    def forward(self, x):
        return self.lines[0](x) + 1e6 * self.lines[1](x)


class InTurns(TwoLines):
    """The first line is trained in every third step, the second always, at ten times the rate."""

    def __init__(self):
        super().__init__(True)
        self.steps = 0
        self.rate_factors = lambda: [1.0, 10.0]
        self.moves = lambda step: step % 3 == 2

    def forward(self, x):
        self.steps += 1
        first = self.lines[0](x) if self.moves(self.steps - 1) else 0
        return first + self.lines[1](x)


def run(args, make_batch=lambda rows: {"x": rows.normal(3)}, validate=None):
    accelerator = make_accelerator(args)
    model = Line()
    return model, train(accelerator, args, model, make_batch, validate)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6), step=st.integers(0, 10**6), world=st.integers(1, 4), batch=st.integers(1, 3)
)
def test_rows_of_a_global_batch_do_not_depend_on_the_number_of_processes(seed, step, world, batch):
    def draw(rank, batch):
        rows = rows_of_step(seed, step, rank, batch)
        return [rows.indices(50), rows.normal(2, 3), rows.uniform(1), rows.integers(1000)]

    parts = zip(*(draw(rank, batch) for rank in range(world)))
    for whole, several in zip(draw(0, world * batch), parts):
        assert torch.equal(whole, torch.cat(several))


def test_networks_are_clipped_each_by_itself(tmp_path, monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def record(parameters, *rest, **options):
        parameters = list(parameters)
        norm = clip(parameters, *rest, **options)
        norms.append([float(p.grad.abs()) for p in parameters])
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    for apart in (True, False):
        args = arguments(tmp_path / str(apart), "--max_train_steps", "1")
        train(make_accelerator(args), args, TwoLines(apart), lambda rows: {"x": rows.normal(3)})
    first, second, (small, large) = norms
    # Each has norm 1 by itself (its gradient was above); together the small one is nothing.
    assert first == pytest.approx([1], rel=1e-4)
    assert second == pytest.approx([1], rel=1e-4)
    assert large == pytest.approx(1, rel=1e-4)
    assert small < 1e-5


def test_the_average_is_of_the_first_network_and_counts_its_steps(tmp_path):
    falling = ["--lr_scheduler", "cosine", "--lr_warmup_steps", "0", "--learning_rate", "1e-2"]
    args = arguments(tmp_path, "--use_ema", "--max_train_steps", "7", *falling)
    model, twin = InTurns(), InTurns()
    start = twin.lines[1].weight.item()
    train(make_accelerator(args), args, model, lambda rows: {"x": rows.normal(3)})
    first, second = twin.lines
    optimizers = [torch.optim.AdamW(line.parameters(), lr) for line, lr in ((first, 1e-2), (second, 1e-1))]
    schedules = [get_scheduler("cosine", o, num_warmup_steps=0, num_training_steps=7) for o in optimizers]
    ema = EMAModel(first.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    for step in range(7):
        twin(rows_of_step(0, step, 0, 4).normal(3)).backward()
        for line, optimizer, schedule in zip(twin.lines, optimizers, schedules):
            torch.nn.utils.clip_grad_norm_(line.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if twin.moves(step):
            ema.step(first.parameters())
    assert model.lines[0].weight.item() == pytest.approx(float(ema.shadow_params[0]), rel=1e-6)
    assert model.lines[0].weight.item() != pytest.approx(first.weight.item(), rel=1e-6)
    assert model.lines[1].weight.item() == pytest.approx(second.weight.item(), rel=1e-6)
    assert abs(second.weight.item() - start) > 0.1


def test_steps_and_seeds_draw_different_rows():
    draws = [rows_of_step(seed, step, 0, 8).normal(4) for seed, step in [(0, 0), (0, 1), (1, 0)]]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.fixture
def folder(tmp_path):
    for name in (
        "checkpoint-9",
        "checkpoint-10",
        "partial-checkpoint-11",
        "checkpoint-12-copy",
        "checkpoint-x",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-13").write_text("a file is no checkpoint")
    return tmp_path


def test_only_whole_checkpoints_are_listed_in_the_order_of_steps(folder):
    assert [p.name for p in list_checkpoints(folder)] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize(
    ("wanted", "name"),
    [("latest", "checkpoint-10"), ("checkpoint-9", "checkpoint-9"), ("path", "checkpoint-9")],
)
def test_a_checkpoint_is_named_by_latest_name_or_path(folder, wanted, name):
    wanted = str(folder / "checkpoint-9") if wanted == "path" else wanted
    args = arguments(folder, "--resume_from_checkpoint", wanted)
    found = resolve_checkpoint(args)
    assert found[0] == folder / name
    assert [p.name for p in found[1:]] == (["checkpoint-9"] if wanted == "latest" else [])


@pytest.mark.parametrize("wanted", ["checkpoint-8", "partial-checkpoint-11", "checkpoint-13", ".", ""])
def test_what_is_no_whole_checkpoint_is_refused(folder, wanted):
    args = arguments(folder, "--resume_from_checkpoint", wanted)
    with pytest.raises(ValueError, match=r"not a complete checkpoint.*: checkpoint-9, checkpoint-10\."):
        resolve_checkpoint(args)


def test_a_fresh_run_does_not_mix_with_an_earlier_one(folder):
    with pytest.raises(ValueError, match="holds checkpoint-10 of an earlier run"):
        resolve_checkpoint(arguments(folder))


def test_latest_without_a_checkpoint_starts_afresh_and_says_so(tmp_path, caplog):
    args = arguments(tmp_path, "--resume_from_checkpoint", "latest")
    assert not resolve_checkpoint(args)
    with caplog.at_level(logging.INFO):
        run(args)
    assert "starting from scratch" in caplog.text


@pytest.mark.parametrize(("limit", "kept"), [("1", [6]), ("2", [4, 6]), ("0", [2, 4, 6])])
def test_the_limit_keeps_the_newest_checkpoints(tmp_path, limit, kept):
    run(arguments(tmp_path, "--checkpointing_steps", "2", "--checkpoints_total_limit", limit))
    assert [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path)] == kept
    assert not list(tmp_path.glob("partial-*"))


def test_a_half_written_checkpoint_is_cleared_away(tmp_path):
    (tmp_path / "partial-checkpoint-2").mkdir()
    (tmp_path / "partial-checkpoint-2" / "stale.bin").write_text("stale")
    accelerator = make_accelerator(arguments(tmp_path))
    save_checkpoint(accelerator, tmp_path, 2, limit=None)
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert not (tmp_path / "checkpoint-2" / "stale.bin").exists()


@pytest.mark.parametrize("extra", [(), ("--use_ema",), ("--gradient_accumulation_steps", "2")])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, extra):
    whole, record = run(arguments(tmp_path / "a", *extra))
    args = arguments(tmp_path / "b", "--checkpointing_steps", "4", *extra)

    def fails_after_the_checkpoint(rows):
        if list_checkpoints(args.output_dir):
            raise InterruptedError
        return {"x": rows.normal(3)}

    with pytest.raises(InterruptedError):
        run(args, fails_after_the_checkpoint)
    args.resume_from_checkpoint = "latest"
    resumed, again = run(args)
    assert torch.equal(whole.weight, resumed.weight)
    assert record["loss"] == again["loss"]
    assert record["steps"] == again["steps"] == 6
    finished, _ = run(args)  # nothing is left to do, and the checkpoint is still there
    assert torch.equal(whole.weight, finished.weight)


def whole_run(folder, *extra):
    """A run of 6 steps with checkpoints 2, 4 and 6."""
    args = arguments(folder, "--checkpointing_steps", "2", "--checkpoints_total_limit", "0", *extra)
    return args, run(args)[0]


def resumed(args, checkpoint, **changes):
    return argparse.Namespace(**{**vars(args), "resume_from_checkpoint": checkpoint, **changes})


def test_going_back_starts_a_new_branch_and_keeps_the_old_one(tmp_path, caplog):
    args, model = whole_run(tmp_path)
    seen = []

    def killed_at_step_5(rows):
        seen.append(rows.step)
        if rows.step == 4:
            raise InterruptedError
        return {"x": 0.5 * rows.normal(3)}  # the new branch has other data than the old one

    back = resumed(args, "checkpoint-2", checkpoints_total_limit=1)
    with pytest.raises(InterruptedError):
        run(back, killed_at_step_5)
    assert seen == [2, 3, 4]
    assert (
        "checkpoint-4, checkpoint-6 do not belong to the run that continues from checkpoint-2" in caplog.text
    )
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-4"]
    old = [p.name for p in list_checkpoints(tmp_path / "set-aside-1")]
    assert old == ["checkpoint-4", "checkpoint-6"]
    # `latest` is the new branch, and its end is not that of the old one.
    new, _ = run(resumed(back, "latest"))
    assert not torch.equal(new.weight, model.weight)
    again, _ = run(resumed(args, str(tmp_path / "set-aside-1" / "checkpoint-6")))
    assert torch.equal(again.weight, model.weight)
    assert [p.name for p in list_checkpoints(tmp_path / "set-aside-2")] == ["checkpoint-6"]


def empty(checkpoint):
    for path in checkpoint.iterdir():
        path.unlink()


def cut(checkpoint):
    path = checkpoint / "optimizer.bin"
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(checkpoint):
    path = checkpoint / "trained.safetensors"
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [empty, cut, overwrite])
def test_latest_goes_back_to_the_newest_checkpoint_that_is_whole(tmp_path, damage, caplog):
    args, model = whole_run(tmp_path)
    damage(tmp_path / "checkpoint-6")
    steps = []
    again, _ = run(resumed(args, "latest"), lambda rows: steps.append(rows.step) or {"x": rows.normal(3)})
    assert steps == [4, 5]
    assert torch.equal(again.weight, model.weight)
    assert "checkpoint-6" in caplog.text
    assert "going back to checkpoint-4" in caplog.text
    assert [p.name for p in list_checkpoints(tmp_path / "set-aside-1")] == ["checkpoint-6"]
    damage(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match=r"checkpoint-6 .*there is no checkpoint to resume from"):
        run(resumed(args, "checkpoint-6"))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    args, _ = whole_run(tmp_path / "one")
    whole_run(tmp_path / "other", "--seed", "1", "--adam_weight_decay", "0.5")
    for wanted in ("latest", str(tmp_path / "other" / "checkpoint-4")):
        folder = tmp_path / ("other" if wanted == "latest" else "new")
        with pytest.raises(
            ValueError,
            match=r"adam_weight_decay: 0\.5 there, 0\.01 now; arguments\.seed: 1 there, 0 now\): resume it with its own",
        ):
            run(resumed(args, wanted, output_dir=str(folder)))
    assert len(list_checkpoints(tmp_path / "other")) == 3
    # A folder of one's own may be continued elsewhere.
    run(resumed(args, str(tmp_path / "one" / "checkpoint-4"), output_dir=str(tmp_path / "new")))
    assert [p.name for p in list_checkpoints(tmp_path / "new")] == ["checkpoint-6"]


def test_changes_of_free_arguments_are_recorded(tmp_path):
    args, _ = whole_run(tmp_path)
    longer = resumed(args, "latest", max_train_steps=8)
    _, record = run(longer)
    assert record["images"] == 8 * 4
    assert record["resumptions"] == [{"step": 6, "max_train_steps": "6 → 8"}]
    _, record = run(resumed(longer, "latest", max_train_steps=9, checkpointing_steps=3))
    assert record["resumptions"] == [
        {"step": 6, "max_train_steps": "6 → 8"},
        {"step": 8, "checkpointing_steps": "2 → 3", "max_train_steps": "8 → 9"},
    ]
    with pytest.raises(ValueError, match="more steps than --max_train_steps 5: give at least 9"):
        run(resumed(longer, "latest", max_train_steps=5))


@pytest.mark.parametrize("checkpointing_steps", ["2", "500"])
def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(tmp_path, checkpointing_steps):
    args = arguments(tmp_path, "--checkpointing_steps", checkpointing_steps)
    with pytest.raises(ValueError, match=r"loss is nan at step [26]: lower --learning_rate"):
        run(args, lambda rows: {"x": rows.normal(3) * float("nan")})
    assert not list_checkpoints(tmp_path)


def test_ema_weights_are_validated_and_left_in_the_model(tmp_path):
    seen = {}

    def validate(model, step):
        seen[step] = model.weight.item()
        return {"weight": model.weight.item()}

    args = arguments(tmp_path, "--use_ema", "--validation_steps", "3")
    model, record = run(args, validate=validate)
    line = Line()
    optimizer = torch.optim.AdamW(line.parameters(), lr=1e-3, weight_decay=1e-2)
    ema = EMAModel(line.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    expected = {}
    for step in range(6):
        line(rows_of_step(0, step, 0, 4).normal(3)).backward()
        torch.nn.utils.clip_grad_norm_(line.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(line.parameters())
        expected[step + 1] = float(ema.shadow_params[0])
    # One rounding of float32 at 0.005.
    assert seen == pytest.approx({3: expected[3], 6: expected[6]}, abs=1e-9)
    assert record["weight"] == model.weight.item() == seen[6]
    raw = load_file(tmp_path / "checkpoint-6" / "trained.safetensors")["weight"]
    assert float(raw) == pytest.approx(line.weight.item(), abs=1e-9)
    assert float(raw) != model.weight.item()


def test_the_record_counts_images_over_accumulation(tmp_path):
    _, record = run(arguments(tmp_path, "--gradient_accumulation_steps", "3"))
    assert record["images"] == 6 * 3 * 4
    assert "1 process" in record["hardware"]


class Blocks(torch.nn.Module):
    """Three layers, of which each is a block, that note in every forward pass whether they are trained."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(3)])
        self.seen = []

    def forward(self, x):
        self.seen.append([block.weight.requires_grad for block in self.blocks])
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def test_drop_muon_drops_the_same_layers_in_all_rows_of_a_step(tmp_path):
    args = arguments(tmp_path, "--optimizer", "drop_muon", "--gradient_accumulation_steps", "2", "--use_ema")
    model = Blocks()
    train(make_accelerator(args), args, model, lambda rows: {"x": rows.normal(3)})
    assert model.seen[::2] == model.seen[1::2]
    expected = [len(dropped_in_step([[[0], [1], [2]]], 0, step)) for step in range(6)]
    assert [step.index(True) for step in model.seen[::2]] == expected
    assert len(set(expected)) > 1
    assert all(p.requires_grad for p in model.parameters())


def test_what_drop_muon_drops_keeps_its_weights_its_momentum_and_its_average(tmp_path):
    """A checkpoint after every step; also the moments of AdamW, which trains the biases."""
    args = arguments(
        tmp_path,
        *("--optimizer", "drop_muon", "--checkpointing_steps", "1", "--checkpoints_total_limit", "0"),
    )
    train(make_accelerator(args), args, Blocks(), lambda rows: {"x": rows.normal(3)})
    states = []
    for folder in list_checkpoints(tmp_path):
        inner = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
        weights = load_file(folder / "trained.safetensors")
        states.append(
            [
                [
                    weights[f"blocks.{k}.weight"],
                    weights[f"blocks.{k}.bias"],
                    inner["muon"][k],
                    *(inner["adamw"]["state"].get(k, {}).get(name) for name in MOMENTS),
                ]
                for k in range(3)
            ]
        )
    for step, (before, after) in enumerate(itertools.pairwise(states), 1):
        first = len(dropped_in_step([[[0], [1], [2]]], 0, step))
        for k in range(3):
            kept = [
                a is b is None or (b is not None and torch.equal(a, b)) for a, b in zip(after[k], before[k])
            ]
            assert all(kept) if k < first else not any(kept), (step, k)


MOMENTS = ("exp_avg", "exp_avg_sq", "step")
