"""The study: its statistics against known answers, what a replaced rung changes, and a whole small study, stopped and gone on with."""
import json

import numpy as np
import pytest
import torch

from lab import evaluate
from lab import ablate
from engine.options import TOY_FOLDER
from tbac import TBAC
from tests.conftest import relative, run


def scores(value, n=24):
    return {f"{c}, seen": [value] * n for c in evaluate.GENEVAL} | {"position, never seen": [0.0] * n}


def test_intervals_and_paired_tests():
    assert ablate.overall(scores(0.5)).shape == (6 * 24,) and ablate.overall(scores(0.5)).mean() == 0.5
    rng = np.random.default_rng(0)
    rows = rng.normal(0.3, 1, (3, 400))
    found = ablate.resampled(rows)
    assert found["interval"][0] < found["mean"] < found["interval"][1] and abs(found["mean"] - 0.3) < 0.1
    noisy = lambda shift: [{f"{c}, seen": list(rng.normal(shift, 1, 24)) for c in evaluate.GENEVAL} for _ in range(3)]
    assert ablate.paired(noisy(1.0), noisy(0.0))["p"] < 0.001 < 0.01 < ablate.paired(noisy(0.0), noisy(0.0))["p"]
    same = ablate.paired([scores(0.5)] * 3, [scores(0.5)] * 3)
    assert same["mean"] == 0 and same["p"] == 1.0


def test_a_table_is_against_the_right_one(capsys):
    found = {"top": {1: [scores(0.0)], 2: [scores(1.0)]}, "last": {1: [scores(0.1)], 2: [scores(0.25)]}}
    rows = ablate.table(found, "last")
    assert rows["top"]["mean of 6"]["mean"] == 1 and rows["top"]["minus last"]["mean"] == 0.75 and "minus last" not in rows["last"]
    assert "| top | 100 [100, 100]" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["null prompt", "another rung", "another prompt"])
def test_one_rung_of_the_prompts_is_replaced(tiny, how):
    with torch.no_grad():
        before = tiny.encode(["", "", "a dog", "a cat"])
        with ablate.replaced(tiny, 1, how):
            after = tiny.encode(["", "", "a dog", "a cat"])
        assert torch.equal(tiny.encode(["", "", "a dog", "a cat"]), before)
    assert torch.equal(after[[0]], before[[0]]) and torch.equal(after[:, :2], before[:, :2])
    wanted = {"null prompt": before[1, :2],
              "another rung": before[(1 + len(before) // 2) % len(before), 2:],
              "another prompt": before[1, [3, 2]]}[how]
    assert torch.equal(after[1, 2:], wanted) and relative(after[1, 2:], before[1, 2:]) > 1e-3


def test_probes_find_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (400,), generator=g)
    noise = torch.randn(400, 50, generator=g)
    assert ablate.ridge(noise, y, 300) < 0.55
    assert ablate.ridge(noise + 4 * torch.nn.functional.one_hot(y, 50), y, 300) > 0.95


@pytest.mark.parametrize("args, message", [(["wirings", "--n", "0"], "1 or more"), (["rungs", "--only", "top"], "no kinds")])
def test_options_that_say_nothing(args, message, capsys):
    with pytest.raises(SystemExit):
        ablate.options([*args, "--dit", str(TOY_FOLDER)])
    assert message in capsys.readouterr().err


def test_runs_are_known_by_all_that_makes_their_scores(tmp_path):
    """Other weights, other scoring, other options: another folder."""
    def folders(*args):
        a = ablate.options(["wirings", "--out", str(tmp_path), "--seeds", "1", "--dit", str(TOY_FOLDER), *args])
        a.default_queries = 16
        return {ablate.place(a, options)[1].name for options in ablate.plan(a).values()}
    assert len(folders() | folders("--n", "3") | folders("--pictures", "2") | folders("--draw-steps", "3") | folders("--steps", "7")) == 50
    other = tmp_path / "other"
    TBAC.load(TOY_FOLDER).save(other, torch.bfloat16)
    assert not folders() & folders("--model", str(other))
    with pytest.raises(ValueError, match="banana.*top"):
        folders("--only", "banana")


@pytest.mark.slow
def test_a_small_study_goes_on_where_it_was_stopped(tmp_path):
    how = ("ablate", "wirings", "--only", "top", "last", "--dit", TOY_FOLDER, "--out", tmp_path,
           "--seeds", 1, "--batch", 2, "--every", 1, "--n", 1, "--draw-steps", 1, "--jobs", 1)
    assert run("-m", "lab.evaluate", *how, "--steps", "1").returncode == 0
    top = next(f for f in tmp_path.iterdir() if "_top_" in f.name)
    stamp = (top / "scores-00001.json").stat().st_mtime_ns
    done = run("-m", "lab.evaluate", *how, "--steps", "1")
    assert done.returncode == 0 and (top / "scores-00001.json").stat().st_mtime_ns == stamp
    found = json.loads((tmp_path / "wirings.json").read_text())
    assert found["table"].keys() == {"top", "last"} and found["table"]["top"]["seeds"] == 1 and "minus last" in found["table"]["top"]
    assert (tmp_path / "wirings.png").is_file()
    done = run("-m", "lab.evaluate", "ablate", "wirings", "--out", tmp_path)
    assert done.returncode == 2 and "--dit" in done.stderr
