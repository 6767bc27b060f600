"""Frozen is frozen; what trains, trains; the loss is what the analysis says at the start and falls
on one batch."""
import argparse
import copy
import dataclasses
import json
import math
import random
import shutil
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from engine import data
from engine.log import plot_curves, smooth
from engine.pictures import to_pixels
from engine.state import Guard, checkpoints
from engine.stream import first_examples
from lab import pretrain
from ladder import Ladder
from sample import TOY_FOLDER
from tbac import TBAC, flow_matching
from tests.conftest import TINY, relative, run
from toy import language, world

LADDER_STAGES = ("t2i", "edit", "mix")


def pixels(n, g):
    return torch.rand(n, 3, 32, 32, generator=g) * 2 - 1


def test_frozen_parts_stay_bit_identical_and_the_others_move(tiny):
    g = torch.Generator().manual_seed(0)
    before = {n: t.clone() for n, t in tiny.state_dict().items()}
    optimizer = torch.optim.AdamW(tiny.trainable(), lr=1e-3, weight_decay=0.1)
    for _ in range(20):
        x0 = tiny.dcae.encode(pixels(2, g))
        losses = tiny.loss(x0, ["a red circle", "two blue squares"], generator=g)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, t in tiny.state_dict().items():
        assert torch.equal(t, before[name]) == name.startswith(("mllm.", "dcae.")), name
    frozen = [p for n, p in tiny.named_parameters() if n.startswith(("mllm.", "dcae."))]
    assert all(p.grad is None for p in frozen)
    learns = {id(p) for p in tiny.parameters() if p.requires_grad}
    assert {id(p) for p in tiny.trainable()} == learns


def test_first_loss_is_the_power_of_the_target(tiny):
    """An untrained DiT says 0, so the loss is the mean square of eps - x0."""
    tiny.dit.init_weights()
    tiny.ladder.init_weights()
    g = torch.Generator().manual_seed(0)
    x0 = tiny.dcae.encode(pixels(2, g))
    eps = torch.randn(2, 4, 8, 8, generator=g)
    want = (eps - x0).pow(2).mean((1, 2, 3))
    assert torch.allclose(tiny.loss(x0, ["a", "b"], eps=eps, generator=g), want)


def test_time_runs_from_data_to_noise(tiny):
    """The box in tbac.py: x_t = (1 - t) x0 + t eps, target eps - x0, the network fed 1000 t."""
    g, seen = torch.Generator().manual_seed(0), []
    x0, eps = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    t = torch.tensor([0.25, 1.0])
    tiny.dit.forward = lambda x, timestep, kv: seen.append((x, timestep)) or torch.zeros_like(x)
    losses = tiny.loss(x0, ["a", "b"], t=t, eps=eps)
    (x_t, timestep), = seen
    assert torch.equal(timestep, torch.tensor([250.0, 1000.0]))
    assert torch.allclose(x_t[0], 0.75 * x0[0] + 0.25 * eps[0]) and torch.equal(x_t[1], eps[1])
    assert torch.allclose(losses, (eps - x0).pow(2).mean((1, 2, 3)))
    assert torch.equal(flow_matching(x0, t, eps)[0], x_t)


def test_times_are_uniform_and_never_0(tiny, monkeypatch):
    t, eps = data.times_and_noise([random.Random(i) for i in range(2000)], (4,), "cpu")
    assert torch.allclose(t.sort()[0], torch.arange(1, 2001) / 2000, atol=0.05)
    assert abs(eps.std() - 1) < 0.05 and abs(eps.mean()) < 0.05
    least = types.SimpleNamespace(random=lambda: 0.0, getrandbits=lambda n: 0)
    assert data.times_and_noise([least], (1,), "cpu")[0] == 1
    seen = []
    tiny.dit.forward = lambda x, timestep, kv: seen.append(timestep) or torch.zeros_like(x)
    for drawn, fed in ((0.0, 1000.0), (0.25, 750.0)):
        monkeypatch.setattr(torch, "rand", lambda n, x=drawn, **_: torch.full((n,), x))
        tiny.loss(torch.zeros(1, 4, 8, 8), ["a"], eps=torch.zeros(1, 4, 8, 8))
        assert seen.pop().item() == fed


def test_a_pass_drops_conditions_and_shifts_times():
    example = data.Example("x", (), Image.new("RGB", (8, 8)))
    args, seen = argparse.Namespace(cond_drop=0.3, shift=3.0, device="cpu"), []
    model = types.SimpleNamespace(loss=lambda *given: seen.extend(given) or torch.zeros(40))
    rows = [(example, random.Random(i)) for i in range(40)]
    x0 = torch.zeros(40, 4, 8, 8)
    _, times = train.ladder_loss(model, lambda model, examples: x0, rows, args)
    rngs = [random.Random(i) for i in range(40)]
    prompts = [train.drop_condition(example, rng, 0.3)[0] for rng in rngs]
    t, eps = data.times_and_noise(rngs, (4, 8, 8), "cpu")
    given_x0, given_prompts, _, given_t, given_eps = seen
    assert given_x0 is x0 and given_prompts == prompts and 3 < prompts.count("") < 24
    assert torch.equal(given_eps, eps) and given_t is times
    assert torch.allclose(times, 3 * t / (1 + 2 * t))


