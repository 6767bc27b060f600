"""Checkpoints: a run that was stopped, killed, or had no room goes on as if nothing had happened."""
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from tests.conftest import ROOT, run

TOY = ("--stage", "mix", "--batch", 2, "--warmup", 2, "--sheet-every", 0, "--dtype", "float32")


def toy_run(out, *args):
    return train.Run(train.options([str(x) for x in (*TOY, "--out", out, *args)]))


def losses(out):
    return {row["step"]: row["loss"] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())}


def state_of(out):
    last = train.checkpoints(out)[-1]
    return load_file(last / "model.safetensors"), json.loads((last / "state.json").read_text())


@pytest.mark.parametrize("more", [(), ("--dtype", "bfloat16", "--accumulate", 2, "--workers", 2)])
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
    (a, facts), (b, again) = state_of(whole), state_of(half)
    assert facts == again and a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert {n.split(".")[0] for n in a} == {"param", "mean", "exp_avg", "exp_avg_sq"}


def test_the_last_ones_stay_and_a_half_written_one_is_never_picked_up(tmp_path):
    done = run("train.py", *TOY, "--steps", 4, "--save-every", 1, "--keep", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [f.name for f in train.checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    (tmp_path / "checkpoints" / ".new").mkdir()
    (tmp_path / "checkpoints" / ".new" / "model.safetensors").write_bytes(b"half")
    done = run("train.py", "--resume", "--steps", 5, "--out", tmp_path)
    assert done.returncode == 0 and list(losses(tmp_path)) == [1, 2, 3, 4, 5], done.stderr
    assert not (tmp_path / "checkpoints" / ".new").exists()


def start(out, *args):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, (*TOY, "--out", out, *args))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(out, n):
    while not (out / "log.jsonl").is_file() or len((out / "log.jsonl").read_text().splitlines()) < n:
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(tmp_path, number):
    process = start(tmp_path, "--steps", 1000, "--save-every", 1000)
    wait_for_steps(tmp_path, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in out, err
    assert state_of(tmp_path)[1]["step"] == max(losses(tmp_path))


def test_a_full_disk_is_a_clear_error_and_the_checkpoint_before_is_whole(tmp_path, monkeypatch):
    first = toy_run(tmp_path, "--steps", 3, "--save-every", 1)
    reports = first.steps()
    next(reports), first.save()
    before = state_of(tmp_path)
    model = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("tbac.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    next(reports)
    with pytest.raises(ValueError, match="step 2 could not be saved: .*No space left.*step-00000001 is whole"):
        first.save()
    after = state_of(tmp_path)
    assert before[1] == after[1] and all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert (tmp_path / "model.safetensors").read_bytes() == model and len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_kill_at_fifty_random_moments(tmp_path):
    """Each time the run comes back, from the last checkpoint, to the very numbers of a run that was left alone."""
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
        process.kill(), process.communicate()
        kills += 1
        seen = losses(out) if (out / "log.jsonl").is_file() else {}
        assert all(undisturbed[step] == loss for step, loss in seen.items())
        if (last := train.checkpoints(out)) and seen:
            assert max(seen) - int(last[-1].name[5:]) <= 2
    assert max(seen) > 20
