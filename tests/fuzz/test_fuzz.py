"""Hostile inputs: none may end in a traceback, in silence, in a hang, or with something lost. The
gate runs a part of each area; `-m slow` or `python -m tests.fuzz.run` runs all of it."""
import os
import signal
import time

import pytest

from tests.fuzz.all import AREAS, fast, prepare
from tests.fuzz.commands import release_locks
from tests.fuzz.harness import Case, bad, run_cases


@pytest.fixture(scope="module", autouse=True)
def prepared():
    prepare()
    yield
    release_locks()


@pytest.mark.parametrize("area", AREAS)
def test_hostile_inputs_end_well(area):
    results = run_cases(fast(area))
    assert not bad(results), "\n".join(bad(results))


def test_the_gate_has_300_of_them():
    assert sum(len(fast(area)) for area in AREAS) >= 300


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_all_of_them_end_well(area):
    results = run_cases(list(AREAS[area]()))
    assert not bad(results), "\n".join(bad(results))


def spoil(folder):
    (folder / "mine").write_text("gone")
    raise ValueError("mine")


def die(folder):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind, case", [
    ("silent", Case("", lambda folder: None)),
    ("traceback", Case("", lambda folder: 1 / 0)),
    ("traceback", Case("", die)),
    ("destroyed", Case("", spoil, lambda folder: (folder / "mine").write_text("x"))),
    ("poor", Case("", spoil, names="yours")),
    ("error", Case("", spoil, names="mine")),
    ("works", Case("", lambda folder: None, expected="any")),
])
def test_the_harness_tells_them_apart(kind, case):
    assert list(run_cases([case])) == [kind]


def test_the_harness_ends_what_hangs(monkeypatch):
    monkeypatch.setattr("tests.fuzz.harness.LIMIT", 0.5)
    case = Case("", lambda folder: time.sleep(60))
    assert list(run_cases([case])) == ["hang"]