@pytest.mark.slow
def test_one_batch_can_be_learnt_by_heart(tiny):
    g = torch.Generator().manual_seed(0)
    x0 = tiny.dcae.encode(pixels(4, g))
    eps = torch.randn(4, 4, 8, 8, generator=g)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    tiny.dit.init_weights(g)
    tiny.ladder.init_weights(g)
    optimizer, losses = torch.optim.AdamW(tiny.trainable(), lr=3e-3), []
    for _ in range(150):
        loss = tiny.loss(x0, ["red", "green", "blue", "yellow"], t=t, eps=eps).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def start(tmp_path, *args, stage="t2i", batch=2):
    """A run on the toy, in float32 unless told otherwise, not yet stepped."""
    length = () if "--epochs" in args else ("--steps", 3)
    words = ("--stage", stage, "--out", tmp_path, "--model", TOY_FOLDER, "--batch", batch,
             "--warmup", 1, *length, "--dtype", "float32", *args)
    words = [str(word) for word in words]
    if stage in LADDER_STAGES:
        return train.Run(train.options(words))
    return train.Run(pretrain.options(words), pretrain.TASKS[stage])


LEARNS = {stage: task.learns for stage, task in pretrain.TASKS.items()}
LEARNS |= dict.fromkeys(LADDER_STAGES, train.LADDER_TASK.learns)


@pytest.mark.slow
@pytest.mark.parametrize("stage", LEARNS)
def test_every_stage_runs_and_saves_a_model(stage, tmp_path):
    script = ("train.py",) if stage in LADDER_STAGES else ("-m", "lab.pretrain")
    done = run(*script, "--stage", stage, "--model", TOY_FOLDER, "--steps", 3, "--batch", 2,
               "--warmup", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "sheet-00000003.png").stat().st_size > 1000
    model, old = TBAC.load(tmp_path), TBAC.load(TOY_FOLDER).state_dict()
    moved = [n for n, t in model.state_dict().items() if not torch.equal(t, old[n])]
    for part in LEARNS[stage]:
        assert any(n.startswith(f"{part}.") for n in moved)
    assert all(n.startswith(tuple(f"{part}." for part in LEARNS[stage])) for n in moved)


@pytest.mark.parametrize("args, wiring, queries", [
    (("--wiring", "routed"), "routed", 16),
    (("--wiring", "mean"), "mean", 16),
    (("--wiring", "final", "--queries", 4), "final", 4),
    (("--connector", "per-block"), "ladder", 16),
])
def test_another_ladder_is_trained_saved_and_gone_on_with(tmp_path, args, wiring, queries):
    run = start(tmp_path, *args, "--save-every", 1)
    next(run.steps())
    run.save()
    model = TBAC.load(tmp_path)
    assert (model.config.wiring, model.config.n_query) == (wiring, queries)
    assert ("per-block" in args) == (model.config.connector == "per-block")
    assert model.encode(["a dog"]).shape == (6, 1, queries, 128)
    again = start(tmp_path, *args, "--resume")
    assert again.state.step == 1
    assert all(torch.equal(p, run.state.params[n]) for n, p in again.state.params.items())


def test_a_checkpoint_from_before_there_were_connectors(tmp_path):
    """It goes on with the one that all rungs shared, and with no other."""
    first = start(tmp_path, "--save-every", 1)
    next(first.steps())
    first.save()
    file = checkpoints(tmp_path)[-1] / "state.json"
    found = json.loads(file.read_text())
    del found["model"]["connector"]
    file.write_text(json.dumps(found))
    assert start(tmp_path, "--resume").state.step == 1
    with pytest.raises(ValueError, match="model.connector = 'shared', here it is 'per-block'"):
        start(tmp_path, "--resume", "--connector", "per-block")


def test_a_ladder_is_taken_with_its_wiring_and_queries(tmp_path):
    first = start(tmp_path / "a", "--wiring", "final", "--queries", 4)
    next(first.steps())
    first.save()
    second = start(tmp_path / "b", "--take", f"ladder={tmp_path / 'a'}")
    next(second.steps())
    second.save()
    config = TBAC.load(tmp_path / "b").config
    assert (config.wiring, config.n_query) == ("final", 4)


def test_a_part_is_taken_with_its_weights(tmp_path):
    """And nothing else: each part begins as one of the two models has it."""
    first = start(tmp_path / "a")
    next(first.steps())
    first.save()
    moved, shipped = TBAC.load(tmp_path / "a"), TBAC.load(TOY_FOLDER)
    for part, other in (("ladder", "dit"), ("dit", "ladder")):
        found = start(tmp_path / part, "--take", f"{part}={tmp_path / 'a'}").model
        for name, want in ((part, moved), (other, shipped)):
            weights = getattr(want, name).state_dict()
            for key, value in getattr(found, name).state_dict().items():
                assert torch.equal(value, weights[key].float()), (name, key)
    assert not torch.equal(moved.dit.proj_out.weight, shipped.dit.proj_out.weight.float())


def test_matrices_decay_and_gains_and_biases_do_not(tmp_path):
    started = start(tmp_path, "--weight-decay", 0.3, "--betas", 0.8, 0.9)
    groups = started.state.optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}
    for name, p in started.state.params.items():
        assert decay[id(p)] == (0.3 if p.dim() > 1 else 0), name


@pytest.mark.parametrize("script", [("train.py",), ("-m", "lab.pretrain", "--stage", "dcae")])
def test_a_dry_run_goes_through_everything_and_leaves_nothing(tmp_path, script):
    done = run(*script, "--out", tmp_path / "x", "--dry-run", "--batch", 2)
    assert done.returncode == 0, done.stderr
    assert "1/1" in done.stderr and not list(tmp_path.iterdir()), done.stderr


