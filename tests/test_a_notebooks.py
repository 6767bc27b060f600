"""The notebooks: all cells run as plain Python, the checks pass right answers and refuse wrong
ones, what is committed is complete and small."""
import ast
import base64
import contextlib
import functools
import importlib.util
import inspect
import io
import json
import math
import re
import sys

import matplotlib
import pytest
import torch
from PIL import Image

from notebooks import run
from tests.conftest import ROOT

NAMES = ["1_flow", "2_latents", "3_mllm", "4_dit", "5_ladder", "6_training", "7_inspect",
         "8_weights"]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))


# ---------------------------------------------------------------- mistakes, as functions

def guide_at_once(model, x, t, labels, g):
    """1_flow, exercise 1. As it stands, right."""
    both = torch.cat([0 * labels - 1, labels])
    null, cond = model(x.repeat(2, 1), t, both).chunk(2)
    return null + torch.as_tensor(g).reshape(-1, 1) * (cond - null)


def guide_by_two_calls(model, x, t, labels, g):
    null = model(x, t, 0 * labels - 1)
    return null + g[:, None] * (model(x, t, labels) - null)


def into_channels(x, channels, axes, by=torch.mean):
    """2_latents, exercise 1: rows are axes 2 and 3, columns 4 and 5. With (1, 3, 5, 2, 4) right."""
    x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, *axes)
    return by(x.flatten(1, 3).unflatten(1, (channels, -1)), 2)


