"""Checkpoints: a run that was stopped, killed, or had no room goes on as if nothing had
happened."""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import train
from engine.files import write_shards
from engine.log import read_log
from engine.state import State, checkpoints, ema_weights, model_tensors
from tests.conftest import ROOT, run

TOY = ("--stage", "mix", "--batch", 2, "--warmup", 2, "--sheet-every", 0, "--dtype", "float32")


def toy_run(out, *args):
    return train.Run(train.options([str(x) for x in (*TOY, "--out", out, *args)]))


def losses(out):
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


def state_of(out):
    last = checkpoints(out)[-1]
    return load_file(last / "model.safetensors"), json.loads((last / "state.json").read_text())


@pytest.mark.parametrize("more", [
    (), ("--dtype", "bfloat16", "--accumulate", 2, "--workers", 2)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, more):
    whole, half = tmp_path / "whole", tmp_path / "half"
    for out, steps in ((whole, 5), (half, 2), (half, 5)):
        first = toy_run(out, *more, "--steps", 5, "--save-every", 100, "--resume")
        out.mkdir(exist_ok=True)
        for report in first.steps():
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(dict(step=report.step, loss=report.loss)) + "\n")
            if report.step == steps:
                break
        first.save()
    assert losses(whole) == losses(half) and len(losses(whole)) == 5
    (a, counters), (b, again) = state_of(whole), state_of(half)
    assert counters == again and a.keys() == b.keys()
    assert counters["seen"] == 5 * 2 * (2 if more else 1)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert {n.split(".")[0] for n in a} == {"param", "ema", "exp_avg", "exp_avg_sq", "step"}