def test_presets_are_the_papers_and_the_command_line_wins():
    paper = ["--preset", "paper", "--stage"]
    a = train.options([*paper, "edit", "--model", "x", "--lr", "3e-4"])
    assert (a.lr, a.warmup, a.min_lr_ratio * 1e-4) == (3e-4, 5000, pytest.approx(1e-5))
    assert (a.betas, a.weight_decay, a.clip) == ([0.9, 0.999], 0.05, 0.5)
    assert (a.batch, a.epochs, a.cond_drop) == (4, 10, 0.1)
    a = train.options([*paper, "t2i"])
    assert (a.batch, a.steps, a.lr) == (16, 150_000, 1e-4)
    assert (a.ema, a.size, a.grad_checkpoint) == (0.0, 512, True)
    a = train.options([*paper, "mix"])
    assert (a.batch, a.epochs) == (4, 100)
    assert train.options([]).model == str(TOY_FOLDER) and train.options([]).data == ["toy"]
    for wrong in ([*paper, "vit"], ["--stage", "vit"]):
        with pytest.raises(SystemExit):
            train.options(wrong)


@pytest.mark.parametrize("wrong", [
    "--queries 0", "--steps 0", "--epochs 0", "--epochs inf", "--shift 0", "--shift nan",
    "--clip 0", "--clip nan", "--cond-drop 0.5", "--batch 0", "--lr inf", "--lr 1e38",
    "--weight-decay nan", "--min-lr-ratio nan", "--ema -1", "--ema nan", "--ema 1",
    "--max-bad nan", "--max-bad -1", "--seed 18446744073709551616", "--size 0", "--workers -1",
    "--steps 1000000000", "--betas 0.9 1", "--warmup -1", "--keep 0.5"])
def test_numbers_that_cannot_be_meant(wrong, capsys):
    with pytest.raises(SystemExit):
        train.options(wrong.split())
    error, = capsys.readouterr().err.splitlines()
    assert f"argument {wrong.split()[0]}: must be a" in error


def test_parts_that_do_not_fit(tmp_path, tiny_folder):
    fits_not = "does not fit the other parts"
    for part, why in (("dcae", "channels"), ("dit", "channels"), ("mllm", fits_not)):
        with pytest.raises(ValueError, match=why):
            start(tmp_path / part, "--take", f"{part}={tiny_folder}")


def test_a_model_draws_at_the_size_that_it_learnt_at(tmp_path):
    assert start(tmp_path, "--size", 32).model.config.size == 32


@pytest.mark.parametrize("build, options", [
    (train.build, train.options), (pretrain.build, pretrain.options)])
def test_a_size_that_the_autoencoder_does_not_have(build, options, tmp_path):
    """It is refused before a run has written anything."""
    for stage in ("t2i", "edit") if build is train.build else ("dcae", "dit"):
        args = options(["--stage", stage, "--size", "50", "--device", "cpu",
                        "--model", str(TOY_FOLDER), "--out", str(tmp_path / stage)])
        with pytest.raises(ValueError, match="size 50x50: both sides must be .* multiples of 8"):
            build(args)


def test_steps_and_epochs():
    def asked(*args):
        words = ["--preset", "paper", "--stage", "edit", "--model", "x", "--data", "y", *args]
        a = train.options(words)
        return a.steps, a.epochs

    assert asked() == (None, 10) and asked("--epochs", "2") == (None, 2)
    assert asked("--steps", "7") == (7, None) and asked("--dry-run") == (1, None)
    with pytest.raises(SystemExit):
        asked("--steps", "7", "--epochs", "2")


@pytest.mark.parametrize("args, words", [
    (("--save-every", "0"), "--save-every: must be"),
    (("--keep", "0"), "--keep: must be"),
    (("--accumulate", "-1"), "--accumulate: must be"),
    (("--take", "dcae"), "'dcae': expected PART=FOLDER"),
    (("--take", "vit=x"), "'vit=x': expected PART=FOLDER, where PART is mllm"),
    (("--device", "hpu"), "--device: must be cpu, cuda"),
    (("--wiring", "x"), "invalid choice: 'x'"),
    (("--out", ""), "is empty"),
    (("--out", "\udcff"), "is not UTF-8"),
    (("--model", "\udcff"), "is not UTF-8"),
])
def test_what_the_command_line_cannot_mean(args, words, capsys):
    with pytest.raises(SystemExit):
        train.options(args)
    assert words in capsys.readouterr().err


