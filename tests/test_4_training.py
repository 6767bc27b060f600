"""Frozen is frozen; what trains, trains; the loss is what the analysis says at the start and falls on one batch."""
import argparse
import copy
import dataclasses
import json
import math
import random
import sys
from collections import Counter

import pytest
import torch
from PIL import Image

from engine import data
import sample
from toy import language, world
import train
from lab import pretrain as parts
from mllm import DRAW
from engine.options import LADDER, LEARNS, TOY_FOLDER
from engine.state import Guard, learning_rate
from tbac import TBAC
from tests.conftest import TINY, relative, run


def pixels(n, g):
    return torch.rand(n, 3, 32, 32, generator=g) * 2 - 1


def test_frozen_parts_stay_bit_identical_and_the_others_move(tiny):
    g, before = torch.Generator().manual_seed(0), {n: t.clone() for n, t in tiny.state_dict().items()}
    optimizer = torch.optim.AdamW(tiny.trainable(), lr=1e-3, weight_decay=0.1)
    for _ in range(20):
        tiny.loss(pixels(2, g), ["a red circle", "two blue squares"], generator=g).backward()
        optimizer.step(), optimizer.zero_grad()
    for name, t in tiny.state_dict().items():
        assert torch.equal(t, before[name]) == name.startswith(("mllm.", "dcae.")), name
    assert all(p.grad is None for n, p in tiny.named_parameters() if n.startswith(("mllm.", "dcae.")))
    assert {id(p) for p in tiny.trainable()} == {id(p) for p in tiny.parameters() if p.requires_grad}


def test_first_loss_is_the_power_of_the_target(tiny):
    """An untrained DiT says 0, so the loss is the mean square of eps - x0."""
    tiny.dit.init_weights(), tiny.ladder.init_weights()
    g = torch.Generator().manual_seed(0)
    x, eps = pixels(2, g), torch.randn(2, 4, 8, 8, generator=g)
    want = (eps - tiny.dcae.encode(x)).pow(2).mean()
    assert torch.allclose(tiny.loss(x, ["a", "b"], eps=eps, generator=g), want)


def test_time_runs_from_data_to_noise(tiny):
    """The box in tbac.py: x_t = (1 - t) x0 + t eps, target eps - x0, the network fed 1000 t."""
    g, seen = torch.Generator().manual_seed(0), []
    x0, eps, t = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g), torch.tensor([0.25, 1.0])
    tiny.dit.forward = lambda x, time, conditions: seen.append((x, time)) or torch.zeros_like(x)
    loss = tiny.flow_losses(x0, tiny.encode(["a", "b"]), t, eps)
    (x_t, time), = seen
    assert torch.equal(time, torch.tensor([250.0, 1000.0]))
    assert torch.allclose(x_t[0], 0.75 * x0[0] + 0.25 * eps[0]) and torch.equal(x_t[1], eps[1])
    assert torch.allclose(loss, (eps - x0).pow(2).mean((1, 2, 3)))


@pytest.mark.parametrize("case", ["ragged", "images"])
def test_gradients_equal_those_of_one_pass_with_a_graph(tiny, recorded, case):
    """`encode` reads prompt and pictures without a graph; the whole sequence in one pass, with one, must give the same gradients."""
    prompts, images = recorded[0]["edit"] if case == "images" else (["a red circle left of a blue square", "dog"], None)
    g = torch.Generator().manual_seed(0)
    x0, t, eps = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([0.3, 0.8]), torch.randn(2, 4, 8, 8, generator=g)
    tiny.flow_losses(x0, tiny.encode(prompts, images), t, eps).mean().backward()
    groups = ("ladder.queries", "ladder.connector", "dit")
    gradients = lambda: [torch.cat([p.grad.flatten() for n, p in tiny.named_parameters() if n.startswith(part)]) for part in groups]
    got = gradients()
    tiny.zero_grad()
    batch = tiny.mllm.prepare(prompts, images, DRAW, then="<|vision_start|>")
    x = torch.cat([tiny.mllm.read(batch), tiny.ladder.queries.expand(2, -1, -1)], 1)
    places = torch.cat([batch.positions, batch.positions[:, :, -1:] + torch.arange(1, 9)], 2)
    states = tiny.mllm(x, places, torch.cat([batch.real, batch.real.new_ones(2, 8)], 1))
    tiny.flow_losses(x0, tiny.ladder([s[:, -8:] for s in states]), t, eps).mean().backward()
    for part, a, b in zip(groups, got, gradients()):
        assert relative(a, b) < 1e-5, part


