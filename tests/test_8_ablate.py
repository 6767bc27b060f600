"""The study: its statistics against known answers, what a replaced rung changes, and a whole small
study, stopped and gone on with."""
import json

import numpy as np
import pytest
import torch

from lab import ablate, evaluate
from sample import TOY_FOLDER
from tbac import TBAC
from tests.conftest import relative, run


def scores(value, n=24):
    seen = {f"{category}, seen": [value] * n for category in evaluate.GENEVAL}
    return seen | {"position, never seen": [0.0] * n}


def test_intervals_and_paired_tests():
    assert ablate.overall(scores(0.5)).shape == (6 * 24,)
    assert ablate.overall(scores(0.5)).mean() == 0.5
    rng = np.random.default_rng(0)
    found = ablate.resampled(rng.normal(0.3, 1, (3, 400)))
    assert found["interval"][0] < found["mean"] < found["interval"][1]
    assert abs(found["mean"] - 0.3) < 0.1

    def noisy(shift):
        return [{f"{category}, seen": list(rng.normal(shift, 1, 24))
                 for category in evaluate.GENEVAL} for _ in range(3)]

    assert ablate.paired(noisy(1.0), noisy(0.0))["p"] < 0.001
    assert ablate.paired(noisy(0.0), noisy(0.0))["p"] > 0.01
    same = ablate.paired([scores(0.5)] * 3, [scores(0.5)] * 3)
    assert same["mean"] == 0 and same["p"] == 1.0


def test_a_table_is_against_the_right_one(capsys):
    found = {
        "ladder": {1: [scores(0.0)], 2: [scores(1.0)]},
        "final": {1: [scores(0.1)], 2: [scores(0.25)]},
    }
    rows = ablate.table(found, "final")
    assert rows["ladder"]["mean of 6"]["mean"] == 1
    assert rows["ladder"]["minus final"]["mean"] == 0.75
    assert "minus final" not in rows["final"]
    assert "| ladder | 100 [100, 100]" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["null prompt", "another rung", "another prompt"])
def test_one_rung_of_the_prompts_is_replaced(tiny, how):
    prompts = ["", "", "a dog", "a cat"]
    with torch.no_grad():
        before = tiny.encode(prompts)
        with ablate.replaced(tiny, 1, how):
            after = tiny.encode(prompts)
        assert torch.equal(tiny.encode(prompts), before)
    assert torch.equal(after[[0]], before[[0]])
    assert torch.equal(after[:, :2], before[:, :2])
    distant = (1 + len(before) // 2) % len(before)
    wanted = {
        "null prompt": before[1, :2],
        "another rung": before[distant, 2:],
        "another prompt": before[1, [3, 2]],
    }[how]
    assert torch.equal(after[1, 2:], wanted)
    assert relative(after[1, 2:], before[1, 2:]) > 1e-3


def test_probes_find_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (400,), generator=g)
    noise = torch.randn(400, 50, generator=g)
    signal = torch.nn.functional.one_hot(y, 50)
    assert ablate.ridge(noise, y, 300) < 0.55
    assert ablate.ridge(noise + 4 * signal, y, 300) > 0.95


@pytest.mark.parametrize("argv, message", [
    (["wirings", "--n", "0"], "must be a whole number from 1"),
    (["rungs", "--only", "ladder"], "no kinds"),
])
def test_options_that_say_nothing(argv, message, capsys):
    with pytest.raises(SystemExit):
        ablate.options([*argv, "--dit", str(TOY_FOLDER)])
    assert message in capsys.readouterr().err


def test_runs_are_known_by_all_that_makes_their_scores(tmp_path):
    """Other weights, other scoring, other options: another folder."""
    def folders(*argv):
        args = ablate.options(["wirings", "--out", str(tmp_path), "--seeds", "1",
                               "--dit", str(TOY_FOLDER), *argv])
        args.default_queries = 16
        return {ablate.place(args, options)[1].name for options in ablate.plan(args).values()}

    found = folders()
    for argv in (["--n", "3"], ["--pictures", "2"], ["--draw-steps", "3"], ["--steps", "7"]):
        found |= folders(*argv)
    assert len(found) == 50
    other = tmp_path / "other"
    TBAC.load(TOY_FOLDER).save(other, torch.bfloat16)
    assert not folders() & folders("--model", str(other))
    with pytest.raises(ValueError, match="banana.*ladder"):
        folders("--only", "banana")


@pytest.mark.slow
def test_a_small_study_goes_on_where_it_was_stopped(tmp_path):
    argv = ("-m", "lab.ablate", "wirings", "--only", "ladder", "final", "--dit", TOY_FOLDER,
            "--out", tmp_path, "--seeds", 1, "--steps", 1, "--batch", 2, "--every", 1, "--n", 1,
            "--draw-steps", 1, "--jobs", 1)
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    folder = next(f for f in tmp_path.iterdir() if "_ladder_" in f.name)
    stamp = (folder / "scores-00001.json").stat().st_mtime_ns
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    assert (folder / "scores-00001.json").stat().st_mtime_ns == stamp
    found = json.loads((tmp_path / "wirings.json").read_text())
    assert found["table"].keys() == {"ladder", "final"}
    assert found["table"]["ladder"]["seeds"] == 1
    assert "minus final" in found["table"]["ladder"]
    assert (tmp_path / "wirings.png").is_file()
    done = run("-m", "lab.ablate", "wirings", "--out", tmp_path)
    assert done.returncode == 2 and "--dit" in done.stderr
