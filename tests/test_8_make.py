"""From nothing to the toy: lab/make.py."""
import contextlib
import json
import sys
import types

import pytest

import train
from engine.files import digest
from lab import curves, make, pretrain
from tbac import TBAC
from tests.conftest import run


def arguments(*words):
    return make.options([str(word) for word in words])


def test_each_stage_is_a_command_line_that_its_script_understands(tmp_path):
    """On a CPU two processes with half of the batch each. Each starts from the one before."""
    for device, share in (("cpu", 2), ("cuda", 1)):
        args = arguments("--out", tmp_path, "--device", device, "--seed", 3)
        before = None
        for stage in make.RECIPE:
            words = make.command(stage, args)
            words = words[words.index(stage.module) + 1:]
            parsed = (train if stage.module == "train" else pretrain).options(words)
            assert parsed.stage == stage.option() and parsed.seed == 3
            assert parsed.batch * share == stage.preset()["batch"]
            assert parsed.steps == stage.preset()["steps"]
            assert parsed.model == before
            before = str(parsed.out)


def test_one_toy_is_of_one_commit_and_seed(tmp_path):
    args = arguments("--out", tmp_path / "toy", "--seed", 1)
    diary = make.open_diary(args)
    (args.out / "make.json").write_text(json.dumps(diary))
    assert make.open_diary(args) == diary
    args.seed = 2
    with pytest.raises(ValueError, match="begun with seed 1, not 2"):
        make.open_diary(args)
    args.seed = 1
    (args.out / "make.json").write_text(json.dumps(diary | dict(commit="0000000")))
    with pytest.raises(ValueError, match="begun with commit 0000000"):
        make.open_diary(args)
    # Its weights are all there: another commit may score and ship them.
    whole = dict(commit="0000000", finished=[stage.name for stage in make.RECIPE])
    (args.out / "make.json").write_text(json.dumps(diary | whole))
    assert make.open_diary(args)["commit"] == "0000000"
    (args.out / "make.json").write_text("{}")
    with pytest.raises(ValueError, match="make.json is not of this command"):
        make.open_diary(args)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        make.open_diary(arguments("--out", tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "record.json").write_text("{}")
    with pytest.raises(ValueError, match="record.json has not all of command, commit"):
        make.beside(tmp_path)


def test_other_code_does_not_go_on(tmp_path, monkeypatch):
    """Not even between two stages; and what was begun is known, whenever it was killed."""
    args = arguments("--out", tmp_path / "toy", "--stop-after", "vit")
    diary = make.open_diary(args)
    assert make.open_diary(args) == diary
    monkeypatch.setattr(make, "commit", lambda: "0000000")
    with pytest.raises(ValueError, match="the code is 0000000 by now"):
        make.run(make.RECIPE[0], args, diary, lambda: None)


@pytest.mark.parametrize("killed, left", [(True, ["dcae", "mllm"]), (False, ["mllm"])])
def test_a_stage_is_finished_when_its_process_has_ended_well(tmp_path, monkeypatch, killed, left):
    """Not when its last checkpoint and some model are there: what FINISH does comes after them."""
    args = arguments("--out", tmp_path, "--stop-after", "mllm")
    diary = make.open_diary(args) | dict(finished=["vit"])
    monkeypatch.setattr(make, "at_its_end", lambda stage, args: True)
    monkeypatch.setattr(make, "command", lambda stage, args: [sys.executable, "-c", ending,
                                                                stage.module, "--batch", "1"])
    ending = "import os; os.kill(os.getpid(), 9)" if killed else ""
    with pytest.raises(ValueError, match="dcae failed") if killed else contextlib.nullcontext():
        make.run(make.RECIPE[1], args, diary, lambda: None)
    if not killed:
        # By the code that made it, whatever later code would do.
        assert diary["made"]["dcae"]["steps"] == pretrain.PRESETS["toy"]["dcae"]["steps"]
    ran = []
    monkeypatch.setattr(make, "run", lambda stage, *rest: ran.append(stage.name))
    make.train_all(args, json.loads((tmp_path / "make.json").read_text()))
    assert ran == left


def test_logs_are_thinned_to_means():
    rows = [dict(step=i + 1, loss=float(i), norm=1.0, lr=0.1, by_t=[i, None]) for i in range(10)]
    rows[2]["loss"] = rows[8]["loss"] = rows[9]["loss"] = None
    thin = curves.thinned(rows, 5)
    assert thin["step"] == [2, 4, 6, 8, 10]
    assert thin["loss"] == [0.5, 3.0, 4.5, 6.5, None]
    assert thin["by_t"] == [[4.5, None]]
    assert make.some(list("abcdefg"), 4) == ["a", "c", "e", "g"]


def test_the_time_left_is_by_the_speed_so_far(tmp_path, monkeypatch):
    """Before there is one, by the recipe's."""
    stages = make.Stage("vit", "lab.pretrain", 1.0), make.Stage("t2i", "train", 2.0)
    monkeypatch.setattr(make, "steps", lambda stage, args: 100)
    args = types.SimpleNamespace(out=tmp_path, stop_after="t2i", dry_run=False)
    diary = dict(minutes={})
    left = make.Left(args, diary, stages)
    assert left.seconds() == 100 * 1 + 100 * 2
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "log.jsonl").write_text(json.dumps(dict(step=40, loss=1.0)) + "\n")
    diary["minutes"]["vit"] = 2.0
    assert left.seconds() == pytest.approx(60 * 3 + 100 * 2)


