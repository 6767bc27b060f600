"""The notebooks: all cells run as plain Python, the checks pass right answers and refuse wrong ones, what is committed is complete and small."""
import ast
import contextlib
import importlib.util
import io
import json
import re
import sys

import matplotlib
import pytest
import torch

import ladder
import mllm
from tests.conftest import ROOT

NAMES = ["1_flow", "2_mllm", "3_dit", "4_ladder", "5_inspect", "6_weights"]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))


def places(before, h, w, after, further):
    """2_mllm, exercise 1: the text goes on `further` behind where the picture begins; right is max(h, w)."""
    rows, columns = torch.arange(h * w) // w, torch.arange(h * w) % w
    parts = torch.arange(before).expand(3, -1), torch.stack([0 * rows, rows, columns]) + before, before + further + torch.arange(after).expand(3, -1)
    return torch.cat(parts, 1)


def climbed(a, b, rungs=slice, rows=1):
    """5_inspect, exercise 2: picture n has the rungs in rungs(n) from b, in the last `rows` rows. As it stands, right."""
    n = len(a) + 1
    mixed = a.repeat_interleave(n, 1).unflatten(1, (-1, n)).clone()
    for i in range(n):
        mixed[rungs(i), -rows:, i] = b[rungs(i), -rows:]
    return mixed.flatten(1, 2)


def rms(difference):
    return (difference ** 2).mean() ** 0.5


def similar(q, k):
    return q.relu() @ k.relu().transpose(2, 3)


def attend(q, k, v, own=lambda a: 0, below=1):
    """3_dit, exercise 1: linear attention, less own(what a place adds to its own sums), in the denominator `below` times."""
    q, k = q.relu(), k.relu()
    o = own((q * k).sum(3, keepdim=True))
    return (q @ (k.transpose(2, 3) @ v) - o * v) / (q @ k.sum(2, keepdim=True).transpose(2, 3) - below * o)


