"""Runs that are trained together: they learn what single runs learn, go on where they were stopped,
and are scored as lab.evaluate scores."""
import dataclasses
import itertools
import pathlib
import random
import subprocess
import sys

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import train
from engine import fast
from engine.pictures import to_pixels
from engine.state import checkpoints
from lab import ablate, evaluate, plan, trials
from ladder import WIRINGS
from sample import TOY_FOLDER
from tbac import TBAC
from tests.conftest import ROOT, relative
from toy import world

ARMS = (plan.Arm(), plan.Arm("final", shift=1.0))


def options(out, *more):
    start = trials.all_of(TOY_FOLDER, pathlib.Path(out) / "start")
    words = ["primary", "--start", start, "--out", out, "--batch", 3, "--steps", 4, "--looks", 2,
             "--n", 1, "--draw-steps", 1, "--device", "cpu", "--dtype", "float32", "--width", 4,
             "--jobs", 1, "--workers", 0, *more]
    return ablate.options(list(map(str, words)))


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    """Never-seen pairs take long to find."""
    few = [case for category in evaluate.GENEVAL
           for case in evaluate.first(1, evaluate.draw_case, category, False)]
    monkeypatch.setattr(trials, "cases", lambda args: few)


def single(run):
    """The model of one run by itself, as train.py would build it."""
    model = TBAC.load(TOY_FOLDER)
    model.config = dataclasses.replace(model.config, wiring=run.arm.wiring)
    model.ladder = model.config.build_ladder()
    model.ladder.init_weights(torch.Generator().manual_seed(run.seed))
    return fast.enable(model)


# --------------------------------------------------------------------------------- the parts

def other_toy(folder):
    """The toy with each part made larger by another factor."""
    model = TBAC.load(TOY_FOLDER)
    with torch.no_grad():
        for factor, part in enumerate((model.mllm, model.dit, model.dcae), 2):
            for p in part.parameters():
                p *= factor
    model.save(folder)
    return model


@pytest.mark.parametrize("mllm", plan.MLLMS)
def test_a_dit_comes_with_the_autoencoder_that_it_has_learnt_with(tmp_path, mllm):
    """What lies beside an MLLM has learnt nothing."""
    args = options(tmp_path)
    folder = tmp_path / "start" / trials.MLLM_FOLDERS[mllm]
    folder.unlink()
    other = other_toy(folder)
    found, toy = trials.base_model(args, mllm), TBAC.load(TOY_FOLDER)
    wanted = dict(dit=toy.dit, dcae=toy.dcae)
    if mllm != "random":
        wanted["mllm"] = other.mllm
    for name, part in wanted.items():
        tensors = getattr(found, name).state_dict()
        assert all(torch.equal(t, tensors[key]) for key, t in part.state_dict().items()), name
    # Of random weights' arms none is left of the matrices in that folder.
    key = "layers.0.attn.q.weight"
    same = torch.equal(found.mllm.state_dict()[key], other.mllm.state_dict()[key])
    assert same == (mllm != "random")


# --------------------------------------------------------------------------------------- training