def layer(q, k, v, real, scale=True, shared=torch.repeat_interleave, future=False, padding=False,
          itself=True, dim=-1):
    """3_mllm, exercise 1. As it stands, right."""
    S = q.shape[2]
    k, v = (shared(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
    mask = torch.ones(S, S).bool() if future else torch.ones(S, S).tril().bool()
    mask = mask if padding else mask & real[:, None]
    mask = (mask | torch.eye(S).bool() if itself else mask).expand(len(q), S, S)
    scores = q @ k.transpose(2, 3) / (q.shape[-1] ** 0.5 if scale else 1)
    return scores.masked_fill(~mask[:, None], -math.inf).softmax(dim) @ v


def together(h, w, name):
    """3_mllm, exercise 2: name(row, column) is the window of a unit."""
    rows = torch.arange(h).repeat_interleave(w)
    windows = name(rows, torch.arange(w).repeat(h))
    return windows[:, None] == windows


def turn(x, positions, sections, theta, order=(0, 1, 2), sign=1, apart=True, anew=False):
    """3_mllm, exercise 3. As it stands, right. apart: pairs are i and i + K/2."""
    pairs = x.shape[-1] // 2
    axis = [order[i] for i, n in enumerate(sections) for _ in range(n)]
    steps = torch.cat([torch.arange(n) / n for n in sections]) if anew else \
        torch.arange(pairs) / pairs
    angle = sign * positions[axis].permute(1, 2, 0)[:, None] * theta ** -steps
    a, b = x.chunk(2, -1) if apart else x.unflatten(3, (-1, 2)).unbind(4)
    parts = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return torch.cat(parts, -1) if apart else torch.stack(parts, 4).flatten(3)


def similar(q, k):
    return q.relu() @ k.relu().transpose(2, 3)


def attend(q, k, v, own=lambda a: 0, below=1):
    """4_dit, exercise 1: linear attention, less own(what a place adds to its own sums), in the
    denominator `below` times. As it stands, without that."""
    q, k = q.relu(), k.relu()
    o = own((q * k).sum(3, keepdim=True))
    total = q @ k.sum(2, keepdim=True).transpose(2, 3)
    return (q @ (k.transpose(2, 3) @ v) - o * v) / (total - below * o)


def attend_explicitly(q, k, v):
    """Right, but with an N x N matrix."""
    w = similar(q, k)
    w = w - w.diagonal(dim1=2, dim2=3).diag_embed()
    return w @ v / w.sum(3, keepdim=True)


def fold(weight, bias, shift, scale, gate, columns=1, rows=True, at=1, gated=True):
    """4_dit, exercise 3: columns times columns + scale, the shift times `at`; is the weight gated,
    is the bias? As it stands, right."""
    W = weight * (columns + scale)
    b = weight @ (shift * at) + bias
    return gate[:, None] * W if rows else W, gate * b if gated else b


def climb(mllm, x, positions, mask, queries, A, connector, start=1, first=False, hidden=False,
          behind=False, up=0, counted=False):
    """5_ladder, exercise 1. As it stands, right."""
    B, Q = len(x), len(queries)
    own = queries.expand(B, -1, -1)
    x = torch.cat([own, x] if first else [x, own], 1)
    last = (mask.sum(1) - 1).view(1, B, 1) if counted else positions[:, :, -1:]
    after = (last + torch.arange(start, start + Q)).expand(3, -1, -1)
    mask = torch.cat([mask, mask.new_full((B, Q), not hidden)], 1)
    states = mllm(x, torch.cat([positions, after], 2), mask)
    states = torch.stack([state[:, :Q] if first else state[:, -Q:] for state in states])
    states = states.roll(-up, 0)
    if behind:
        return torch.einsum("lt,tbqd->lbqd", A, connector(states))
    return connector(torch.einsum("lt,tbqm->lbqm", A, states))


def interval(ours, theirs, paired=True, less=1, root=True, quantile=None):
    """5_ladder, exercise 2. As it stands, right."""
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    n = len(ours)
    variance = ours.sub(theirs).var(correction=less)
    if not paired:
        variance = ours.var() + theirs.var()
    quantile = quantile or {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}[n]
    half = quantile * variance.sqrt() / (n ** 0.5 if root else 1)
    mean = (ours - theirs).mean()
    return mean.item(), (mean - half).item(), (mean + half).item()


def accumulate(loss, passes, optimizer, clip, share=3, each=None, zero=True, whole=True):
    """6_training, exercise 1. As it stands, right for three passes; each(weights): what is done
    after every pass."""
    learns = optimizer.param_groups[0]["params"]
    total = 0.0
    for rows in passes:
        mean = loss(rows).mean() / share
        mean.backward()
        total = mean.item() + total * whole
        if each:
            each(learns)
    torch.nn.utils.clip_grad_norm_(learns, clip)
    optimizer.step()
    if zero:
        optimizer.zero_grad()
    return total


def step_each_pass(loss, passes, optimizer, clip):
    return sum(accumulate(loss, [rows], optimizer, clip) for rows in passes)


def one_graph_for_all(loss, passes, optimizer, clip):
    return accumulate(loss, [torch.cat(passes)], optimizer, clip, share=1)


def clip_each_pass(loss, passes, optimizer, clip):
    def each(weights):
        torch.nn.utils.clip_grad_norm_(weights, clip)

    return accumulate(loss, passes, optimizer, clip, each=each)


def guard(losses, refused=lambda loss, mean: loss > 20 * mean or not math.isfinite(loss),
          enters=lambda taken: taken, mean=lambda old, new: 0.99 * old + 0.01 * new):
    """6_training, exercise 2. As it stands, right but for a NaN to begin with."""
    decisions, so_far = [True], losses[0]
    for loss in losses[1:]:
        decisions.append(not refused(loss, so_far))
        if enters(decisions[-1]):
            so_far = mean(so_far, loss)
    return decisions


def patient_guard(losses, **slips):
    """The same, right with a NaN to begin with as well."""
    start = next(i for i, loss in enumerate(losses) if math.isfinite(loss))
    return start * [False] + guard(losses[start:], **slips)


def contribute(cross, x, keys, values, scale=True, dim=-1, out=None, merge=True):
    """7_inspect, exercise 1. As it stands, right."""
    if out is None:
        out = functools.partial(torch.nn.functional.linear, weight=cross.out.weight)
    q = cross.heads(cross.q(x))
    scores = q @ keys.transpose(2, 3) / (q.shape[-1] ** 0.5 if scale else 1)
    weights = scores.softmax(dim).permute(3, 0, 1, 2)
    each = weights[..., None] * values.permute(2, 0, 1, 3)[:, :, :, None]
    each = each.transpose(2, 3) if merge else each
    return out(each.reshape(len(each), *x.shape))


def climbed(a, b, rungs=slice, rows=1):
    """7_inspect, exercise 2: picture n has the rungs in rungs(n) from b, in the last `rows` rows.
    As it stands, right."""
    n = len(a) + 1
    mixed = a.repeat_interleave(n, 1).unflatten(1, (-1, n)).clone()
    for i in range(n):
        mixed[rungs(i), -rows:, i] = b[rungs(i), -rows:]
    return mixed.flatten(1, 2)


def probed(x, y, x_test, one=True, scale=True, by=lambda x, x_test: (x, x), scores=False,
           penalty=0.01):
    """7_inspect, exercise 3: by(x, x_test) are the sets that the two are scaled by. As it stands,
    right."""
    def features(rows, by):
        rows = (rows - by.mean(0)) / (by.std(0, correction=0) + 1e-6) if scale else rows
        return torch.cat([rows, torch.ones(len(rows), 1)], 1) if one else rows

    of_x, of_test = by(x, x_test)
    X = features(x, of_x)
    gram = X.T @ X
    gram = gram + penalty * gram.diagonal().mean() * torch.eye(len(gram))
    W = torch.linalg.solve(gram, X.T @ torch.eye(2)[y])
    found = features(x_test, of_test) @ W
    return found if scores else found.argmax(1)


def joined(batches):
    """All latents at once, without torch.cat, which the check of 2.2 refuses."""
    numbers = [x for batch in batches for x in batch.flatten().tolist()]
    return torch.tensor(numbers).view(-1, *batches[0].shape[1:])


# Per exercise, mistakes that its check must find.
WRONG = {
    "1_flow": [
        [
            # 1 + g in place of g
            lambda model, x, t, labels, g: guide_at_once(model, x, t, labels, 1 + g),
            lambda model, x, t, labels, g: guide_at_once(model, x, t, labels, g[0]),
            lambda model, x, t, labels, g: guide_at_once(model, x, t, labels, 1 - g),
            guide_by_two_calls,
            lambda model, x, t, labels, g: guide_at_once(model, x, t, labels, g).tolist(),
            lambda model, x, t, labels, g: guide_at_once(model, x, t, labels, g).sum(1),
        ],
        [
            lambda velocity, x, t, s: x + (s - t) * velocity(x, t),
            lambda velocity, x, t, s: x - (s - t) * velocity(x, t),
            lambda velocity, x, t, s: x + (s - t) * (velocity(x, t) + velocity(x, s)) / 2,
            lambda velocity, x, t, s: None,
        ],
        [
            lambda std, t: 0.0,
            lambda std, t: 1 + std ** 2,
            lambda std, t: std ** 2,
            lambda std, t: (1 - t) ** 2 * std ** 2 + t ** 2,
            lambda std, t: std / ((1 - t) ** 2 * std ** 2 + t ** 2) ** 0.5,
            lambda std, t: torch.tensor(std ** 2 / ((1 - t) ** 2 * std ** 2 + t ** 2)),
        ],
    ],
    "2_latents": [
        [
            lambda x, channels: into_channels(x, channels, (1, 3, 5, 2, 4), by=torch.sum),
            # within a channel column by column; squares of the picture's quarters; places first
            lambda x, channels: into_channels(x, channels, (1, 5, 3, 2, 4)),
            lambda x, channels: into_channels(x, channels, (3, 5, 1, 2, 4)),
            lambda x, channels: x.reshape(len(x), channels, -1, 3, 2).mean(2),
            lambda x, channels: x[:, :1, ::2, ::2].expand(-1, channels, -1, -1),
            lambda x, channels: torch.nn.functional.pixel_unshuffle(x, 2),
            lambda x, channels: torch.pixel_unshuffle(x, 2).unflatten(1, (channels, -1)).mean(2),
            lambda x, channels: into_channels(x, channels, (1, 3, 5, 2, 4)).tolist(),
        ],
        [
            lambda batches: 1.0,
            # the factor of each batch, averaged; deviations averaged; about 0; without the root
            lambda batches: sum(1 / batch.std().item() for batch in batches) / len(batches),
            lambda batches: len(batches) / sum(batch.std().item() for batch in batches),
            lambda batches: 1 / joined(batches).pow(2).mean().sqrt().item(),
            lambda batches: 1 / joined(batches).var().item(),
            # within batches only
            lambda batches: 1 / joined([b - b.mean() for b in batches]).std().item(),
            lambda batches: joined(batches).std().item(),
            lambda batches: 1 / joined(batches).std(),
            lambda batches: 1 / joined(batches).std((0, 2, 3)),
            # right, but from all at once
            lambda batches: 1 / torch.cat(batches).std().item(),
        ],
        [
            lambda t, s: t,
            lambda t, s: t / s,
            lambda t, s: s * t / (1 + (s - 1) * t),
            lambda t, s: t / (t + (1 - t) / s),
            lambda t, s: torch.tensor(t / (t + s * (1 - t))),
        ],
    ],
    "3_mllm": [
        [
            lambda *given: layer(*given, scale=False),
            # key head i % G; nobody's
            lambda *given: layer(*given, shared=lambda x, n, dim: x.repeat(1, n, 1, 1)),
            lambda *given: layer(*given, future=True),
            lambda *given: layer(*given, padding=True),
            lambda *given: layer(*given, itself=False),
            lambda *given: layer(*given, dim=-2),
            lambda *given: layer(*given).transpose(1, 2),
            lambda *given: layer(*given).tolist(),
            lambda *given: None,
        ],
        [
            lambda h, w, side: torch.ones(h * w, h * w).bool(),
            lambda h, w, side: together(h, w, lambda y, x: (y * w + x) // side ** 2),
            lambda h, w, side: together(h, w, lambda y, x: x // side),
            lambda h, w, side: together(h, w, lambda y, x: y // side),
            lambda h, w, side: together(h, w, lambda y, x: y // 2 * w + x // 2),
            # two windows of one number
            lambda h, w, side: together(h, w, lambda y, x: y // side + x // side),
            lambda h, w, side: together(h, w, lambda y, x: y // side * w + x // side).float(),
            lambda h, w, side: together(h, w, lambda y, x: y // side * w + x // side).tolist(),
            lambda h, w, side: torch.arange(h * w),
        ],
        [
            lambda *given: turn(*given, apart=False),
            lambda *given: turn(*given, sign=-1),
            lambda *given: turn(*given, order=(0, 2, 1)),
            lambda *given: turn(*given, order=(0, 0, 0)),
            lambda *given: turn(*given, anew=True),
            lambda x, *given: x,
            lambda *given: turn(*given)[:, 0],
            lambda *given: turn(*given).tolist(),
        ],
    ],
    "4_dit": [
        [
            attend,
            lambda q, k, v: attend(q, k, v, own=lambda a: a, below=0),
            lambda q, k, v: attend(q.exp(), k.exp(), v, own=lambda a: a),
            attend_explicitly,
            lambda q, k, v: attend(q, k, v, own=lambda a: a).tolist(),
            lambda q, k, v: attend(q, k, v, own=lambda a: a).transpose(1, 2),
            lambda q, k, v: attend(q, k, v, own=lambda a: a) * torch.nan,
        ],
        [
            lambda N, K: N / K,
            # one product too many; upside down; of the N x N weights to the K x K ones
            lambda N, K: 2 * N / (2 * K + 2),
            lambda N, K: (2 * K + 1) / (2 * N),
            lambda N, K: N * N / (K * K),
            lambda N, K: torch.tensor(2 * N / (2 * K + 1)),
        ],
        [
            lambda *given: fold(*given, columns=0),
            lambda *given: fold(*given, rows=False),
            lambda *given: fold(*given, at=0),
            lambda *given: fold(*given, gated=False),
            lambda *given: fold(*given, at=1 + given[3]),
            lambda *given: fold(*given)[0],
            lambda *given: [x.tolist() for x in fold(*given)],
            lambda *given: fold(*given)[::-1],
        ],
    ],
    "5_ladder": [
        [
            lambda *given: climb(*given, start=0),
            lambda *given: climb(*given, counted=True),
            lambda *given: climb(*given, first=True),
            lambda *given: climb(*given, hidden=True),
            lambda *given: climb(*given, behind=True),
            lambda *given: climb(*given, up=1),
            lambda *given: climb(*given)[..., :-1],
            lambda *given: list(climb(*given)),
        ],
        [
            lambda ours, theirs: interval(ours, theirs, paired=False),
            lambda ours, theirs: interval(ours, theirs, less=0),
            lambda ours, theirs: interval(ours, theirs, root=False),
            lambda ours, theirs: interval(ours, theirs, quantile=1.96),
            lambda ours, theirs: interval(theirs, ours),
            lambda ours, theirs: interval(ours, theirs)[0],
        ],
        [
            lambda A: A,
            lambda A: A.log(),
            lambda A: A.clamp(min=1e-2).log(),
            lambda A: torch.where(A > 0, A.log(), -1e4),
            lambda A: torch.where(A > 0, A.log(), -50.0),
            lambda A: A.clamp_(min=1e-6).log(),
            # sharp enough where a row's numbers are equal
            lambda A: 20 * A,
            lambda A: A.clamp(min=1e-6).log().T,
            lambda A: None,
        ],
    ],
    "6_training": [
        [
            lambda *given: accumulate(*given, share=1),
            step_each_pass,
            clip_each_pass,
            one_graph_for_all,
            lambda *given: accumulate(*given, zero=False),
            lambda *given: accumulate(*given, whole=False),
            lambda *given: torch.tensor(accumulate(*given)),
            lambda *given: None,
        ],
        [
            guard,
            lambda losses: patient_guard(losses, enters=lambda taken: True),
            lambda losses: guard(losses, refused=lambda loss, mean: loss > 20 * mean),
            lambda losses: patient_guard(losses, mean=lambda old, new: new),
            lambda losses: patient_guard(losses, mean=lambda old, new: old),
            lambda losses: patient_guard(losses, mean=lambda old, new: 0.9 * old + 0.1 * new),
            lambda losses: torch.tensor(losses) < 20,
            lambda losses: [loss < 20 for loss in losses],
        ],
        [
            lambda r, p: (r >= p, r >= p),
            lambda r, p: (r >= 2 * p, r >= 2 * p),
            lambda r, p: (r >= p, not p <= r < 2 * p),
            lambda r, p: (r < 2 * p, p <= r < 3 * p),
            # two coins
            lambda r, p: (r >= 2 * p, 100 * r % 1 >= 2 * p),
            lambda r, p: r >= p,
            lambda r, p: torch.tensor([r >= 2 * p, not p <= r < 3 * p]),
        ],
    ],
    "7_inspect": [
        [
            lambda cross, *given: contribute(cross, *given, out=cross.out),
            lambda cross, *given: contribute(cross, *given) + cross.out.bias / 16,
            lambda *given: contribute(*given, scale=False),
            lambda *given: contribute(*given, dim=-2),
            lambda *given: contribute(*given, merge=False),
            lambda *given: contribute(*given).sum(0),
            lambda *given: contribute(*given).mean(0, keepdim=True).repeat(16, 1, 1, 1),
            lambda *given: None,
        ],
        [
            lambda a, b: a.repeat(1, len(a) + 1, 1, 1),
            lambda a, b: climbed(a, b, rungs=lambda n: slice(n, n + 1)),
            lambda a, b: climbed(a, b, rungs=lambda n: slice(n + 1)),
            lambda a, b: climbed(a, b, rows=2),
            lambda a, b: climbed(b, a),
        ],
        [
            lambda *given: probed(*given, one=False),
            lambda *given: probed(*given, scale=False),
            lambda *given: probed(*given, by=lambda x, x_test: (x, x_test)),
            lambda *given: probed(*given, by=lambda x, x_test: 2 * [torch.cat([x, x_test])]),
            lambda *given: probed(*given, penalty=0),
            lambda *given: probed(*given, scores=True),
            lambda *given: probed(*given, scores=True).max(1).values,
            lambda x, y, x_test: torch.zeros(len(x_test), dtype=torch.long),
            lambda *given: probed(*given).tolist(),
        ],
    ],
    "8_weights": [
        [
            lambda name, n: True,
            # the last layer of the small model, at any size
            lambda name, n: not re.search(r"visual|layers\.5\.|model\.norm|^vae\.encoder", name),
            lambda name, n: "visual" not in name and "encoder" not in name,
            lambda name, n: name.startswith(("model.transformer", "model.connector",
                                             "vae.decoder")),
            lambda name, n: None,
        ],
        [
            lambda table, patches, V, Q: (table[:V], table[-Q:], patches.flatten(1)),
            lambda table, patches, V, Q: (table[:-Q - 2], table[V + 1:V + Q + 1],
                                          patches.flatten(1)),
            lambda table, patches, V, Q: (table, table[V:V + Q], patches.flatten(1)),
            lambda table, patches, V, Q: (table[:V], table[V:V + Q],
                                          patches.transpose(1, 2).flatten(1)),
            lambda table, patches, V, Q: (table[:V], table[V:V + Q], patches),
            lambda table, patches, V, Q: (table[2:V + 2], table[V:V + Q], patches.flatten(1)),
            lambda table, patches, V, Q: table[:V],
        ],
        [0, 2, 5, 9, "1"],
    ],
}


# ---------------------------------------------------------------- reading and running them

def cells(file, kind="code"):
    return [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def prose(file):
    return "\n".join(source(cell) for cell in cells(file, "markdown"))


@pytest.fixture(scope="module")
def solutions():
    file = ROOT / "notebooks" / "instructor" / "solutions.py"
    spec = importlib.util.spec_from_file_location("notebook_solutions", file)
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


def check_exercise(number, cell, said, names, answer, mistakes):
    """Unsolved, the check says so; it passes the right answer and refuses the mistakes."""
    hook = f"answer_{number}"
    assert said == f"exercise {number}: not solved yet\n"
    names[hook] = answer
    assert f"exercise {number}: solved" in execute(cell, names)
    for wrong in mistakes:
        names[hook] = wrong
        # with words that help
        with pytest.raises(AssertionError, match=r"\w+ .*\w+"):
            execute(cell, names)
    names[hook] = None


# ---------------------------------------------------------------- the tests

@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_cell_runs_and_the_checks_check(file, solutions, clean, monkeypatch, tiny_folder):
    monkeypatch.chdir(ROOT / "notebooks")
    names = {"__name__": "__main__"}
    for cell in cells(file):
        said = execute(cell, names)
        if number := re.match(r"if answer_(\d) is None:", source(cell)):
            i = int(number[1]) - 1
            answer, mistakes = solutions[file.stem][i], WRONG[file.stem][i]
            check_exercise(number[1], cell, said, names, answer, mistakes)
        # "the real weights": here the tiny ones
        if "TBAC_WEIGHTS" in source(cell):
            assert "no folder" in said
            monkeypatch.setenv("TBAC_WEIGHTS", str(tiny_folder))
            assert "no folder" not in execute(cell, names)
            assert names["drawn"].size == (32, 32)


@pytest.mark.parametrize("folder", ["notebooks", "."])
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_first_cell_finds_the_repository(file, folder, clean, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    execute(cells(file)[0], {})
    assert str(ROOT) in sys.path


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_first_cell_fetches_what_is_not_there(file, clean, monkeypatch, tmp_path):
    """On a notebook server: cloned and installed, once."""
    monkeypatch.chdir(tmp_path)
    commands = []

    def run(command, check):
        assert check
        commands.append(command)
        if "clone" in command:
            (tmp_path / command[-1] / "notebooks").mkdir(parents=True)
            (tmp_path / command[-1] / "tbac.py").touch()

    monkeypatch.setattr("subprocess.run", run)
    names = {}
    for _ in range(2):
        execute(cells(file)[0], names)
        assert names["ROOT"] == tmp_path / "project"
        assert sys.path[0] == str(names["ROOT"])
    cloned, installed = commands
    assert cloned[:2] == ["git", "clone"] and cloned[-2] == names["REPOSITORY"]
    assert installed[1:4] == ["-m", "pip", "install"]


def test_every_address_is_that_of_the_project():
    """In the cell that fetches, and where a badge leads."""
    project = (ROOT / "pyproject.toml").read_text()
    address = re.search(r'^Repository = "https://github.com/(\S+)"$', project, re.M)[1]
    for file in FILES:
        assert f'REPOSITORY = "https://github.com/{address}"' in source(cells(file)[0])
        opening = source(cells(file, "markdown")[0])
        assert f"github/{address}/blob/main/notebooks/{file.name}" in opening
    readme = (ROOT / "README.md").read_text()
    assert f"https://colab.research.google.com/github/{address})" in readme


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_what_is_committed(file):
    assert file.stat().st_size < 400_000
    notebook = json.loads(file.read_text())
    text = prose(file)
    # And the one that finds the files.
    assert len(notebook["cells"]) <= 25 + 1
    assert "predict before you run" in text.lower()
    assert "What happened" in text
    assert notebook["metadata"].keys() <= {"kernelspec", "language_info", "outputs of"}
    assert not any(cell["metadata"] for cell in notebook["cells"])
    assert not re.search(r"/(home|root|work|tmp|Users)/", file.read_text()), "a path of a machine"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_outputs_are_committed(file):
    for i, cell in enumerate(cells(file)):
        code = source(cell)
        assert cell["execution_count"] == i + 1, "run from top to bottom: notebooks.run"
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert "error" not in kinds
        assert not any(output.get("name") == "stderr" for output in cell["outputs"])
        assert kinds or "print(" not in code, f"no output: {code[:60]}"
        # Two kinds of cells may draw later: the exercises and the one for the real weights.
        later = code.startswith("if answer_") or "TBAC_WEIGHTS" in code
        draws = re.search(r"plt\.show\(\)|^ *plots\.(?!style)\w+\(", code, re.M)
        assert not draws or "display_data" in kinds or later, f"no figure: {code[:60]}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_outputs_are_of_this_code_and_this_toy(file):
    """Else what the text says of them is of another one."""
    notebook = json.loads(file.read_text())
    made = notebook["metadata"]["outputs of"]
    assert made == run.origin(notebook["cells"]), f"python -m notebooks.run {file.stem}"
    changed = [*notebook["cells"], dict(cell_type="code", source=["pass"])]
    assert made["code"] != run.origin(changed)["code"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_exercises_and_links(file, solutions):
    code = [source(cell) for cell in cells(file)]
    text = prose(file)
    for n in (1, 2, 3):
        to_fill_in = [c for c in code if re.search(rf"^answer_{n} = None", c, re.M)]
        checks = [c for c in code if c.startswith(f"if answer_{n} is None:") and "assert " in c]
        assert len(to_fill_in) == 1, "one cell to fill in"
        assert len(checks) == 1, "one cell that checks"
    assert len(solutions[file.stem]) == 3
    assert len(WRONG[file.stem]) == 3 and all(WRONG[file.stem])
    # the last one leads back to the first
    following = NAMES[(NAMES.index(file.stem) + 1) % len(NAMES)]
    assert f"]({following}.ipynb)" in text
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text)
    assert all((file.parent / link).exists() for link in links)
    assert [f.stem for f in FILES] == NAMES


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_plain_python_without_model_code(file):
    for cell in cells(file):
        # a magic would not parse
        for node in ast.walk(ast.parse(source(cell))):
            assert not isinstance(node, ast.ClassDef), f"a class: {node.name}"


def imported(tree):
    """{name in a notebook: what it is}"""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = importlib.import_module(alias.name)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                with contextlib.suppress(ImportError):
                    importlib.import_module(f"{node.module}.{alias.name}")
                module = importlib.import_module(node.module)
                names[alias.asname or alias.name] = getattr(module, alias.name)
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_what_a_notebook_takes_from_a_module_is_there(file):
    """So that a function's new name shows before somebody runs the cells, which takes minutes."""
    tree = ast.parse("\n".join(source(cell) for cell in cells(file)))
    modules = {name: what for name, what in imported(tree).items() if inspect.ismodule(what)}
    taken = [(node.value.id, node.attr) for node in ast.walk(tree)
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    gone = [f"{name}.{what}" for name, what in taken
            if name in modules and not hasattr(modules[name], what)]
    assert len(modules) > 3 and not gone, gone


# What a link leads to: nothing that is shown.
ADDRESS = re.compile(r"\[\w+\]: http\S+")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_cells_are_at_most_100_columns_wide(file):
    for cell in [*cells(file), *cells(file, "markdown")]:
        for line in source(cell).splitlines():
            # An address cannot be broken.
            fits = len(line) <= 100 or ADDRESS.fullmatch(line)
            assert fits, f"{len(line)} columns: {line[:60]}"


# They say first what they are for, and keep to cells that fit on a screen.
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_goals_minutes_and_cells_that_fit_on_a_screen(file):
    opening = source(cells(file, "markdown")[0])
    assert "**Goals.**" in opening and "**Before:**" in opening
    assert re.search(r"\*\*Time:\*\*\s\d+\sminutes", opening)
    for cell in [*cells(file), *cells(file, "markdown")]:
        lines = [line for line in source(cell).splitlines() if not ADDRESS.fullmatch(line)]
        assert len(lines) <= 25, f"{len(lines)} lines: {lines[0]}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_figures_fit_a_page_of_800_pixels(file):
    for data in (output.get("data", {}) for cell in cells(file) for output in cell["outputs"]):
        if "image/png" in data:
            picture = Image.open(io.BytesIO(base64.b64decode("".join(data["image/png"]))))
            assert picture.width <= 820, f"{picture.width} pixels wide"
        # A film.
        assert len("".join(data.get("text/html", ""))) < 150_000