WRONG = {                                                           # per exercise, mistakes that its check must find
    "1_flow": [
        [lambda x_t, t, v: (x_t + t * v, x_t), lambda x_t, t, v: (x_t - t * v, x_t + t * v), lambda x_t, t, v: (x_t - (1 - t) * v, x_t + t * v)],
        [lambda velocity, x, t, s: x + (s - t) * velocity(x, t), lambda velocity, x, t, s: x - (s - t) * velocity(x, t),
         lambda velocity, x, t, s: x + (s - t) * (velocity(x, t) + velocity(x, s)) / 2],
        [lambda n: n, lambda n: 1.0, lambda n: n ** -0.5, lambda n: 3.0],
    ],
    "2_mllm": [
        [lambda before, h, w, after: places(before, h, w, after, h * w), lambda before, h, w, after: places(before, h, w, after, max(h, w) + 1),
         lambda before, h, w, after: places(before, h, w, after, max(h, w))[[0, 2, 1]],
         lambda before, h, w, after: torch.arange(before + h * w + after).expand(3, -1),
         lambda before, h, w, after: mllm.mrope_positions([0] * before + [1] * h * w + [0] * after, 1, [(h, w)])],
        [lambda a, b, across, side: True, lambda a, b, across, side: a // side ** 2 == b // side ** 2,
         lambda a, b, across, side: a % across // side == b % across // side, lambda a, b, across, side: a // across // side == b // across // side,
         lambda a, b, across, side: (a // across // 2, a % across // 2) == (b // across // 2, b % across // 2)],
        [lambda real: torch.ones(real.shape[1], real.shape[1]).tril().bool().expand(len(real), -1, -1),
         lambda real: real[:, None].expand(-1, real.shape[1], -1),
         lambda real: torch.ones(real.shape[1], real.shape[1]).tril().bool() & real[:, None]],
    ],
    "3_dit": [
        [attend,
         lambda q, k, v: attend(q, k, v, own=lambda a: a, below=0),
         lambda q, k, v: attend(q.exp(), k.exp(), v, own=lambda a: a),
         lambda q, k, v: (lambda w: w @ v / w.sum(3, keepdim=True))((lambda w: w - w.diagonal(dim1=2, dim2=3).diag_embed())(similar(q, k)))],
        [lambda K: K, lambda K: K + 2, lambda K: K * K, lambda K: 33],
        [lambda x0: 2.0, lambda x0: 1 + x0.var(), lambda x0: x0.pow(2).mean(), lambda x0: (1 + x0.std()) ** 2],
    ],
    "4_ladder": [
        [lambda n, l: [*range(n - l, n)], lambda n, l: [*range(n - l + 1, n + 1)], lambda n, l: [*range(l)],
         lambda n, l: [*range(n - 1, n - l - 1, -1)], lambda n, l: ladder.rungs(n, l)],
        [lambda taps, n: [*range(max(taps) + 1, n)], lambda taps, n: [i for i in range(n) if i not in taps], lambda taps, n: [n - 1]],
        [lambda n, l: [[0.5 * (i - j in (n - l, n - l + 1)) for i in range(n + 1)] for j in range(l)],
         lambda n, l: [[0.0 if i - j in (n - l - 1, n - l) else -1e4 for i in range(n + 1)] for j in range(l)],
         lambda n, l: [[0.0 if i - j == n - l else -1e4 for i in range(n + 1)] for j in range(l)],
         lambda n, l: [[0.0 if i - j in (n - l, n - l + 1) else -1e4 for i in range(n)] for j in range(l)]],
    ],
    "5_inspect": [
        [lambda queries: lambda module, args, weights: weights.index_fill(-1, torch.tensor(queries), 0),
         lambda queries: lambda module, args, weights: weights.index_fill(-2, torch.tensor(queries), 0),
         lambda queries: lambda module, args, weights: weights.index_fill(-1, torch.tensor(queries), 0).softmax(-1),
         lambda queries: lambda module, args, weights: None],
        [lambda a, b: a.repeat(1, len(a) + 1, 1, 1), lambda a, b: climbed(a, b, rungs=lambda n: slice(n, n + 1)),
         lambda a, b: climbed(a, b, rungs=lambda n: slice(n + 1)), lambda a, b: climbed(a, b, rows=2), lambda a, b: climbed(b, a)],
        [lambda source, made, edited, keep: (rms((made - source)[keep]), rms((edited - source)[keep])),
         lambda source, made, edited, keep: (rms((made - source)[keep]), rms((edited - source)[keep]) - rms((made - source)[keep])),
         lambda source, made, edited, keep: (rms(made - source), rms(edited - made))],
    ],
    "6_weights": [
        [lambda name, n: True, lambda name, n: "visual" not in name and "encoder" not in name,
         lambda name, n: name.startswith(("model.transformer", "model.connector", "vae.decoder"))],
        [lambda frozen, trained: 2 * frozen + 16 * trained, lambda frozen, trained: 16 * (frozen + trained),
         lambda frozen, trained: 2 * (frozen + trained)],
        [0, 2, 5],
    ],
}


def cells(file, kind="code"):
    return [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def solutions():
    spec = importlib.util.spec_from_file_location("notebook_solutions", ROOT / "notebooks" / "solutions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ANSWERS


@pytest.fixture
def clean(monkeypatch):
    """A notebook must find the repository by itself, and must not change what other tests see."""
    import matplotlib.pyplot as plt
    matplotlib.use("Agg")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(ROOT))])
    monkeypatch.delenv("TBAC_WEIGHTS", raising=False)
    with matplotlib.rc_context():
        yield
    plt.close("all")


def execute(cell, names):
    """-> what the cell prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source(cell), "cell", "exec"), names)
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_cell_runs_and_the_checks_check(file, solutions, clean, monkeypatch, tiny_folder):
    monkeypatch.chdir(ROOT / "notebooks")
    names = {"__name__": "__main__"}
    for cell in cells(file):
        said = execute(cell, names)
        if number := re.match(r"if answer_(\d) is None:", source(cell)):
            hook, i = f"answer_{number[1]}", int(number[1]) - 1
            assert said == f"exercise {number[1]}: not solved yet\n"
            names[hook] = solutions[file.stem][i]
            assert f"exercise {number[1]}: solved" in execute(cell, names)
            for wrong in WRONG[file.stem][i]:
                names[hook] = wrong
                with pytest.raises(AssertionError, match=r"\w+ .*\w+"):          # with words that help
                    execute(cell, names)
            names[hook] = None
        if "TBAC_WEIGHTS" in source(cell):                                       # "the real weights": here the tiny ones
            assert "no folder" in said
            monkeypatch.setenv("TBAC_WEIGHTS", str(tiny_folder))
            assert "no folder" not in execute(cell, names) and names["drawn"].size == (32, 32)


@pytest.mark.parametrize("folder", ["notebooks", "."])
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_first_cell_finds_the_repository(file, folder, clean, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    execute(cells(file)[0], {})
    assert str(ROOT) in sys.path


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_what_is_committed(file):
    assert file.stat().st_size < 400_000
    notebook = json.loads(file.read_text())
    text = "\n".join(source(c) for c in cells(file, "markdown"))
    assert len(notebook["cells"]) <= 25
    assert "predict before you run" in text.lower() and "What happened" in text
    assert notebook["metadata"].keys() <= {"kernelspec", "language_info"} and not any(c["metadata"] for c in notebook["cells"])
    assert not re.search(r"/(home|root|work|tmp|Users)/", file.read_text()), "a path of some machine"
    for i, cell in enumerate(cells(file)):
        assert cell["execution_count"] == i + 1, "run from top to bottom: notebooks/run.py"
        kinds = {o["output_type"] for o in cell["outputs"]}
        assert "error" not in kinds and not any(o.get("name") == "stderr" for o in cell["outputs"])
        assert kinds or "print(" not in source(cell), f"no output: {source(cell)[:60]}"
        assert "plt.show()" not in source(cell) or "display_data" in kinds or "TBAC_WEIGHTS" in source(cell), source(cell)[:60]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_exercises_and_links(file, solutions):
    code, text = [source(c) for c in cells(file)], "\n".join(source(c) for c in cells(file, "markdown"))
    for n in (1, 2, 3):
        assert sum(bool(re.search(rf"^answer_{n} = None", c, re.M)) for c in code) == 1, "one cell to fill in"
        assert sum(c.startswith(f"if answer_{n} is None:") and "assert " in c for c in code) == 1, "one cell that checks"
    assert len(solutions[file.stem]) == 3 and len(WRONG[file.stem]) == 3 and all(WRONG[file.stem])
    assert f"]({NAMES[(NAMES.index(file.stem) + 1) % len(NAMES)]}.ipynb)" in text                    # the last one leads back to the first
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert all((file.parent / link).exists() for link in links) and [f.stem for f in FILES] == NAMES


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_plain_python_without_model_code(file):
    for cell in cells(file):
        for node in ast.walk(ast.parse(source(cell))):                           # a magic would not parse
            assert not isinstance(node, ast.ClassDef), f"a class: {node.name}"