@pytest.mark.slow
def test_a_stacked_run_is_a_single_run(tmp_path):
    """Three steps by TBAC.loss, train.py's optimizer and its rate: the same losses, and what is
    learnt is the same."""
    args = options(tmp_path, "--steps", 200)
    runs = [plan.Run(arm, seed) for seed in (0, 1) for arm in ARMS]
    group = trials.Group(runs, args)
    assert [len(own) for _, own in group.stacks] == [4]
    before = {name: p.detach().clone() for name, p in group.state.params.items()}
    given = list(itertools.islice(group.batches(), 3))
    found = torch.stack([group.step(inputs)[0] for inputs in given])            # (steps, N)
    examples = iter(trials.Group(runs, args).reader)
    batches = [list(itertools.islice(examples, 3)) for _ in range(3)]
    words = ["--steps", "200", "--lr", str(plan.LR), "--wiring", "ladder", "--out",
             str(tmp_path / "single")]
    settings = train.options(words)
    for i, run in enumerate(runs):
        model = single(run)
        params = {name: p for name, p in model.named_parameters()
                  if name.startswith(("ladder.", "dit."))}
        optimizer = train.adamw(params, settings)
        for step, batch in enumerate(batches):
            drops = [random.Random(f"{step} {number}") for number, _ in batch]
            prompts = [train.drop_condition(example, rng, 0.1)[0]
                       for rng, (_, example) in zip(drops, batch)]
            pixels = to_pixels([example.target for _, example in batch], "cpu")
            t, eps = trials.noise_of_step(run.seed, step, (3, 16, 8, 8))
            x0 = model.dcae.encode(pixels)
            loss = model.loss(x0, prompts, t=train.shifted(t, run.arm.shift), eps=eps).mean()
            loss.backward()
            assert relative(found[step, i], loss.detach()) < 1e-5
            clip_grad_norm_(params.values(), settings.clip)
            for param_group in optimizer.param_groups:
                param_group["lr"] = train.learning_rate(step, settings)
            optimizer.step()
            optimizer.zero_grad()
        for name, p in params.items():
            start, end = before[f"0.{name}"][i], group.state.params[f"0.{name}"][i]
            # A key's bias changes no softmax: its gradient is rounding, which AdamW makes large.
            if not name.endswith("cross.k.bias"):
                moved = (end - start).view_as(p)
                assert relative(moved, p.detach() - start.view_as(p)) < 2e-2, name


def test_each_model_is_clipped_by_its_own_norm():
    params = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2, 2, 2))]
    params[0].grad = torch.tensor([[3.0, 0, 0], [0.3, 0, 0]])
    params[1].grad = torch.tensor([[[4.0, 0], [0, 0]], [[0.4, 0], [0, 0]]])
    want = []
    for i in range(2):
        own = [torch.nn.Parameter(p[i].detach().clone()) for p in params]
        for p, of_all in zip(own, params):
            p.grad = of_all.grad[i].clone()
        want.append((clip_grad_norm_(own, trials.RECIPE.clip), [p.grad for p in own]))
    norms = trials.clip_each(params)
    for i, (norm, grads) in enumerate(want):
        assert norms[i] == pytest.approx(norm.item())
        assert all(torch.allclose(p.grad[i], grad) for p, grad in zip(params, grads))


class Bar:
    """In place of tqdm."""
    n = 0

    def update(self, n):
        self.n += n


def never():
    return False


def after(n):
    """Says stop after n steps."""
    asked = iter(range(n + 1))
    return lambda: next(asked) == n