@pytest.mark.slow
def test_a_dry_run_makes_all_of_it_and_goes_on_where_it_was(tmp_path):
    out = tmp_path / "toy"
    first = run("-m", "lab.make", "--out", out, "--dry-run", "--stop-after", "vit")
    assert first.returncode == 0, first.stderr
    assert (out / "vit" / "model.safetensors").is_file() and not (out / "dcae").exists()
    vit = digest(out / "vit" / "model.safetensors")
    done = run("-m", "lab.make", "--out", out, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert digest(out / "vit" / "model.safetensors") == vit
    folder = out / "weights"
    record = json.loads((folder / "record.json").read_text())
    assert record["sha256"] == {"model.safetensors": digest(folder / "model.safetensors")}
    assert record["dry_run"] and list(record["stages"]) == [stage.name for stage in make.RECIPE]
    assert all(stage["cpu_minutes"] > 0 for stage in record["stages"].values())
    assert str(tmp_path) not in json.dumps(record)
    assert record["scored_by"] == record["commit"]
    assert record["stages"]["mllm"]["lr"] == pretrain.PRESETS["toy"]["mllm"]["lr"]
    assert record["stages"]["edit"]["command"].startswith(
        "python -m train --stage edit --out runs/toy/edit ")
    logs = json.loads((folder / "logs.json").read_text())
    assert all(len(log["loss"]) == make.DRY_STEPS for log in logs.values())
    for stage in make.RECIPE:
        assert len(list(folder.glob(f"{stage.name}-sheet-*.png"))) == 1
    again = run("-m", "lab.make", "--out", out, "--dry-run", "--beside", out)
    assert again.returncode == 0, again.stderr
    other, = json.loads((folder / "record.json").read_text())["other_seeds"]
    assert other["scores"] == record["scores"] and other["commit"] == record["commit"]
    # Scores that another commit has measured are measured again.
    diary = json.loads((out / "make.json").read_text())
    diary["made"]["mllm"]["steps"] = 7
    (out / "make.json").write_text(json.dumps(diary | dict(scored_by="0000000")))
    (out / "scores" / "scores.json").write_text("{}")
    last = run("-m", "lab.make", "--out", out, "--dry-run")
    assert last.returncode == 0, last.stderr
    record = json.loads((folder / "record.json").read_text())
    assert record["scores"]["scores"] and record["stages"]["mllm"]["steps"] == 7
    assert TBAC.load(folder).ask("what colour is the circle?", max_new_tokens=1) is not None