@pytest.mark.slow
def test_the_last_ones_stay_and_a_half_written_one_is_never_picked_up(tmp_path):
    done = run("train.py", *TOY, "--steps", 4, "--save-every", 1, "--keep", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [f.name for f in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    new = tmp_path / "checkpoints" / ".new"
    new.mkdir()
    (new / "model.safetensors").write_bytes(b"half")
    done = run("train.py", "--resume", "--steps", 5, "--out", tmp_path)
    assert done.returncode == 0 and list(losses(tmp_path)) == [1, 2, 3, 4, 5], done.stderr
    assert not new.exists()


def start(out, *args):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, (*TOY, "--out", out, *args))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def wait_for_steps(out, n):
    log = out / "log.jsonl"
    while not log.is_file() or len(log.read_text().splitlines()) < n:
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(tmp_path, number):
    """Also one to the whole group, which the helpers that read data are part of."""
    process = start(tmp_path, "--steps", 1000, "--save-every", 1000, "--workers", 2)
    wait_for_steps(tmp_path, 3)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in out, err
    assert state_of(tmp_path)[1]["step"] == max(losses(tmp_path))


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_a_clear_error_and_the_checkpoint_before_is_whole(tmp_path, monkeypatch):
    first = toy_run(tmp_path, "--steps", 3, "--save-every", 1)
    reports = first.steps()
    next(reports)
    first.save()
    before = state_of(tmp_path)
    model = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("engine.files.save_file", full_disk)
    next(reports)
    message = "step 2 could not be saved: .*No space left.*step-00000001 is whole"
    with pytest.raises(ValueError, match=message):
        first.save()
    after = state_of(tmp_path)
    assert before[1] == after[1]
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert (tmp_path / "model.safetensors").read_bytes() == model
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def main(monkeypatch, out, *args):
    monkeypatch.setattr(sys, "argv", [str(x) for x in ("train.py", *TOY, "--out", out, *args)])
    # pytest keeps its own handlers; curves take seconds.
    monkeypatch.setattr("engine.distributed.signal.signal", lambda *_: None)
    monkeypatch.setattr("engine.log.plot_curves", lambda out: None)
    train.main()


@pytest.mark.parametrize("where, error, args", [
    ("engine.log.open", OSError(28, "No space left on device"), ()),
    ("engine.options.write_text", OSError(28, "No space left on device"), ()),
    ("engine.log.contact_sheet", OSError(28, "No space left on device"), ("--sheet-every", 1)),
    ("engine.data.save_file", SafetensorError("No space left"), ()),
])
def test_a_full_disk_is_a_clear_error_wherever_it_strikes(tmp_path, monkeypatch, where, error,
                                                          args):
    def full(*_, **__):
        raise error

    images = ROOT / "tests" / "fixtures" / "tiny" / "images"
    (tmp_path / "a.png").write_bytes(next(images.glob("*.png")).read_bytes())
    record = json.dumps(dict(source="a.png", text="x", target="a.png"))
    (tmp_path / "metadata.jsonl").write_text(record)
    monkeypatch.setattr(where, full, raising=False)
    with pytest.raises(SystemExit, match="error: .*No space left"):
        main(monkeypatch, tmp_path / "out", "--steps", 1, "--cache-latents", "--data", tmp_path,
             *args)


def test_a_half_line_at_the_end_of_the_log_spoils_nothing(tmp_path, monkeypatch):
    main(monkeypatch, tmp_path, "--steps", 1)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 2, "lo')
    main(monkeypatch, tmp_path, "--steps", 2, "--resume")
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_steps_that_a_run_took_again_or_gave_up_do_not_count(tmp_path):
    """Killed at step 5; goes on from 2; killed; begun anew."""
    told = [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (3, 1), (4, 1), (1, 2), (2, 2)]
    for n, steps in ((5, [1, 2, 3, 4, 5]), (6, [1, 2, 3]), (7, [1, 2, 3, 4]), (9, [1, 2])):
        rows = [json.dumps(dict(step=step, loss=run)) for step, run in told[:n]]
        (tmp_path / "log.jsonl").write_text("\n".join(rows))
        found = read_log(tmp_path)
        assert [row["step"] for row in found] == steps
        assert found[-1]["loss"] == told[n - 1][1]


def test_a_run_does_not_go_on_with_other_frozen_weights(tmp_path):
    first = toy_run(tmp_path / "run", "--steps", 1)
    list(first.steps())
    first.save()
    with torch.no_grad():
        first.model.dcae.decoder.conv_in.weight.mul_(1.01)
    first.model.save(tmp_path / "other")
    with pytest.raises(ValueError, match="what does not learn .* had other weights in this run"):
        toy_run(tmp_path / "run", "--steps", 2, "--resume", "--model", tmp_path / "other")
    # A checkpoint from before this was kept.
    file = checkpoints(tmp_path / "run")[-1] / "state.json"
    counters = json.loads(file.read_text())
    assert len(counters.pop("frozen")) == 16
    file.write_text(json.dumps(counters))
    toy_run(tmp_path / "run", "--steps", 2, "--resume", "--model", tmp_path / "other")


@pytest.mark.parametrize("words, says", [
    (["--stage", "edit"], "--resume goes on with --stage mix"),
    (["--preset", "paper"], "--resume goes on with --preset toy")])
def test_another_stage_is_another_run(tmp_path, monkeypatch, capsys, words, says):
    main(monkeypatch, tmp_path, "--steps", 1)
    resumed = ["--out", str(tmp_path), "--resume", "--steps", "2"]
    with pytest.raises(SystemExit):
        train.options([*resumed, *words])
    assert says in capsys.readouterr().err
    for same in ([], ["--stage", "mix"]):
        assert train.options([*resumed, *same]).stage == "mix"


def test_a_folder_that_holds_a_run_is_not_begun_anew(tmp_path):
    first = toy_run(tmp_path, "--steps", 2)
    next(first.steps())
    first.save()
    with pytest.raises(ValueError, match="holds a run already: --resume, or another --out"):
        toy_run(tmp_path, "--steps", 2)


def test_a_resume_with_nothing_left_to_do_writes_the_model(tmp_path, monkeypatch, capsys):
    main(monkeypatch, tmp_path, "--steps", 1, "--resume")
    assert f"no checkpoint in {tmp_path}" in capsys.readouterr().out
    model, (weights, counters) = (tmp_path / "model.safetensors").read_bytes(), state_of(tmp_path)
    # As if it had been killed between checkpoint and model.
    (tmp_path / "model.safetensors").unlink()
    left = tmp_path / ".new-a1b2c3d4"
    left.mkdir()
    (left / "part-0").write_bytes(b"half")
    main(monkeypatch, tmp_path, "--steps", 1, "--resume")
    assert f"goes on from {tmp_path}/checkpoints/step-00000001" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_bytes() == model
    assert not left.exists()
    after, counters_after = state_of(tmp_path)
    assert counters_after == counters
    assert all(torch.equal(t, weights[n]) for n, t in after.items())


# ---- the state by itself

def state(ema=0.9, names=("a", "b")):
    args = argparse.Namespace(weight_decay=0.1, lr=0.1, betas=[0.9, 0.999], warmup=0, steps=10,
                              min_lr_ratio=0.1)
    trained = {n: torch.nn.Parameter(torch.ones(2)) for n in names}
    return State(trained, lambda params: train.adamw(params, args), ema), args


def test_the_mean_is_short_at_first_and_is_what_is_saved():
    s, _ = state(ema=0.9)

    def update(value):
        for p in s.params.values():
            p.data.fill_(value)
        s.update_ema()
        return s.ema["a"][0].item()

    assert update(12) == pytest.approx((1 + 10 * 12) / 11)
    s.updates = 1000
    assert update(1) == pytest.approx(0.9 * 11 + 0.1 * 1)
    saved = dict(model_tensors(s, {}))
    assert torch.equal(saved["a"], s.ema["a"]) and not torch.equal(saved["a"], s.params["a"])


def test_the_mean_is_lent_to_the_model_and_given_back():
    s, args = state()
    steps(s, args, "ab")
    own = {n: p.detach().clone() for n, p in s.params.items()}
    assert not torch.equal(own["a"], s.ema["a"])
    with ema_weights(s):
        assert all(torch.equal(s.params[n], s.ema[n]) for n in "ab")
    assert all(torch.equal(s.params[n], own[n]) for n in "ab")


def stored(s, folder):
    folder = folder / f"step-{s.step:08d}"
    folder.mkdir(parents=True)
    write_shards(folder, s.tensors())
    (folder / "state.json").write_text(json.dumps(s.counters()))
    return folder


def steps(s, args, *which):
    """Steps in which only these parameters have a gradient."""
    for names in which:
        for n, p in s.params.items():
            p.grad = torch.full_like(p, 1 + s.step) if n in names else None
        for group in s.optimizer.param_groups:
            group["lr"] = train.learning_rate(s.step, args)
        s.optimizer.step()
        s.update_ema()
        s.step += 1
        s.seen += 1


def test_a_parameter_without_a_gradient_in_some_steps_goes_on_exactly(tmp_path):
    s, args = state()
    # Nothing of b is there to be stored.
    steps(s, args, "a", "a")
    t, _ = state()
    t.load(stored(s, tmp_path / "1"))
    steps(s, args, "ab", "a")
    steps(t, args, "ab", "a")
    u, _ = state()
    u.load(stored(t, tmp_path / "2"))
    steps(s, args, "ab")
    steps(u, args, "ab")
    assert all(torch.equal(s.params[n], u.params[n]) for n in "ab")
    assert all(torch.equal(s.ema[n], u.ema[n]) for n in "ab")
    assert [u.optimizer.state[u.params[n]]["step"].item() for n in "ab"] == [5, 2]


@pytest.mark.parametrize("world, factor, fits", [
    (1, 1, True), (2048, 1, True), (2048, 2000, False)])
def test_what_has_been_passed_fits_what_was_seen(world, factor, fits, tmp_path):
    """Offsets count in the one order of all processes, however many these are."""
    s, _ = state()
    s.step, s.seen = 10, 10 * world
    s.history = [(world, [factor * (s.seen + i) for i in range(world)])]
    folder = stored(s, tmp_path)
    if fits:
        return state()[0].load(folder)
    with pytest.raises(ValueError, match="examples were passed, and seen says 20480"):
        state()[0].load(folder)


def test_a_mean_begins_and_ends_where_a_run_goes_on(tmp_path):
    without, args = state(ema=0)
    steps(without, args, "ab")
    s, _ = state()
    s.load(stored(without, tmp_path / "without"))
    # Not from the weights that the run once began with.
    assert all(torch.equal(s.ema[n], without.params[n]) for n in "ab")
    steps(s, args, "ab")
    back, _ = state(ema=0)
    back.load(stored(s, tmp_path / "with"))
    assert all(torch.equal(back.params[n], s.params[n]) for n in "ab")
    assert not any(torch.equal(s.ema[n], s.params[n]) for n in "ab")


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    folder = stored(state()[0], tmp_path)
    with pytest.raises(ValueError, match=r"holds '\w+.b' .*another --stage"):
        state(names="a")[0].load(folder)
    with pytest.raises(ValueError, match="lacks c.*another --stage"):
        state(names="abc")[0].load(folder)


def test_overfit_goes_on_with_its_batch(tmp_path):
    seen = []
    for _ in range(2):
        started = toy_run(tmp_path, "--steps", 9, "--overfit", "--resume")

        def spy(rows, loss=started.loss):
            seen.append([example.prompt for example, _ in rows])
            return loss(rows)

        started.loss = spy
        next(started.steps())
        started.save()
    assert seen[0] == seen[1] and started.state.step == 2


@pytest.mark.slow
def test_kill_at_fifty_random_moments(tmp_path):
    """Each time the run comes back, from the last checkpoint, to the very numbers of a run that was
    left alone."""
    rng, steps, kills = random.Random(0), 400, 0
    undisturbed = {}
    reference = toy_run(tmp_path / "reference", "--steps", steps)
    for report in reference.steps():
        undisturbed[report.step] = report.loss
    out = tmp_path / "killed"
    while kills < 50:
        process = start(out, "--steps", steps, "--save-every", 2, "--resume")
        time.sleep(rng.uniform(0.5, 6))
        assert process.poll() is None or process.returncode == 0, process.communicate()[1]
        process.kill()
        process.communicate()
        kills += 1
        seen = losses(out) if (out / "log.jsonl").is_file() else {}
        assert all(undisturbed[step] == loss for step, loss in seen.items())
        last = checkpoints(out)
        if last and seen:
            assert max(seen) - int(last[-1].name[5:]) <= 2
    assert max(seen) > 20