@pytest.mark.parametrize("ahead", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_what_was_stopped_goes_on_bit_by_bit(tmp_path, monkeypatch, ahead):
    """Where inputs are made ahead, as on a GPU, other prompts are padded together: within
    rounding."""
    monkeypatch.setitem(trials.AHEAD, "cpu", ahead)
    runs = [plan.Run(plan.Arm(wiring), 0) for wiring in ("ladder", "routed")]
    whole = trials.Group(runs, options(tmp_path / "a"))
    args = whole.args
    assert whole.train(trials.looks(args, runs), map, never, Bar())
    assert not whole.folder.exists()

    args = options(tmp_path / "b")
    first = trials.Group(runs, args)
    assert not first.train(trials.looks(args, runs), map, after(3), Bar())
    assert len(checkpoints(first.folder)) == 1
    second, bar = trials.Group(runs, args), Bar()
    assert second.state.step == 3
    assert second.train(trials.looks(args, runs), map, never, bar)
    assert bar.n == 2 * args.steps
    for name, p in whole.state.params.items():
        if ahead == 1:
            assert torch.equal(p, second.state.params[name]), name
        elif not name.endswith("cross.k.bias"):
            assert relative(second.state.params[name], p) < 1e-4, name
    for run in runs:
        found = trials.result(args, run)
        assert found["scores"].keys() == {"2", "4"} and found["arm"]["wiring"] == run.arm.wiring
        assert found["scores"] == trials.result(whole.args, run)["scores"]


def test_nothing_is_trained_twice(tmp_path, monkeypatch):
    args = options(tmp_path, "--steps", 1, "--looks", 1)
    runs = plan.PARTS["primary"].runs(1)
    assert trials.train_all(runs, args, never)
    built = []
    monkeypatch.setattr(trials, "Group", lambda runs, args: built.append(runs))
    assert trials.train_all(runs, args, never) and not built


def test_a_group_whose_writing_was_cut_short_goes_on_as_one(tmp_path):
    """Its checkpoint is of all its runs; and the groups behind it stay what they are."""
    args = options(tmp_path, "--steps", 1, "--looks", 1, "--together", 2)
    runs = plan.PARTS["primary"].runs(2)
    first, second = trials.groups_of(runs, args)
    (trials.group_folder(first, args) / "checkpoints" / "step-00000001").mkdir(parents=True)
    done = dict(scores={"1": "0"})
    for run in first[:1] + second[:1]:
        folder = trials.folder_of(args, run.arm.mllm)
        trials.write_json(folder / f"{run.name}.json", done)
    assert trials.groups_of(runs, args) == [first, second[1:]]


HOLD = """
import pathlib, sys
from engine.runs import lock
with lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_share_a_study(tmp_path):
    """Each takes groups that the other does not work at."""
    args = options(tmp_path, "--steps", 1, "--looks", 1, "--together", 2)
    runs = plan.PARTS["primary"].runs(2)
    first, second = trials.groups_of(runs, args)
    assert [run.seed for run in first + second] == [0, 0, 1, 1]
    held = trials.group_folder(first, args)
    held.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, held]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert not trials.train_all(runs, args, never)
        assert [trials.is_finished(args, run) for run in runs] == [False, False, True, True]
        other.communicate()
    assert trials.groups_of(runs, args) == [first]
    assert trials.train_all(runs, args, never)


def test_a_model_that_is_not_finite_is_named(tmp_path):
    """It is neither saved nor scored: its pictures would just be wrong."""
    group = trials.Group([plan.Run(plan.Arm(), 0)], options(tmp_path))
    with torch.no_grad():
        group.state.params["0.ladder.queries"][0, 0, 0] = torch.nan
    for do in (group.save, lambda: group.write_scores([], map)):
        with pytest.raises(ValueError, match=r"step 0: \w+.0.ladder.queries has values"):
            do()


def test_a_run_may_be_stopped_before_its_next_step(tmp_path):
    """Twice at once: the checkpoint is there already."""
    args = options(tmp_path)
    for _ in range(2):
        group = trials.Group([plan.Run(plan.Arm(), 0)], args)
        assert not group.train({}, map, after(0), Bar())
        assert [folder.name for folder in checkpoints(group.folder)] == ["step-00000000"]


def test_other_stacks_do_not_go_on(tmp_path):
    runs = [plan.Run(plan.Arm(wiring), 0) for wiring in ("ladder", "final")]
    trials.Group(runs, options(tmp_path)).save()
    with pytest.raises(ValueError, match="the --width that it began with"):
        trials.Group(runs, options(tmp_path, "--width", "1"))


def test_runs_that_end_together_are_finished_together(tmp_path):
    """Killed while the second stack is graded, the first is not finished either: it goes on from
    the checkpoint that both share."""
    args = options(tmp_path)
    runs = [plan.Run(plan.Arm(wiring), 0) for wiring in ("ladder", "routed")]
    group = trials.Group(runs, args)
    assert len(group.stacks) == 2
    graded = []

    def grade(*given):
        if graded:
            raise KeyboardInterrupt
        graded.append(given)
        return map(*given)

    with pytest.raises(KeyboardInterrupt):
        group.write_scores(trials.cases(args), grade)
    assert graded and not any(trials.result(args, run)["scores"] for run in runs)


# ----------------------------------------------------------------------------------------- scores

def test_scores_are_those_of_evaluate(tmp_path):
    """The shipped model, in a stack with one that paints noise, by the same pictures as
    lab.evaluate draws. The DiT that it started from may have been saved with another guidance."""
    args = options(tmp_path, "--draw-steps", 10)
    group = trials.Group([plan.Run(plan.Arm(mllm="facts"), seed) for seed in (0, 1)], args)
    toy = TBAC.load(TOY_FOLDER)
    with torch.no_grad():
        for name, p in toy.named_parameters():
            if name.startswith(("ladder.", "dit.")):
                of_stack = group.state.params[f"0.{name}"]
                of_stack.copy_(p.view(of_stack[0].shape))
        group.state.params["0.dit.proj_out.weight"][1] = 0
    prompts = evaluate.first(4, evaluate.draw_case, "position", False)
    stack, _ = group.stacks[0]
    stack.config = dataclasses.replace(stack.config, guidance=1.0)
    assert toy.config.guidance == plan.GUIDANCE
    found = group.score(stack, prompts, map)
    scores, _ = evaluate.score("draw", prompts, 1, lambda rows: evaluate.paint(
        toy, rows, 0, 32, steps=10))
    want = scores["draw", "position", "category", "seen"]
    assert any(want) and found.tolist() == [want, [0] * 4]


# -------------------------------------------------------------------------------------- examples

def drawn_scenes(n, **held_out):
    rng = random.Random(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "render", lambda scene, size: scene)
        return [train.draw_example(rng, i, 64, **held_out).target for i in range(n)]


@pytest.mark.parametrize("n", [2, 6, 12])
def test_held_out_pairs_stand_alone_only(n):
    """And there are as many things as where fewer are held out: 30, 45, 15 and 10 of 100 scenes
    have one to four, but every fifth has three different ones, or three in a row."""
    held_out = plan.pairs_held_out(n)
    assert len(held_out) == n and held_out >= world.HELD_OUT
    assert n == 2 or held_out > plan.pairs_held_out(n // 2)
    scenes = drawn_scenes(900, held_out=held_out)
    alone, beside = set(), set()
    for things in (scene.things for scene in scenes):
        (alone if len(things) == 1 else beside).update((t.colour, t.shape) for t in things)
    assert len(alone) == 24
    assert beside == {(c, s) for c in world.COLOURS for s in world.SHAPES} - held_out
    found = [sum(len(scene.things) == k for scene in scenes) / 900 for k in (1, 2, 3, 4)]
    expected = [0.8 * share for share in (0.3, 0.45, 0.15, 0.1)]
    expected[2] += 0.2
    assert found == pytest.approx(expected, abs=0.05)


def test_what_the_world_holds_out_is_what_training_does():
    assert drawn_scenes(60) == drawn_scenes(60, held_out=plan.pairs_held_out(2))


def test_half_of_the_pairs_leave_every_colour_and_shape():
    pairs = plan.pairs_held_out(12)
    assert [sum(c == colour for c, _ in pairs) for colour in world.COLOURS] == [2] * 6
    assert [sum(s == shape for _, s in pairs) for shape in world.SHAPES] == [3] * 4


# ------------------------------------------------------------------------------------- the plan

def test_the_plan_is_what_was_announced():
    """One primary question; every comparison is between arms of its own part; every wiring is
    there; at least five seeds."""
    primary = plan.PARTS["primary"]
    assert primary.compared == (("ladder", "final"),) and primary.seeds >= 5
    assert {arm.mllm for arm in primary.arms.values()} == {"gist"}
    assert [name for name in plan.PARTS if plan.is_long(name)] == ["primary", "penultimate"]
    assert plan.PARTS["wirings"].arms.keys() == set(WIRINGS)
    for part in plan.PARTS.values():
        assert part.seeds >= 5 and part.compared
        assert {label for pair in part.compared for label in pair} <= part.arms.keys()
        names = [run.name for run in part.runs()]
        assert len(set(names)) == len(names) == part.seeds * len(part.arms)


def test_parts_share_their_runs():
    runs = [run for part in plan.PARTS.values() for run in part.runs()]
    assert len(set(runs)) < len(runs)
    assert len({run.name for run in runs}) == len(set(runs))
    assert {run.examples for run in plan.PARTS["primary"].runs()} == {("gist", 2)}
    assert set(plan.PARTS["primary"].runs()) < set(plan.PARTS["penultimate"].runs())