@pytest.mark.slow
def test_one_batch_can_be_learnt_by_heart(tiny):
    g = torch.Generator().manual_seed(0)
    x, t, eps = pixels(4, g), torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.randn(4, 4, 8, 8, generator=g)
    tiny.dit.init_weights(g), tiny.ladder.init_weights(g)
    optimizer, losses = torch.optim.AdamW(tiny.trainable(), lr=3e-3), []
    for _ in range(150):
        loss = tiny.loss(x, ["red", "green", "blue", "yellow"], t=t, eps=eps)
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def start(tmp_path, *args, stage="t2i", batch=2):
    """A run on the toy, in float32 unless told otherwise, not yet stepped."""
    common = ("--stage", stage, "--out", tmp_path, "--model", TOY_FOLDER, "--batch", batch, "--warmup", 1, "--steps", 3, "--dtype", "float32")
    return train.Run(train.options([str(x) for x in (*common, *args)]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", LEARNS)
def test_every_stage_runs_and_saves_a_model(stage, tmp_path):
    done = run("train.py", "--stage", stage, "--model", TOY_FOLDER, "--steps", 3, "--batch", 2, "--warmup", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3 and (tmp_path / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "sheet-00000003.png").is_file() == (stage in LADDER)
    model, old = TBAC.load(tmp_path), TBAC.load(TOY_FOLDER).state_dict()
    moved = [n for n, t in model.state_dict().items() if not torch.equal(t, old[n])]
    for part in LEARNS[stage]:
        assert any(n.startswith(f"{part}.") for n in moved)
    assert all(n.startswith(tuple(f"{part}." for part in LEARNS[stage])) for n in moved)


@pytest.mark.parametrize("args, wiring, queries", [(("--wiring", "routed"), "routed", 16), (("--wiring", "last", "--queries", 4), "last", 4)])
def test_another_ladder_is_trained_saved_and_gone_on_with(tmp_path, args, wiring, queries):
    run = start(tmp_path, *args, "--save-every", 1)
    next(run.steps()), run.save()
    model = TBAC.load(tmp_path)
    assert (model.config.wiring, model.config.n_query) == (wiring, queries) and model.encode(["a dog"]).shape == (6, 1, queries, 128)
    again = start(tmp_path, *args, "--resume")
    assert again.state.step == 1 and all(torch.equal(p, run.state.params[n]) for n, p in again.state.params.items())


def test_a_ladder_is_taken_with_its_wiring_and_queries(tmp_path):
    first = start(tmp_path / "a", "--wiring", "last", "--queries", 4)
    next(first.steps()), first.save()
    second = start(tmp_path / "b", "--take", f"ladder={tmp_path / 'a'}")
    next(second.steps()), second.save()
    config = TBAC.load(tmp_path / "b").config
    assert (config.wiring, config.n_query) == ("last", 4)


def test_a_dry_run_goes_through_everything_and_leaves_nothing(tmp_path):
    done = run("train.py", "--out", tmp_path / "x", "--dry-run", "--batch", 2)
    assert done.returncode == 0 and "1/1" in done.stderr and not list(tmp_path.iterdir()), done.stderr


def test_presets_are_the_papers_and_the_command_line_wins():
    a = train.options(["--preset", "paper", "--stage", "edit", "--model", "x", "--lr", "3e-4"])
    assert (a.lr, a.warmup, a.floor * 1e-4, a.betas, a.weight_decay, a.clip, a.batch, a.epochs, a.drop) == \
        (3e-4, 5000, pytest.approx(1e-5), [0.9, 0.999], 0.05, 0.5, 4, 10, 0.1)
    assert train.options(["--preset", "paper", "--stage", "t2i"]).batch == 16 and train.options(["--preset", "paper"]).steps == 150_000
    assert train.options([]).model == str(TOY_FOLDER) and train.options([]).data == ["toy"]
    with pytest.raises(SystemExit):
        train.options(["--preset", "paper", "--stage", "vit"])


@pytest.mark.parametrize("wrong", ["--queries 0", "--steps 0", "--epochs 0", "--shift 0", "--clip 0", "--drop 0.5", "--batch 0"])
def test_numbers_that_cannot_be_meant(wrong, capsys):
    with pytest.raises(SystemExit):
        train.options(wrong.split())
    assert f"{wrong.split()[0]} must be" in capsys.readouterr().err


def test_parts_that_do_not_fit(tmp_path, tiny_folder):
    for part, why in (("dcae", "channels"), ("dit", "channels"), ("mllm", "does not fit the other parts")):
        with pytest.raises(ValueError, match=why):
            start(tmp_path / part, "--take", f"{part}={tiny_folder}")


def test_a_model_draws_at_the_size_that_it_learnt_at(tmp_path):
    assert start(tmp_path, "--size", 32).model.config.size == 32


def test_steps_and_epochs():
    paper = ["--preset", "paper", "--stage", "edit", "--model", "x", "--data", "y"]
    epochs = lambda *args: (lambda a: (a.steps, a.epochs))(train.options([*paper, *args]))
    assert epochs() == (None, 10) and epochs("--epochs", "2") == (None, 2)
    assert epochs("--steps", "7") == (7, None) and epochs("--dry-run") == (1, None)


@pytest.mark.parametrize("args, words", [
    (("--batch", "0"), "--batch must be"), (("--save-every", "0"), "--save-every must be"), (("--keep", "0"), "--keep must be"),
    (("--accumulate", "-1"), "--accumulate must be"), (("--take", "dcae"), "dcae: expected PART=FOLDER"),
    (("--take", "vit=x"), "vit=x: expected PART=FOLDER, where PART is mllm")])
def test_what_the_command_line_cannot_mean(args, words, capsys):
    with pytest.raises(SystemExit):
        train.options(args)
    assert words in capsys.readouterr().err


def test_help_shows_the_presets_values(capsys):
    with pytest.raises(SystemExit):
        train.options(["--preset", "paper", "--stage", "t2i", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps (default: 150000)" in said and "of matrices (default: 0.05)" in said


def test_no_toy_where_the_paper_was_meant_and_no_cuda_where_there_is_none(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--preset paper needs --model and --data"):
        train.Run(train.options(["--preset", "paper", "--data", "toy", "--out", str(tmp_path), "--device", "cpu"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA here, take --device cpu"):
        start(tmp_path, "--device", "cuda")


def test_an_epoch_has_all_of_each_source_unless_weights_say_otherwise(tmp_path):
    for folder, n in (("a", 6), ("b", 2)):
        (tmp_path / folder).mkdir()
        world.render(world.sample_scene(random.Random(0))).save(tmp_path / folder / "0.png")
        (tmp_path / folder / "metadata.jsonl").write_text("\n".join([json.dumps(dict(file_name="0.png", text="x"))] * n))
    share = lambda *more: start(tmp_path / "out", "--epochs", 3, "--data", *more)
    plain, weighted = share(tmp_path / "a", tmp_path / "b"), share(f"{tmp_path / 'a'}=0.5", f"{tmp_path / 'b'}=0.5")
    assert plain.reader.share.weights == [6, 2] and weighted.reader.share.weights == [0.5, 0.5] and plain.a.steps == weighted.a.steps == 12


def test_learning_rate():
    a = train.options(["--lr", "1", "--warmup", "10", "--steps", "110"])
    rates = [learning_rate(i, a) for i in range(111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and rates[10] == 1
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1) and sorted(rates[10:], reverse=True) == rates[10:]


def test_drop_is_a_tenth_each():
    """Without pictures: text. With pictures: text alone, picture alone, both; one number decides."""
    rng, image = random.Random(0), Image.new("RGB", (4, 4), "red")
    black = lambda images: bool(images) and images[0].getextrema() == ((0, 0),) * 3
    seen = Counter((prompt == "", black(images)) for prompt, images in
                   (train.dropped(data.Example("x", (image,), image), rng, 0.1) for _ in range(20_000)))
    assert all(abs(seen[case] - 2000) < 200 for case in ((True, False), (True, True), (False, True))) and len(seen) == 4
    texts = [train.dropped(data.Example("x", (), image), rng, 0.1)[0] for _ in range(20_000)]
    assert abs(texts.count("") - 2000) < 200


def bits(state):
    return [t.clone() for t in (*state.params.values(), *state.mean.values(), *(m for s in state.optimizer.state.values() for m in s.values()))]


@pytest.mark.parametrize("spike", ["loss", "gradient", "nan"])
def test_a_spike_leaves_weights_optimizer_and_mean_as_they_were(tmp_path, spike):
    started = start(tmp_path, "--steps", 9)
    steps, forward = started.steps(), started.learner.forward
    next(steps), next(steps)
    before = bits(started.state)
    bad = {"loss": lambda x: x + 1e4, "gradient": lambda x: 1e4 * x - (1e4 - 1) * x.detach(), "nan": lambda x: x * math.nan}
    started.learner.forward = lambda rows: (bad[spike](forward(rows)[0]), None)
    report = next(steps)
    assert {"loss": "20 times", "gradient": "25 times", "nan": "nan"}[spike] in report.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, bits(started.state), strict=True))
    assert started.state.guard.skipped == 1 and started.state.updates == 2 and started.state.step == 3
    started.learner.forward = forward
    assert next(steps).skipped is None and not all(torch.equal(a, b) for a, b in zip(before, bits(started.state)))


def test_examples_of_ones_own(tmp_path):
    asked = []

    def night(rng, i):
        asked.append(i)
        return data.Example("a black night", (), Image.new("RGB", (64, 64)))
    run = train.Run(train.options(["--batch", "2", "--steps", "2", "--data", "night", "--out", str(tmp_path)]), dict(night=night))
    assert [r.skipped for r in run.steps()] == [None, None] and {e.prompt for e in run.shown} == {"a black night"} and {0, 1, 2, 3} <= set(asked)


def test_the_guard_can_be_switched_off_and_stops_after_ten_in_a_row(tmp_path):
    def always_nan(switch):
        started = start(tmp_path, "--steps", 20, switch)
        started.learner.forward = lambda rows: (sum(p.sum() for p in started.state.params.values()).expand(2) * math.nan, None)
        return started
    started = always_nan("--guard")
    with pytest.raises(ValueError, match="ten steps in a row.*--lr"):
        list(started.steps())
    assert started.state.updates == 0
    assert len(list(always_nan("--no-guard").steps())) == 20


def test_a_skipped_step_is_logged_with_its_examples_and_without_nan(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)                           # as on Windows: memory is not known
    started = start(tmp_path, "--accumulate", 2, "--sheet-every", 0)
    read, forward = [], started.learner.forward

    def second_is_nan(rows):
        read.append([example.prompt for example, _ in rows])
        losses, times = forward(rows)
        return (losses * math.nan if len(read) == 3 else losses), times
    started.learner.forward = second_is_nan
    train.train(started)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    first, second, third = (json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in lines)
    assert first["examples"] is third["examples"] is first["memory_gb"] is None
    assert second["loss"] is None and "nan" in second["skipped"] and second["examples"] == read[2] + read[3]
    train.curves(tmp_path)
    assert (tmp_path / "curves.png").is_file()


def test_guard_limits():
    guard = Guard()
    assert guard.refuses(1.0, 0.1) is None and guard.refuses(19.9, 0.9) is None                        # below 1 a norm is never a spike
    assert guard.loss == pytest.approx(0.99 + 0.199) and guard.norm == pytest.approx(0.099 + 0.009)
    assert "20 times" in guard.refuses(24, 0.1) and "25 times" in guard.refuses(1, 3) and guard.refuses(1, 2e6) and guard.refuses(math.inf, 1)
    assert guard.skipped == guard.in_a_row == 4 and guard.loss == pytest.approx(1.189)                # what was refused is not in the means
    assert guard.refuses(1, 0.1) is None and guard.in_a_row == 0


def losses(started):
    return [x for r in started.steps() for x in (r.loss, r.norm)]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    for stage in ("t2i", "edit", "mllm"):
        assert losses(start(tmp_path / "a", "--grad-checkpoint", stage=stage)) == pytest.approx(losses(start(tmp_path / "b", stage=stage)), rel=1e-5)


def test_cached_latents_change_nothing_and_go_with_size_and_weights(tmp_path):
    (tmp_path / "data").mkdir()
    lines = []
    for i in range(6):
        world.render(world.sample_scene(random.Random(i))).save(tmp_path / "data" / f"{i}.png")
        lines.append(json.dumps(dict(file_name=f"{i}.png", text=str(i))))
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    how = ("--data", tmp_path / "data", "--steps", 6)
    want = losses(start(tmp_path / "plain", *how))
    assert losses(start(tmp_path / "run", "--cache-latents", *how)) == want
    kept = list((tmp_path / "run" / "latents").glob("*/*.safetensors"))
    assert len(kept) == 6
    again = start(tmp_path / "run", "--cache-latents", *how)
    again.model.dcae.encode = None                                              # it is not needed any more
    assert losses(again) == want
    scaled = copy.copy(again.model)
    scaled.config = dataclasses.replace(scaled.config, dcae=dataclasses.replace(scaled.config.dcae, scaling_factor=2.0))
    assert data.Latents(scaled, argparse.Namespace(**vars(again.a) | dict(out=tmp_path / "scaled"))).folder.name != kept[0].parent.name
    other = start(tmp_path / "run", "--cache-latents", "--size", 32, *how)
    assert losses(other) != want and not kept[0].exists()                       # another size: the old ones are gone
    with torch.no_grad():
        other.model.dcae.encoder.conv_in.weight += 1
    changed = data.Latents(other.model, other.a)
    assert changed.folder != other.learner.extra.folder and changed.known(str(tmp_path / "data" / "0.png")) is None


def test_overfit_trains_on_one_batch(tmp_path):
    started = start(tmp_path, "--overfit")
    seen, forward = [], started.learner.forward
    started.learner.forward = lambda rows: seen.append([example.prompt for example, _ in rows]) or forward(rows)
    list(started.steps())
    assert seen[0] == seen[1] == seen[2]


def test_what_learns_is_float32_and_what_is_frozen_is_not(tmp_path):
    started = start(tmp_path, "--dtype", "bfloat16")
    next(started.steps())
    assert {p.dtype for p in started.state.params.values()} == {torch.float32} and {p.grad for p in started.state.params.values()} == {None}
    assert {t.dtype for s in started.state.optimizer.state.values() for t in s.values()} == {torch.float32}
    assert started.model.mllm.embed.weight.dtype == started.model.dit.proj_out.weight.dtype == torch.bfloat16
    named = {n for n, p in started.model.named_parameters() if p.requires_grad}
    assert len(named) == len(started.state.params) == sum(len(g["params"]) for g in started.state.optimizer.param_groups)


def test_a_trained_model_exported_and_read_again_gives_the_same_picture(tiny_folder, tmp_path):
    """The tiny checkpoint, some steps on, through the released layout and back."""
    how = ("--model", tiny_folder, "--size", 32, "--steps", 3, "--sheet-every", 0)
    started = start(tmp_path / "run", *how)
    list(started.steps()), started.save()
    for args in (("--export", tmp_path / "run", "--out", tmp_path / "public"),
                 ("--qwen", TINY / "qwen", "--sana", TINY / "sana", "--tbac", tmp_path / "public", "--out", tmp_path / "back")):
        done = run("weights_convert.py", *args)
        assert done.returncode == 0, done.stderr
    picture = lambda folder: sample.generate(TBAC.load(folder), ["a dog"], steps=3, generator=torch.Generator().manual_seed(0))[0].tobytes()
    assert picture(tmp_path / "run") == picture(tmp_path / "back") != picture(tiny_folder)


def test_names_of_what_each_vision_token_shows():
    """The classes of stage `vit`: a small thing in one unit of 4 x 4, a large one in a block of units, the background elsewhere."""
    scene = world.Scene((world.Thing("circle", "red", "small", 0.375, 0.125), world.Thing("cross", "blue", "large", 0.75, 0.75)), "grey")
    names = parts.Names(parts.TOY)
    rows = list(names.shown(scene, 4, 4))
    assert [r["shape"] for r in rows] == ["nothing", "circle", "nothing", "nothing"] + ["nothing"] * 4 + ["nothing", "nothing", "cross", "cross"] * 2
    assert rows[1] == dict(colour="red", shape="circle", size="small", spot="top", column=3, row=1, background="grey")
    assert rows[0] == dict(colour="nothing", shape="nothing", spot="top left", column=1, row=1, background="grey")
    assert rows[10]["spot"] == "bottom right" and rows[10]["size"] == "large"


def test_blanks_tell_each_thing_in_turn():
    """What the text says, and no exact place; with a picture, column by column, and in eighths of the side."""
    scene = world.Scene((world.Thing("circle", "red", "small", 0.2, 0.2), world.Thing("cross", "blue", "large", 0.75, 0.2)))
    blanks = parts.Blanks(parts.TOY)
    said = list(blanks.shown([(t, False) for t in scene.things[::-1]], scene, exact=False))
    seen = list(blanks.shown(parts.became(scene, scene), scene, exact=True))
    assert [t["colour"] for t in said] == ["blue"] * 4 + ["red"] * 4 + ["nothing"] * 8
    assert said[0] == dict(colour="blue", shape="cross", size="large", spot="top right", side="right of", background="white", changed=False)
    assert [t["colour"] for t in seen] == ["red"] * 4 + ["blue"] * 4 + ["nothing"] * 8 and (seen[4]["column"], seen[4]["row"]) == (6, 1)
    which = blanks.indices(said)
    assert which.shape == (16, 9) and which[0].tolist() == [2, 3, 2, 2, -100, -100, 1, 0, 0] and which[15].tolist()[2:7] == [-100] * 5


def test_words_that_point_at_a_thing_end_in_the_token_that_tells_it(tmp_path, monkeypatch):
    """The facts of stage mllm, and the states that they are asked of: those of the token in which the words end, in rows of any length."""
    scene = world.Scene((world.Thing("circle", "red", "small", 0.2, 0.2), world.Thing("cross", "blue", "large", 0.75, 0.2)))
    assert language.mentions("is the circle left of the blue cross?", scene) == [(13, scene.things[0]), (36, scene.things[1])]
    assert language.mentions("how many circles, and a red circle?", scene) == []
    started, asked = start(tmp_path, stage="mllm"), []
    mllm, extra = started.model.mllm, started.learner.extra
    monkeypatch.setattr(extra, "forward", lambda states, told: asked.append((states, told)) or states.sum() * 0)
    long = (parts.ASK, scene, [("what is below the cross?", "nothing"), ("where is the red circle?", "left of the blue cross")], None)
    short = (parts.ASK, scene, [("what shape is the red object?", "circle")], None)
    parts.mllm_loss(started.model, extra, [(row, random.Random(0)) for row in (short, long)], started.a)
    (states, told), = asked
    assert [t["shape"] for t in told] == ["circle", "cross", "circle"] and states.shape[:2] == (9 - extra.DEPTH, 3)
    batch = mllm.prepare([short[2][0][0]], [[world.render(scene)]])
    words = mllm.tokenizer.encode(" object")
    assert batch.ids[0].tolist().count(words[-1]) == 1
    place = batch.ids[0].tolist().index(words[-1])
    assert relative(mllm(mllm.read(batch), batch.positions, batch.real)[-1][0, place], states[-1, 0]) < 1e-5


def test_each_thing_keeps_its_place_in_the_list_through_an_edit():
    right, left = world.Thing("circle", "red", "small", 0.8, 0.2), world.Thing("cross", "blue", "large", 0.2, 0.2)
    scene, green, new = world.Scene((right, left)), world.Thing("circle", "green", "small", 0.8, 0.2), world.Thing("square", "red", "small", 0.5, 0.8)
    targets = (scene.things, (green, left), (right,), (right, left, new))
    same, gone = [(left, False), (right, False)], [(None, True), (right, False)]
    assert [parts.became(scene, world.Scene(things)) for things in targets] == [same, [same[0], (green, True)], gone, [*same, (new, True)]]
    told = list(parts.Blanks(parts.TOY).shown(gone, world.Scene((right,)), exact=True))
    assert (told[0]["colour"], told[0]["changed"]) == ("nothing", True) and (told[4]["colour"], told[4]["side"]) == ("red", "none")
