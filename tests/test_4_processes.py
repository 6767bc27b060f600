"""Two processes take the steps that one takes: copies and shards (FSDP2), and checkpoints pass
between them."""
import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from engine import distributed
from tests.conftest import ROOT

# At the paper's rate: AdamW's first steps are as large for a gradient of rounding errors as for any
# other.
COMMON = ("--stage", "mix", "--lr", 1e-4, "--warmup", 1, "--sheet-every", 0, "--dtype", "float32",
          "--save-every", 2)


def command(processes, *args):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    launch = launch if processes > 1 else ()
    return [sys.executable, *map(str, (*launch, ROOT / "train.py", *args))]


def train(processes, out, *args):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(processes, *COMMON, "--out", out, *args), capture_output=True,
                          text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = (out / "log.jsonl").read_text().splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}
    # The first norm: what AdamW makes of a gradient does not depend on its size.
    return [rows[1]["norm"], *(rows[step]["loss"] for step in sorted(rows))]


# "cuda:0" stands in options.json, which --resume reads.
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_each_process_takes_the_gpu_of_its_own(monkeypatch, device):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    taken = []
    for where, fake in (("torch.cuda.is_available", lambda: True),
                        ("torch.cuda.set_device", taken.append),
                        ("engine.distributed.check_device", taken.append),
                        ("torch.distributed.init_process_group",
                         lambda backend, timeout: taken.append(backend)),
                        ("torch.distributed.get_rank", lambda: 5),
                        ("torch.distributed.get_world_size", lambda: 8)):
        monkeypatch.setattr(where, fake)
    args = argparse.Namespace(device=device, fsdp=False)
    assert distributed.start_processes(args) == (5, 8)
    assert args.device == "cuda:1" and taken == ["cuda:1", "cuda:1", "nccl"]
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="start with torchrun"):
        distributed.start_processes(args)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(1, tmp_path_factory.mktemp("alone"), "--steps", 4, "--batch", 4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("--fsdp",), ("--fsdp", "--grad-checkpoint")])
def test_the_same_global_batch_gives_the_same_losses(alone, tmp_path, mode):
    found = train(2, tmp_path, "--steps", 4, "--batch", 2, *mode)
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_accumulated_passes_are_one_batch(alone, tmp_path):
    one = train(1, tmp_path / "1", "--steps", 4, "--batch", 1, "--accumulate", 4)
    two = train(2, tmp_path / "2", "--steps", 4, "--batch", 1, "--accumulate", 2)
    assert one == pytest.approx(alone, rel=1e-5) and two == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("--fsdp",)])
def test_from_two_processes_to_one_and_back(alone, tmp_path, mode):
    for processes, steps, batch in ((2, 1, 2), (1, 2, 4), (2, 4, 2)):
        how = mode if processes > 1 else ("--no-fsdp",)
        found = train(processes, tmp_path, "--steps", steps, "--batch", batch, "--resume", *how)
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_with_shards_has_the_moments_of_one_that_went_through(tmp_path):
    """Weights and both moments of AdamW, of every parameter, after two more steps."""
    def last(out):
        folder = max((out / "checkpoints").glob("step-*"))
        found = {}
        for file in folder.glob("*.safetensors"):
            found |= load_file(file)
        return found

    how = ("--fsdp", "--batch", 2)
    train(2, tmp_path / "through", "--steps", 4, *how)
    # The same warm-up and length, hence the same rates: stopped after two steps, then resumed.
    train(2, tmp_path / "stopped", "--steps", 4, *how)
    stopped = tmp_path / "stopped" / "checkpoints"
    newest = max(stopped.glob("step-*"))
    shutil.rmtree(newest)
    train(2, tmp_path / "stopped", "--steps", 4, "--resume", *how)
    a, b = last(tmp_path / "through"), last(tmp_path / "stopped")
    assert a.keys() == b.keys()
    assert sum(name.startswith("exp_avg_sq.") for name in a) > 50
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.slow
def test_a_process_that_dies_ends_the_whole_job(tmp_path):
    job = command(2, *COMMON, "--out", tmp_path, "--steps", 10_000, "--batch", 1)
    job = subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "log.jsonl"
    while not log.is_file() or len(log.read_text().splitlines()) < 3:
        time.sleep(0.1)
        assert job.poll() is None, job.communicate()[1]
    children = pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode not in (0, None) and "SIGKILL" in err