def test_help_shows_the_presets_values(capsys):
    with pytest.raises(SystemExit):
        train.options(["--preset", "paper", "--stage", "t2i", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps (default: 150000)" in said and "of matrices (default: 0.05)" in said


def test_wrong_data_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(train.TBAC, "load", lambda *_: pytest.fail("the data were not tried first"))
    out = tmp_path / "run"
    words = ["--data", tmp_path / "nothing", "--cache-latents", "--out", out]
    args = train.options([*map(str, words)])
    with pytest.raises(ValueError, match="no such files"):
        train.Run(args)
    assert not out.exists()


def test_no_toy_where_the_paper_was_meant_and_no_cuda_where_there_is_none(tmp_path, monkeypatch):
    paper = ["--preset", "paper", "--data", "toy", "--out", str(tmp_path), "--device", "cpu"]
    with pytest.raises(ValueError, match="--preset paper needs --model and --data"):
        train.Run(train.options(paper))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA here, take --device cpu"):
        start(tmp_path, "--device", "cuda")


def test_what_is_for_the_ladder_is_refused_where_parts_are_taught(tmp_path):
    with pytest.raises(ValueError, match="are for train.py"):
        start(tmp_path, "--wiring", "final", stage="dit")


def picture_folder(folder, n, name="0.png"):
    folder.mkdir(exist_ok=True)
    world.render(world.sample_scene(random.Random(0))).save(folder / name)
    line = json.dumps(dict(file_name=name, text="x"))
    (folder / "metadata.jsonl").write_text("\n".join([line] * n))
    return folder


def test_the_autoencoder_learns_from_pictures_of_ones_own(tmp_path):
    picture_folder(tmp_path / "mine", 3)
    args = ("--data", tmp_path / "mine", "--sheet-every", 1, "--steps", 1)
    run = start(tmp_path / "run", *args, stage="dcae")
    run.args.out.mkdir()
    before = {name: p.clone() for name, p in run.state.params.items()}
    train.train(run)
    pretrain.unit_latents(run)
    assert any(not torch.equal(p, before[name]) for name, p in run.state.params.items())
    assert (tmp_path / "run" / "sheet-00000001.png").exists()
    dcae = TBAC.load(tmp_path / "run").dcae
    pictures = [example.target for example in first_examples(run.reader, 256)]
    latents = dcae.encode(to_pixels(pictures, "cpu"))
    assert latents.std().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("stage", ["vit", "mllm", "dit"])
def test_other_parts_need_to_know_what_a_picture_shows(tmp_path, stage):
    picture_folder(tmp_path / "mine", 1)
    with pytest.raises(ValueError, match="--data .*mine: only stage dcae"):
        start(tmp_path / "run", "--data", tmp_path / "mine", stage=stage)


def test_an_epoch_has_all_of_each_source_unless_weights_say_otherwise(tmp_path):
    a, b = picture_folder(tmp_path / "a", 6), picture_folder(tmp_path / "b", 2)

    def run_on(*sources):
        return start(tmp_path / "out", "--epochs", 3, "--data", *sources)

    plain, weighted = run_on(a, b), run_on(f"{a}=0.5", f"{b}=0.5")
    assert plain.reader.share.weights == [6, 2] and weighted.reader.share.weights == [0.5, 0.5]
    assert plain.args.steps == weighted.args.steps == 12


def test_learning_rate():
    a = train.options(["--lr", "1", "--min-lr-ratio", "0.1", "--warmup", "10", "--steps", "110"])
    rates = [train.learning_rate(i, a) for i in range(111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and rates[10] == 1
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_drop_is_a_tenth_each():
    """Without pictures: text. With: text alone, picture alone, both; one number decides. In the
    palette of this picture 0 is not black."""
    rng, image = random.Random(0), Image.new("RGB", (4, 4), "red").quantize()

    def black(images):
        return bool(images) and images[0].getextrema() == ((0, 0),) * 3

    seen = Counter()
    for _ in range(20_000):
        prompt, images = train.drop_condition(data.Example("x", (image,), image), rng, 0.1)
        seen[prompt == "", black(images)] += 1
    tenths = ((True, False), (True, True), (False, True))
    assert all(abs(seen[case] - 2000) < 200 for case in tenths) and len(seen) == 4
    alone = data.Example("x", (), image)
    texts = [train.drop_condition(alone, rng, 0.1)[0] for _ in range(20_000)]
    assert abs(texts.count("") - 2000) < 200


def bits(state):
    moments = [m for s in state.optimizer.state.values() for m in s.values()]
    working = state.weights.working.values()
    return [t.clone() for t in (*state.params.values(), *state.ema.values(), *moments, *working)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spike", ["loss", "gradient", "nan"])
def test_a_spike_leaves_weights_optimizer_and_mean_as_they_were(tmp_path, spike, dtype):
    started = start(tmp_path, "--steps", 9, "--dtype", dtype)
    steps, loss = started.steps(), started.loss
    next(steps)
    next(steps)
    before = bits(started.state)
    bad = {"loss": lambda x: x + 1e4, "gradient": lambda x: 1e4 * x - (1e4 - 1) * x.detach(),
           "nan": lambda x: x * math.nan}
    started.loss = lambda rows: (bad[spike](loss(rows)[0]), None)
    report = next(steps)
    said = {"loss": "20 times", "gradient": "25 times", "nan": "nan"}
    assert said[spike] in report.skipped
    after = bits(started.state)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert started.state.guard.skipped == 1
    assert (started.state.updates, started.state.step) == (2, 3)
    started.loss = loss
    assert next(steps).skipped is None
    assert not all(torch.equal(a, b) for a, b in zip(before, bits(started.state)))


def test_examples_of_ones_own(tmp_path):
    asked = []

    def night(rng, i):
        asked.append(i)
        return data.Example("a black night", (), Image.new("RGB", (64, 64)))

    words = ["--batch", "2", "--steps", "2", "--data", "night", "--out", str(tmp_path)]
    run = train.Run(train.options(words), own=dict(night=night))
    assert [r.skipped for r in run.steps()] == [None, None]
    assert {e.prompt for e in run.shown} == {"a black night"} and {0, 1, 2, 3} <= set(asked)


def test_the_guard_can_be_switched_off_and_stops_after_ten_in_a_row(tmp_path):
    def always_nan(switch):
        started = start(tmp_path, "--steps", 20, switch)
        params = started.state.params.values()
        started.loss = lambda rows: (sum(p.sum() for p in params).expand(2) * math.nan, None)
        return started

    started = always_nan("--guard")
    with pytest.raises(ValueError, match="ten steps in a row.*--lr"):
        list(started.steps())
    assert started.state.updates == 0
    assert len(list(always_nan("--no-guard").steps())) == 20


def test_curves_are_smoothed_over_what_is_there():
    found = smooth([None, 1.0, 3.0, float("nan"), None, None, 5.0], 3)
    assert np.array_equal(found, [np.nan, 1, 2, 2, 3, np.nan, 5], equal_nan=True)
    assert list(smooth([2.0, 4.0], 1)) == [2, 4] and len(smooth([], 1)) == 0


def test_a_skipped_step_is_logged_with_its_examples_and_without_nan(tmp_path, monkeypatch):
    # As on Windows: memory is not known.
    monkeypatch.setitem(sys.modules, "resource", None)
    started = start(tmp_path, "--accumulate", 2, "--sheet-every", 0)
    read, loss = [], started.loss

    def second_is_nan(rows):
        read.append([example.prompt for example, _ in rows])
        losses, times = loss(rows)
        return (losses * math.nan if len(read) == 3 else losses), times

    started.loss = second_is_nan
    train.train(started)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()

    def not_json(word):
        pytest.fail(f"{word} is not JSON")

    first, second, third = (json.loads(line, parse_constant=not_json) for line in lines)
    assert first["examples"] is third["examples"] is first["memory_gb"] is None
    assert second["loss"] is None and "nan" in second["skipped"]
    assert second["examples"] == read[2] + read[3]
    plot_curves(tmp_path)
    assert (tmp_path / "curves.png").is_file()


def test_guard_limits():
    guard = Guard()
    # Below 1 a norm is never a spike.
    assert guard.refusal(1.0, 0.1) is None and guard.refusal(19.9, 0.9) is None
    assert guard.mean_loss == pytest.approx(0.99 + 0.199)
    assert guard.mean_norm == pytest.approx(0.099 + 0.009)
    assert "20 times" in guard.refusal(24, 0.1) and "25 times" in guard.refusal(1, 3)
    assert guard.refusal(1, 2e6) and guard.refusal(math.inf, 1)
    # What was refused is not in the means.
    assert guard.skipped == guard.in_a_row == 4 and guard.mean_loss == pytest.approx(1.189)
    assert guard.refusal(1, 0.1) is None and guard.in_a_row == 0


def losses(started):
    return [x for r in started.steps() for x in (r.loss, r.norm)]


@pytest.mark.parametrize("stage", ["t2i", "mllm"])
def test_gradient_checkpointing_computes_again_and_changes_nothing(tmp_path, stage):
    found, calls = [], []
    for switch in ("--grad-checkpoint", "--no-grad-checkpoint"):
        started, n = start(tmp_path, switch, stage=stage), []
        model = started.model
        block = model.dit.blocks[0] if stage == "t2i" else model.mllm.layers[0]
        block.norm1.register_forward_pre_hook(lambda *_, n=n: n.append(1))
        report = next(started.steps())
        found.append((report.loss, report.norm))
        calls.append(len(n))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and calls[0] > calls[1]


def test_the_optimizer_has_the_rate_that_is_logged_and_the_clipped_gradient(tmp_path):
    started = start(tmp_path, "--warmup", 2, "--clip", 0.01)
    optimizer, seen = started.state.optimizer, []
    step = optimizer.step

    def spy():
        norms = [p.grad.norm() for p in started.state.params.values() if p.grad is not None]
        rates = [group["lr"] for group in optimizer.param_groups]
        seen.append((rates, torch.stack(norms).norm().item()))
        step()

    optimizer.step = spy
    reports = list(started.steps())
    assert [report.lr for report in reports] == pytest.approx([5e-4, 1e-3, 1e-3])
    for report, (rates, norm) in zip(reports, seen, strict=True):
        assert rates == [report.lr] * 2
        assert report.norm > 0.02 and norm == pytest.approx(0.01, rel=1e-3)


def test_passes_add_up_to_one_batch(tmp_path):
    one, two = (next(start(tmp_path, "--accumulate", n, batch=4 // n).steps()) for n in (1, 2))
    assert (one.loss, one.norm) == pytest.approx((two.loss, two.norm), rel=1e-5)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_what_learns_is_float32_also_of_a_model_in_half_precision(tmp_path, half):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        shutil.copy(TOY_FOLDER / name, model)
    config = json.loads((TOY_FOLDER / "config.json").read_text()) | dict(dtype=half)
    (model / "config.json").write_text(json.dumps(config))
    run = start(tmp_path / "run", "--model", model)
    params = run.state.params
    stored = TBAC.load(TOY_FOLDER).state_dict()
    assert {p.dtype for p in params.values()} == {torch.float32}
    assert all(torch.equal(p, stored[name]) for name, p in params.items())
    assert math.isfinite(next(run.steps()).loss)


@pytest.mark.parametrize("stage", ["t2i", "edit", "vit", "mllm"])
def test_the_plain_path_trains_the_same(tmp_path, stage):
    """The first step; later ones differ by what AdamW makes of rounding."""
    runs = [start(tmp_path, switch, stage=stage) for switch in ("--no-plain", "--plain")]
    assert ["query_states" in vars(run.model) for run in runs] == [True, False]
    fast, plain = (next(run.steps()) for run in runs)
    assert (fast.loss, fast.norm) == pytest.approx((plain.loss, plain.norm), rel=1e-5)


def test_cached_latents_change_nothing_and_go_with_size_and_weights(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i in range(6):
        world.render(world.sample_scene(random.Random(i))).save(folder / f"{i}.png")
        lines.append(json.dumps(dict(file_name=f"{i}.png", text=str(i))))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    how = ("--data", folder, "--steps", 6)
    want = losses(start(tmp_path / "plain", *how))
    assert losses(start(tmp_path / "run", "--cache-latents", *how)) == want
    kept = list((tmp_path / "run" / "latents").glob("*/*.safetensors"))
    assert len(kept) == 6
    again = start(tmp_path / "run", "--cache-latents", *how)
    # It is not needed any more.
    again.model.dcae.encode = None
    assert losses(again) == want

    scaled = copy.copy(again.model)
    dcae = dataclasses.replace(scaled.config.dcae, scaling_factor=2.0)
    scaled.config = dataclasses.replace(scaled.config, dcae=dcae)
    elsewhere = argparse.Namespace(**vars(again.args) | dict(out=tmp_path / "scaled"))
    assert data.Latents(scaled, elsewhere).folder.name != kept[0].parent.name

    # Another size: the old ones are gone.
    other = start(tmp_path / "run", "--cache-latents", "--size", 32, *how)
    assert losses(other) != want and not kept[0].exists()
    with torch.no_grad():
        other.model.dcae.encoder.conv_in.weight += 1
    changed = data.Latents(other.model, other.args)
    assert changed.folder != other.helper.folder
    assert changed.known(str(folder / "0.png")) is None


@pytest.mark.parametrize("passes", [1, 2])
def test_overfit_trains_on_the_examples_of_one_step(tmp_path, passes):
    started = start(tmp_path, "--overfit", "--accumulate", passes)
    seen, loss = [], started.loss
    started.loss = lambda rows: seen.append([e.prompt for e, _ in rows]) or loss(rows)
    list(started.steps())
    steps = [seen[i:i + passes] for i in range(0, len(seen), passes)]
    assert steps[0] == steps[1] == steps[2]
    assert len(set(map(tuple, steps[0]))) == passes


def test_what_learns_is_float32_and_what_is_frozen_is_not(tmp_path):
    started = start(tmp_path, "--dtype", "bfloat16")
    next(started.steps())
    state, model = started.state, started.model
    assert {p.dtype for p in state.params.values()} == {torch.float32}
    assert {p.grad for p in state.params.values()} == {None}
    moments = [t for s in state.optimizer.state.values() for t in s.values()]
    assert {t.dtype for t in (*moments, *state.ema.values())} == {torch.float32}
    assert model.mllm.embed_tokens.weight.dtype == torch.bfloat16
    assert model.dit.proj_out.weight.dtype == torch.bfloat16
    named = {n for n, p in model.named_parameters() if p.requires_grad}
    in_groups = sum(len(g["params"]) for g in state.optimizer.param_groups)
    assert len(named) == len(state.params) == in_groups
    # After a step the model has the new weights.
    for name, p in state.params.items():
        assert torch.equal(p.bfloat16(), state.weights.working[name]), name


def test_the_working_weights_are_the_masters_rounded(tmp_path):
    """Gradients arrive in float32 and add up there."""
    started = start(tmp_path, "--dtype", "bfloat16", "--accumulate", 2)
    state = started.state
    stream = train.batches(started.reader, state, started.args)
    sums = []
    for _ in range(2):
        state.weights.cast(state.params)
        started.loss(next(stream))[0].mean().backward()
        sums.append({n: p.grad.clone() for n, p in state.params.items()})
        # Complete gradients are with the masters, and the working weights have gone.
        assert {p.numel() for p in state.weights.working.values()} == {0}
    assert {p.grad.dtype for p in state.params.values()} == {torch.float32}
    assert {p.grad for p in state.weights.working.values()} == {None}
    assert any(not torch.equal(sums[0][n], sums[1][n]) for n in state.params)
    state.optimizer.step()
    state.weights.cast(state.params)
    for name, p in state.params.items():
        assert torch.equal(p.bfloat16(), state.weights.working[name]), name


def test_a_trained_model_exported_and_read_again_gives_the_same_picture(tiny_folder, tmp_path):
    """The tiny checkpoint, some steps on, through the released layout and back."""
    how = ("--model", tiny_folder, "--size", 32, "--steps", 3, "--sheet-every", 0)
    started = start(tmp_path / "run", *how)
    list(started.steps())
    started.save()
    for args in (("--export", tmp_path / "run", "--out", tmp_path / "public"),
                 ("--qwen", TINY / "qwen", "--sana", TINY / "sana", "--tbac", tmp_path / "public",
                  "--out", tmp_path / "back")):
        done = run("weights_convert.py", *args)
        assert done.returncode == 0, done.stderr

    def picture(folder):
        generator = torch.Generator().manual_seed(0)
        model = TBAC.load(folder)
        return sample.generate(model, ["a dog"], steps=3, generator=generator)[0].tobytes()

    assert picture(tmp_path / "run") == picture(tmp_path / "back") != picture(tiny_folder)


# ---- the stages that teach the toy's parts

CIRCLE = world.Thing("circle", "red", "small", 0.2, 0.2)
CROSS = world.Thing("cross", "blue", "large", 0.75, 0.2)


def test_names_of_what_each_vision_token_shows():
    """The classes of stage `vit`: a small thing in one unit of 4 x 4, a large one in a block of
    units, the background elsewhere."""
    circle = world.Thing("circle", "red", "small", 0.375, 0.125)
    scene = world.Scene((circle, world.Thing("cross", "blue", "large", 0.75, 0.75)), "grey")
    names = pretrain.PatchNames(pretrain.TOY)
    rows = list(names.shown(scene, 4, 4))
    top = ["nothing", "circle", "nothing", "nothing"] + ["nothing"] * 4
    assert [r["shape"] for r in rows] == top + ["nothing", "nothing", "cross", "cross"] * 2
    assert rows[1] == dict(colour="red", shape="circle", size="small", spot="top", column=3, row=1,
                           background="grey")
    assert rows[0] == dict(colour="nothing", shape="nothing", spot="top left", column=1, row=1,
                           background="grey")
    assert rows[10]["spot"] == "bottom right" and rows[10]["size"] == "large"


def test_the_dit_hears_places_of_less_than_half_of_the_scenes():
    """Every fourth exactly, every fifth by sides and spots; now and then nothing at all; colours
    and shapes always stay."""
    rng = random.Random(0)
    scene = world.sample_scene(rng, 3)
    args = pretrain.options(["--stage", "dit", "--cond-drop", "0.1"])
    summary = pretrain.SummaryTokens(pretrain.TOY)
    told = [pretrain.as_told(summary, scene, rng, args) for _ in range(2000)]
    something = [case for case in told if any(case)]
    assert 150 < 2000 - len(something) < 250
    names = [thing.colour for thing in scene.things for _ in range(4)] + ["nothing"] * 4
    assert all([label["colour"] for label in case] == names for case in something)
    exact = sum("column" in case[0] for case in something)
    cells = sum("spot" in case[0] for case in something)
    assert 390 < exact < 510 and 300 < cells - exact < 430


def test_who_is_told_in_the_code_reads_what_was_told():
    """Also where much is not known, and whatever else is said with it; of what is not known nothing
    is said."""
    scene = world.Scene((CIRCLE, CROSS), "grey")
    summary = pretrain.SummaryTokens(pretrain.TOY).requires_grad_(False)
    # A head that has learnt: its vectors point their own ways.
    torch.nn.init.orthogonal_(summary.head.weight, gain=3)
    labels = list(summary.shown(pretrain.after_edit(scene, scene), scene, exact=True))
    fewer = [dict(colour="red"), dict(shape="cross", row=7), {}] * 5 + [{}]
    said = summary.encode([labels, fewer])                             # (2, 16, M)
    assert said.shape == (2, 16, 128) and (said[1, 2] == 0).all()
    logits = summary.logits(said)
    for b, row in enumerate([labels, fewer]):
        for i, label in enumerate(row):
            for name, value in label.items():
                best = summary.CLASSES[name][logits[name][b, i].argmax()]
                assert best == value
    # A scene that a picture shows is told whole, its places in eighths.
    found, = summary.scenes([said[:1]] * 2)
    middles = [dataclasses.replace(thing, x=(int(8 * thing.x) + 0.5) / 8,
                                   y=(int(8 * thing.y) + 0.5) / 8) for thing in scene.things]
    assert found == dataclasses.replace(scene, things=tuple(middles))
    rungs = summary.rungs(TBAC.load(TOY_FOLDER), [labels, fewer])
    assert rungs.shape == (6, 2, 16, 128) and (rungs == said).all()


def test_the_dit_is_told_in_the_code_that_stage_mllm_has_learnt(tmp_path):
    """Which lies beside its model, and does not learn any more."""
    talks = start(tmp_path, "--steps", 2, "--warmup", 1, stage="mllm")
    train.train(talks)
    pretrain.keep_code(talks)
    draws = start(tmp_path / "dit", "--model", tmp_path, stage="dit")
    learnt = talks.state.ema["aux_head.head.weight"]
    assert torch.equal(draws.helper.head.weight, learnt)
    assert not torch.equal(learnt, pretrain.SummaryTokens(pretrain.TOY).head.weight)
    assert not any("aux_head" in name for name in draws.state.params)
    assert "aux_head" not in " ".join(TBAC.load(tmp_path).state_dict())
    with pytest.raises(ValueError, match="code.safetensors is missing"):
        pretrain.learnt_code(draws.model, types.SimpleNamespace(model=str(tmp_path / "dit")))


def test_summary_tokens_tell_each_thing_in_turn():
    """What the text says, and no exact place; with a picture, column by column, and in eighths of
    the side."""
    scene = world.Scene((CIRCLE, CROSS))
    summary = pretrain.SummaryTokens(pretrain.TOY)
    named = [(CROSS, False), (CIRCLE, False)]
    said = list(summary.shown(named, scene, exact=False))
    seen = list(summary.shown(pretrain.after_edit(scene, scene), scene, exact=True))
    assert [t["colour"] for t in said] == ["blue"] * 4 + ["red"] * 4 + ["nothing"] * 8
    assert said[0] == dict(colour="blue", shape="cross", size="large", spot="top right",
                           side="right of", background="white", changed=False)
    assert [t["colour"] for t in seen] == ["red"] * 4 + ["blue"] * 4 + ["nothing"] * 8
    assert (seen[4]["column"], seen[4]["row"]) == (6, 1)
    which = summary.indices(said)
    assert which.shape == (16, 9) and which[0].tolist() == [2, 3, 2, 2, -100, -100, 1, 0, 0]
    assert which[15].tolist()[2:7] == [-100] * 5


def test_what_does_not_fit_into_a_row_is_left_out_with_its_marks(tmp_path):
    started = start(tmp_path, stage="mllm")
    rng = random.Random(0)
    scene = world.sample_scene(rng, 2)
    turns = [(f"what shape is the {scene.things[i % 2].colour} object?", "circle")
             for i in range(40)]
    talk = pretrain.Conversation(pretrain.ASK, scene, turns)
    marked = pretrain.tokenize_conversation(started.model, started.helper, talk, rng, started.args)
    assert len(marked.prompt.ids) <= pretrain.PACKED_LENGTH
    assert len(marked.weight) == len(marked.prompt.ids)
    assert max(place for place, _ in marked.pointing) < len(marked.prompt.ids)


def test_what_is_written_behind_gist_tokens_sees_nothing_but_these(tmp_path):
    """So another prompt changes nothing in the first layer, where they hold none of it yet; in the
    next one it does. And a neighbour in the same row sees none of it."""
    started = start(tmp_path, "--aux", "gist", stage="mllm")
    mllm, rng = started.model.mllm, types.SimpleNamespace(random=lambda: 0.0)
    answers = "a red circle, on a white background", "two blue crosses, on a grey background"
    talks = [pretrain.Conversation(pretrain.DRAW, None, [(f"draw {answer}", answer)])
             for answer in answers]
    marked = [pretrain.tokenize_conversation(started.model, started.helper, talk, rng, started.args)
              for talk in talks]
    # The second row is longer, so the first one is padded.
    batch, weight, (row, _) = pretrain.join(mllm, [marked, marked + marked[:1]])
    pad, n = batch.ids.shape[1] - len(row.prompt.ids), started.helper.n
    first = pad + row.summary[0][0]
    behind, end = first + n, pad + len(marked[0].prompt.ids)
    assert pad > 0 and [pad + place for place, _ in row.summary[:n]] == list(range(first, behind))
    said = mllm.tokenizer.encode(answers[0] + "<|im_end|>")
    # The token before them is asked for nothing: it stands for the end of a picture.
    assert batch.ids[0, behind + 1:end].tolist() == said
    assert (weight[0, :end] > 0).tolist() == [False] * (behind + 1) + [True] * len(said)

    x = mllm.embed(batch)
    other = x.clone()
    other[0, pad:first] = x[0, pad:first].flip(0)
    states, others = (mllm(x, batch.positions, batch.attention_mask) for x in (x, other))
    changed = [[not torch.equal(a[0, part], b[0, part]) for a, b in zip(states[1:3], others[1:3])]
               for part in (slice(first, behind), slice(behind, end), slice(end, None))]
    assert changed == [[True, True], [False, True], [False, False]]


def test_words_that_point_at_a_thing_end_in_the_token_that_tells_it(tmp_path, monkeypatch):
    """The labels of stage mllm, and the states that they are asked of: those of the token in which
    the words end, also where conversations share a row, which changes nothing for either."""
    scene = world.Scene((CIRCLE, CROSS))
    found = language.mentions("is the circle left of the blue cross?", scene)
    assert found == [(13, CIRCLE), (36, CROSS)]
    assert language.mentions("how many circles, and a red circle?", scene) == []
    started, asked = start(tmp_path, stage="mllm"), []
    mllm, head = started.model.mllm, started.helper

    def spy(states, labels):
        asked.append((states, labels))
        return states.sum() * 0

    monkeypatch.setattr(head, "forward", spy)
    long = pretrain.Conversation(pretrain.ASK, scene, [
        ("what is below the cross?", "nothing"),
        ("where is the red circle?", "left of the blue cross")])
    question = "what shape is the red object?"
    short = pretrain.Conversation(pretrain.ASK, scene, [(question, "circle")])
    rows = [(row, random.Random(0)) for row in (short, long)]
    pretrain.mllm_loss(started.model, head, rows, started.args)
    (states, labels), = asked
    # Both in one row, the longest first.
    assert [t["shape"] for t in labels] == ["cross", "circle", "circle"]
    assert states.shape[:2] == (9 - head.DEPTH, 3)

    batch = mllm.tokenize([question], [[world.render(scene)]])
    token = mllm.tokenizer.encode(" object")[-1]
    ids = batch.ids[0].tolist()
    assert ids.count(token) == 1
    last = mllm(mllm.embed(batch), batch.positions, batch.attention_mask)[-1]
    assert relative(last[0, ids.index(token)], states[-1, 2]) < 1e-5


def test_each_thing_keeps_its_place_in_the_list_through_an_edit():
    right, left = dataclasses.replace(CIRCLE, x=0.8), dataclasses.replace(CROSS, x=0.2)
    scene, green = world.Scene((right, left)), dataclasses.replace(right, colour="green")
    new = world.Thing("square", "red", "small", 0.5, 0.8)
    targets = (scene.things, (green, left), (right,), (right, left, new))
    same, gone = [(left, False), (right, False)], [(None, True), (right, False)]
    found = [pretrain.after_edit(scene, world.Scene(things)) for things in targets]
    assert found == [same, [same[0], (green, True)], gone, [*same, (new, True)]]
    summary = pretrain.SummaryTokens(pretrain.TOY)
    labels = list(summary.shown(gone, world.Scene((right,)), exact=True))
    assert (labels[0]["colour"], labels[0]["changed"]) == ("nothing", True)
    assert (labels[4]["colour"], labels[4]["side"]) == ("red", "none")


@pytest.mark.parametrize("stage", ["t2i", "vit"])
def test_fresh_weights_are_drawn_on_the_cpu(tmp_path, monkeypatch, stage):
    """Then they go where they are needed: a GPU refuses a generator of the CPU."""
    toy = TBAC.load(TOY_FOLDER)
    init, devices = Ladder.init_weights, []

    def noted(ladder, generator):
        devices.append(ladder.queries.device.type)
        init(ladder, generator)

    monkeypatch.setattr(Ladder, "init_weights", noted)
    monkeypatch.setattr(pretrain, "toy_tokenizer", lambda file: toy.mllm.tokenizer)
    monkeypatch.setattr(TBAC, "load", lambda folder, device, dtype: toy.to(device))
    words = ["--stage", stage, "--out", str(tmp_path)]
    more = ["--model", str(TOY_FOLDER), "--wiring", "mean"]
    args = pretrain.options(words) if stage == "vit" else train.options(words + more)
    args.device = "meta"
    model = (pretrain if stage == "vit" else train).build(args)
    assert devices == ["cpu"] and {p.device.type for p in model.parameters()} == {"meta"}
