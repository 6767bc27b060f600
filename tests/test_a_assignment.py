"""The assignment: the repository's own functions get full marks, common mistakes are called by
their names, an empty hand is led on, and what is recorded can be recorded again."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from notebooks.assignment import grading, test_6_joined
from notebooks.assignment.grading import TOLERANCE, Wrong, close, problem, recorded
from notebooks.assignment.hand_in import HERE as FOLDER
from notebooks.assignment.hand_in import load_adapters
from sample import TOY_FOLDER
from tbac import TBAC
from tests.assignment import record
from tests.assignment.mistakes import JOINED, MISTAKES, REFUSED
from tests.conftest import ROOT, run

RECORDED = record.recorded_tests()
JOINED_TESTS = {name: getattr(test_6_joined, f"test_{name}") for name in JOINED}
HANDOUT = FOLDER / "handout.md"
SYLLABUS = ROOT / "notebooks" / "instructor" / "assignment.md"
PLUG = ROOT / "tests" / "assignment" / "adapters.py"


def graded(*options):
    return run("-m", "pytest", "-p", "no:cacheprovider", FOLDER, *options)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The repository's own functions, graded -> what was said, and the points."""
    file = tmp_path_factory.mktemp("scores") / "scores.json"
    done = graded("--adapters", PLUG, "--scores", file)
    return done, json.loads(file.read_text())


# -------------------------------------------------------------------------------- right and empty

def test_the_repositorys_own_functions_get_full_marks(full):
    done, scores = full
    assert done.returncode == 0, done.stdout
    assert (scores["points"], scores["of"]) == (100, 100)
    assert "in all: 100 of 100 points" in done.stdout
    # And whoever hands them in is found out.
    assert "\nall right, but not all of it your own" in done.stdout
    assert {f"adapters.py imports {name}" for name in ("dit", "ladder")} < set(scores["borrowed"])


def test_it_takes_less_than_two_minutes(full):
    seconds = float(re.search(r"passed in ([\d.]+)s", full[0].stdout)[1])
    assert seconds < 120


@pytest.mark.slow
def test_who_has_written_nothing_is_told_what_to_write():
    done = graded()
    assert done.returncode == 1
    assert "Traceback" not in done.stdout and "Error" not in done.stdout, done.stdout
    assert "in all: 0 of 100 points" in done.stdout
    assert "not your own" not in done.stdout
    assert "next: write 1a flow_matching (handout.md, problem 1a)" in done.stdout


ONE_WRITTEN = """
from torch.nn.functional import scaled_dot_product_attention

from flow import flow_matching

def loss(velocity, x0, t, eps):
    return x0 + t[:3]

def schedule(steps, shift):
    raise NotImplementedError

def attention_n_by_n(q, k, v):
    return scaled_dot_product_attention(q, k, v)
"""
FLOW = """
def flow_matching(x0, t, eps):
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * eps, x0 - eps
"""


@pytest.mark.slow
def test_what_a_student_sees(tmp_path):
    """In another folder, files beside the adapters: a wrong answer has its message and no
    traceback, an error has the student's own line."""
    (tmp_path / "adapters.py").write_text(ONE_WRITTEN)
    (tmp_path / "flow.py").write_text(FLOW)
    # What nobody imports does no harm.
    (tmp_path / "unfinished.py").write_text("def (")
    done = graded("--adapters", tmp_path / "adapters.py", "-k", "1a or 1b or 1c or 4a")
    assert done.returncode == 1
    assert "v points from data to noise: eps - x0. Yours is x0 - eps." in done.stdout
    assert "return x0 + t[:3]" in done.stdout and "size of tensor" in done.stdout
    assert "scaled_dot_product_attention was called: attention is what you write" in done.stdout
    assert "in all: 0 of 14 points\nnext: mend 1a" in done.stdout
    assert "FAILED" not in done.stdout
    assert len(done.stdout.splitlines()) < 50, done.stdout

    (tmp_path / "flow.py").write_text(FLOW.replace("x0 - eps", "eps - x0"))
    done = graded("--adapters", tmp_path / "adapters.py", "-k", "1a or 1c")
    assert "in all: 4 of 7 points" in done.stdout and "next: write 1c schedule" in done.stdout


@pytest.mark.parametrize("name, text, said", [
    ("dit.py", "", "rename it (my_dit.py)"),
    ("adapters.py", "from flow_that_is_not_there import loss", "No module named 'flow_that"),
    ("adapters.py", "def loss(:", "SyntaxError"),
])
def test_files_that_cannot_be_graded_are_refused_in_words(tmp_path, monkeypatch, name, text, said):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "adapters", None)
    (tmp_path / "adapters.py").write_text("")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        load_adapters(tmp_path / "adapters.py")


@pytest.mark.parametrize("name", ["dit.py", "sample.py"])
def test_a_name_of_the_repositorys_is_refused_before_anything_is_imported(tmp_path, name):
    """In the students' own folder, which pytest puts in front of the repository."""
    folder = tmp_path / "notebooks" / "assignment"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / name).write_text("")
    (folder / name).write_text("")
    done = subprocess.run([sys.executable, "-m", "pytest", folder, "-k", "4a"], text=True,
                          capture_output=True, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    said = f"{Path('notebooks/assignment', name)} has the name of a file of the repository"
    assert said in done.stdout and f"rename it (my_{name})" in done.stdout, done.stdout
    assert "ImportError" not in done.stdout


def test_grading_ends_where_there_is_nothing_to_grade(tmp_path):
    done = graded("--adapters", tmp_path / "adapters.py")
    assert done.returncode == 2 and "cannot be imported" in done.stdout
    assert len(done.stdout.splitlines()) < 12, done.stdout


@pytest.mark.slow
def test_a_model_draws_into_a_file(tmp_path):
    """With the plug, and, where nothing is written yet, a message."""
    draw = "-m", "notebooks.assignment.draw", "a red circle", "--steps", 2
    done = run(*draw, "--adapters", PLUG, "--out", tmp_path / "mine.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "mine.png") as picture:
        assert picture.size == (64, 64)
    done = run(*draw, "--out", tmp_path / "none.png")
    assert done.returncode == 1 and "says what comes next" in done.stderr
    assert not (tmp_path / "none.png").exists()


# ---------------------------------------------------------------------------------- wrong answers

def every(mistakes):
    return [(name, mistake) for name in mistakes for mistake in mistakes[name]]


@pytest.mark.parametrize("name, mistake", every(MISTAKES))
def test_a_common_mistake_is_called_by_its_name(name, mistake):
    """By its own name only, though the answer is that of another function than the right one."""
    test = RECORDED[name]
    with pytest.raises(Wrong) as e:
        test(record.plugged(**MISTAKES[name][mistake]))
    said = [other for other, text in test.mistakes.items() if text in str(e.value)]
    assert said == [mistake], e.value


@pytest.mark.parametrize("name, mistake", every(JOINED))
def test_a_mistake_in_joining_is_called_by_its_name(name, mistake):
    with pytest.raises(Wrong, match=mistake):
        JOINED_TESTS[name](record.plugged(**JOINED[name][mistake]))


@pytest.mark.parametrize("name, said", every(REFUSED))
def test_what_numbers_do_not_tell_is_refused_in_words(name, said):
    """Kinds of numbers, shapes, lengths, and what is changed in place."""
    with pytest.raises(Wrong, match=said):
        RECORDED[name](record.plugged(**REFUSED[name][said]))


@pytest.mark.parametrize("attention", [
    lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    lambda x: torch.nn.MultiheadAttention(4, 2, batch_first=True).eval()(x, x, x),
])
@torch.no_grad()
def test_attention_of_pytorchs_is_refused(attention):
    x = torch.ones(1, 2, 4)
    attention(x)
    with pytest.raises(Wrong, match="attention is what you write"), grading.OwnAttention():
        attention(x)


@pytest.mark.slow
def test_the_last_part_holds_for_other_weights(monkeypatch):
    """What is right there is what the repository draws, whatever its weights are."""
    model = TBAC.load(TOY_FOLDER)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p *= 1 + 0.1 * torch.randn(p.shape, generator=generator)
    shipped = test_6_joined.latents(False)
    monkeypatch.setattr(test_6_joined, "shipped", lambda: model)
    test_6_joined.latents.cache_clear()
    assert not close(test_6_joined.latents(False), shipped, 0.1)
    for test in JOINED_TESTS.values():
        test(record.plugged())
    with pytest.raises(Wrong, match="go to the blocks in reverse"):
        JOINED_TESTS["6b_draw"](record.plugged(**JOINED["6b_draw"]["in reverse"]))
    test_6_joined.latents.cache_clear()


def test_n_by_n_is_found():
    def row_by_row(q, k, v):
        """N x N, a row at a time."""
        q, k = q.relu(), k.relu()
        rows = []
        for n in range(q.shape[2]):
            weights = q[:, :, n:n + 1] @ k.transpose(2, 3)                  # (B, H, 1, N)
            rows.append(weights @ v / (weights.sum(-1, keepdim=True) + 1e-15))
        return torch.cat(rows, 2)

    test = record.test_4_dit.test_4c_no_n_by_n
    for wrong in (record.right.attention_n_by_n, row_by_row):
        record.test_4_dit.test_4b_linear_attention(record.plugged(linear_attention=wrong))
        with pytest.raises(Wrong, match="4c: for 1024 places of size 8, tensors of [0-9]{7,} num"):
            test(record.plugged(linear_attention=wrong))
    test(record.plugged())


def test_every_mistake_that_is_spoken_of_is_recorded():
    assert RECORDED.keys() == MISTAKES.keys()
    for name, test in RECORDED.items():
        assert test.mistakes.keys() == MISTAKES[name].keys() == recorded(name).mistakes.keys()
    assert len(every(MISTAKES)) > 100


def test_mistakes_are_far_from_right():
    """At least five tolerances in one of the outputs, so that rounding is not taken for one."""
    for name, test in RECORDED.items():
        case = recorded(name)
        for mistake, outputs in case.mistakes.items():
            near = [close(outputs[output], right, 5 * TOLERANCE)
                    for output, right in case.outputs.items()]
            assert not all(near), (name, mistake)
        assert test.mistakes


LIKE = {
    "Is there a `return`?": lambda y: None,
    "shape is (2, 4, 3), expected (2, 3, 4). The same axes": lambda y: y.transpose(1, 2),
    "shape is (1, 3, 4), expected (2, 3, 4).": lambda y: y[:1],
    "not finite": lambda y: y / 0,
    "the negative": lambda y: -y,
    "2.5 times what is expected": lambda y: 2.5 * y,
    "in another order": lambda y: y.flip(2),
    "No mistake that is known": lambda y: y + 1,
}


@pytest.mark.parametrize("said, wrong", LIKE.items())
def test_other_wrong_answers_are_described(said, wrong, monkeypatch):
    """And right ones pass, in other dtypes and with rounding, too."""
    y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    case = grading.Case("9z_what", {}, {"y": y}, {})
    monkeypatch.setattr(grading, "recorded", lambda name: case)

    @problem(1)
    def test_9z_what(adapters, inputs):
        return {"y": adapters(y)}

    for right in (torch.clone, torch.Tensor.double, lambda y: y * (1 + 1e-6)):
        test_9z_what(right)
    with pytest.raises(Wrong, match=re.escape(said)):
        test_9z_what(wrong)


# ------------------------------------------------------------------------------ recorded, written

def test_what_is_recorded_can_be_recorded_again():
    """To the rounding of another machine."""
    again, stored = record.make(), load_file(record.FILE)
    assert again.keys() == stored.keys()
    for name, tensor in again.items():
        assert tensor.dtype == stored[name].dtype, name
        assert close(tensor, stored[name], 1e-6), name


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.glob("*.safetensors")) < 1_000_000


def test_no_solution_stands_beside_it():
    """Each function of the adapters says what it takes and gives, and nothing of how."""
    tree = ast.parse((FOLDER / "adapters.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        said, rest = function.body
        assert isinstance(said, ast.Expr) and ast.unparse(rest) == "raise NotImplementedError"
    assert [function.name for function in functions] == record.NAMES
    assert len(functions) + 1 == len(tree.body)


def test_the_handout_speaks_of_every_problem(full):
    """With its points, in order, and names every function."""
    text = HANDOUT.read_text()
    found = re.findall(r"^### Problem (\d\w) `(\w+)`.* \((\d+) points?\)$", text, re.M)
    points = {name: str(score["of"]) for name, score in full[1]["problems"].items()}
    assert {f"{number} {name}": n for number, name, n in found} == points
    assert [number for number, *_ in found] == sorted(number for number, *_ in found)
    for name in record.NAMES:
        assert f"`{name}(" in text, name


def test_the_handouts_examples_are_right():
    """A message, the schedule, the table of positions, the six windows."""
    text = HANDOUT.read_text()
    with pytest.raises(Wrong) as e:
        RECORDED["1a_flow_matching"](
            record.plugged(**MISTAKES["1a_flow_matching"]["velocity_reversed"]))
    assert f"\n{e.value}\n" in text

    said = re.search(r"`schedule\(4, 1.0\)` is (.*?), 0\. With shift 3 the second one is"
                     r"\s+([\d.]+)\.", text)
    times = [f"{t:.5f}" for t in record.right.schedule(4, 1.0)[:-1].tolist()]
    assert said[1].split(", ") == times
    assert said[2] == f"{record.right.schedule(4, 3.0)[1].item():.5f}"

    rows = [re.search(rf"^\| {axis} \|([ \d|]+)\|$", text, re.M)[1].split("|")
            for axis in ("time", "height", "width")]
    ids = [1, 1] + [9] * 6 + [1, 1]
    right = record.right.mrope_positions(ids, 9, [(2, 3)]).tolist()
    assert [[int(number) for number in row] for row in rows] == right

    units = torch.arange(15)[:, None]
    windows, valid = record.right.to_windows(units, 3, 5, 2)
    drawn = windows[..., 0].masked_fill(~valid, -1).tolist()
    said = re.findall(r"window \d:((?: +(?:\d+|\.))+)$", text, re.M)
    assert [line.replace(".", "-1").split() for line in said] == [
        [str(unit) for unit in window] for window in drawn]


def test_points_and_minutes_add_up(full):
    """In the handout's table, in the syllabus, and in the tests."""
    points = dict.fromkeys("123456", 0)
    for name, score in full[1]["problems"].items():
        points[name[0]] += score["of"]
    said = re.findall(r"^\| \d \| (\d) [^|]+\| (\d+) \| (\d+) \|", SYLLABUS.read_text(), re.M)
    assert {part: int(n) for part, n, _ in said} == points and sum(points.values()) == 100
    minutes = [int(m) for *_, m in said]
    hours = f"Together 100 points and {sum(minutes) // 60} hours"
    assert hours in SYLLABUS.read_text() and sum(minutes) % 60 == 0
    said = re.findall(r"^\| \[(\d) [^|]+\| \d \| (\d+) \| (\d+) h(?: (\d+))? \|",
                      HANDOUT.read_text(), re.M)
    assert {part: int(n) for part, n, *_ in said} == points
    assert [60 * int(h) + int(m or 0) for *_, h, m in said] == minutes
