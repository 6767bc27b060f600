"""What changes while training, and how it is kept: learning rate, guard, optimizer, running mean of the weights, checkpoints, the log.

Under FSDP every tensor here is sharded; on the disk it is whole, so that a run goes on with another number of processes.
"""
import contextlib
import itertools
import json
import math
import os
import shutil

import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from tbac import read_tensors, sync, weight_files, write_shards


def learning_rate(step, a):
    """Linear warm-up, then a cosine down to `floor` of the peak."""
    if step < a.warmup:
        return a.lr * (step + 1) / a.warmup
    progress = (step - a.warmup) / max(1, a.steps - a.warmup)
    return a.lr * (a.floor + (1 - a.floor) * (1 + math.cos(math.pi * progress)) / 2)


class Guard:
    """Decides *before* the optimizer step whether it is taken. The limits are the released code's, which compares after stepping, and with means
    that hold the spike already; here skipped values do not enter the means."""

    def __init__(self):
        self.loss, self.norm, self.skipped, self.in_a_row = None, None, 0, 0    # running means (0.99), counts

    def reason(self, loss, norm):
        """Why not to take this step, or None."""
        if not math.isfinite(loss) or not math.isfinite(norm) or norm > 1e6:
            return f"loss {loss:g}, gradient norm {norm:g}"
        if self.loss is not None and loss > 20 * self.loss:
            return f"loss {loss:g} is above 20 times its mean {self.loss:g}"
        if self.norm is not None and norm > max(1, 25 * self.norm):
            return f"gradient norm {norm:g} is above 25 times its mean {self.norm:g}"
        return None

    def refuses(self, loss, norm):
        """Why a step is refused, or None. Keeps the means and the counts. Raises ValueError at the tenth refusal in a row."""
        if reason := self.reason(loss, norm):
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if self.in_a_row == 10:
                raise ValueError(f"ten steps in a row were skipped, the last one for: {reason}. Look at the data of these steps in log.jsonl, then "
                                 "--resume with a smaller --lr, a longer --warmup or a smaller --clip; --no-guard takes every step")
            return reason
        mean = lambda old, new: new if old is None else 0.99 * old + 0.01 * new
        self.loss, self.norm, self.in_a_row = mean(self.loss, loss), mean(self.norm, norm), 0
        return None


class State:
    """What changes while training, and what a checkpoint holds: weights, their running mean, AdamW's moments, the guard, counts."""

    def __init__(self, trained, a):
        self.params, self.step, self.updates, self.seen, self.guard, self.past = trained, 0, 0, 0, Guard(), []
        # updates: steps taken; seen: examples, on all processes; past: of data.Share
        self.saved = None                                                       # the step of the last checkpoint
        self.mean = {n: p.detach().clone() for n, p in trained.items()} if a.ema else trained
        matrices, others = ([p for p in trained.values() if (p.dim() > 1) == matrix] for matrix in (True, False))
        groups = [dict(params=matrices, weight_decay=a.weight_decay), dict(params=others, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=a.lr, betas=tuple(a.betas), fused=True)

    @torch.no_grad()
    def update(self, a):
        """One optimizer step, and the mean follows."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, a)
        self.optimizer.step()
        self.updates += 1
        if a.ema:                                                               # a short memory at first, to forget the start
            torch._foreach_lerp_(list(self.mean.values()), list(self.params.values()), 1 - min(a.ema, self.updates / (self.updates + 10)))

    def tensors(self):
        """Yields (name, whole tensor), on every process at once where they are sharded."""
        for n, p in self.params.items():
            mean = dict(mean=self.mean[n]) if self.mean is not self.params else {}
            for kind, t in (dict(param=p) | mean | self.optimizer.state.get(p, {})).items():      # AdamW has none where there was no gradient yet
                yield f"{kind}.{n}", whole(t)

    def facts(self):
        """What is not a tensor, for JSON."""
        return dict(step=self.step, updates=self.updates, seen=self.seen, past=self.past, guard=vars(self.guard))

    @torch.no_grad()
    def load(self, folder):
        facts = json.loads((folder / "state.json").read_text())
        self.step, self.updates, self.seen = facts["step"], facts["updates"], facts["seen"]
        self.past = [(world, reached) for world, reached in facts["past"]]
        self.guard.__dict__ |= facts["guard"]
        self.saved, stored = self.step, set()
        for file in weight_files(folder):
            for name, t in read_tensors(file):
                kind, n = name.split(".", 1)
                stored.add(name)
                p = self.params.get(n)
                if p is None or kind != "step" and t.shape != p.shape:
                    raise ValueError(f"{folder} holds {name} {tuple(t.shape)}, which does not learn here: of another --stage or --model?")
                if kind not in ("param", "mean"):
                    moments = self.optimizer.state[p]
                    moments[kind] = fill(torch.empty((), device=p.device) if kind == "step" else torch.empty_like(p), t)
                elif kind == "param" or self.mean is not self.params:           # with --ema 0 a stored mean is left out
                    fill({"param": p, "mean": self.mean[n]}[kind], t)
        for n, p in self.params.items():
            if f"param.{n}" not in stored:
                raise ValueError(f"{folder} lacks {n}, which learns here: of another --stage or --model?")
            if f"mean.{n}" not in stored:                                       # a run with --ema 0 so far
                self.mean[n].copy_(p)


def whole(t):
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


def fill(into, t):
    return into.copy_(distribute_tensor(t.to(into.device), into.device_mesh, into.placements) if isinstance(into, DTensor) else t)


# ---------------------------------------------------------------------------------------------------------- checkpoints

def checkpoints(out):
    """The whole ones, oldest first. One that was being written when the machine stopped has another name."""
    return sorted((out / "checkpoints").glob("step-*"))


def save(model, state, frozen, a, rank):
    """A checkpoint, and the model with the mean weights. On every process (shards are put together), written by the first."""
    new_step = state.step != state.saved                                        # else a resumed run had nothing left to do
    tensors = state.tensors() if new_step else ()
    weights = ((n, whole(state.mean[n]) if n in state.mean else frozen[n]) for n in [*frozen, *(n for n in state.mean if not n.startswith("extra."))])
    if rank > 0:
        for _ in itertools.chain(tensors, weights):
            pass
        return
    folder = a.out / "checkpoints"
    new = folder / ".new"
    try:
        shutil.rmtree(new, ignore_errors=True)
        if new_step:
            new.mkdir(parents=True)
            write_shards(new, tensors)
            (new / "state.json").write_text(json.dumps(state.facts()))
            sync(new)
            os.rename(new, folder / f"step-{state.step:08d}")
            sync(folder)
            for old in checkpoints(a.out)[:-a.keep]:
                shutil.rmtree(old)
        model.save(a.out, tensors=weights)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(new, ignore_errors=True)
        last = checkpoints(a.out)
        whole_one = f"{last[-1]} is whole, --resume goes on from it" if last else ""
        raise ValueError(f"step {state.step} could not be saved: {e}. {whole_one}") from None


@contextlib.contextmanager
def mean_weights(learner, state):
    """The model with its mean weights, whole on every process."""
    kept = {n: p.detach().clone() for n, p in state.params.items()}
    with torch.no_grad():
        for n, p in state.params.items():
            p.copy_(state.mean[n])
    if isinstance(learner, FSDPModule):
        learner.unshard()
    try:
        yield
    finally:
        if isinstance(learner, FSDPModule):
            learner.reshard()
        with torch.no_grad():
            for n, p in state.params.items():
                p.copy_(kept[n])


# -------------------------------------------------------------------------------------------------------------- the log

def logged(out):
    """The steps in log.jsonl, in order. A run that was killed and resumed wrote some twice: the later row counts; a crash cut one in half."""
    rows = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows |= {row["step"]: row} if "loss" in row else {}
    return [rows[step] for step in sorted(rows)]


def curves(out):
    """curves.png from log.jsonl: loss, loss by t, gradient norm with the skipped steps, learning rate."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = logged(out)
    steps, n = [row["step"] for row in rows], max(1, len(rows) // 100)

    def smooth(values):
        """Means over the last n values that are there."""
        parts = ([v for v in values[max(0, i - n + 1):i + 1] if v is not None and math.isfinite(v)] for i in range(len(values)))
        return [sum(part) / len(part) if part else math.nan for part in parts]
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    loss, by_t, norm, rate = axes.flat
    loss.plot(steps, [row["loss"] for row in rows], color="0.8", lw=0.5), loss.plot(steps, smooth([row["loss"] for row in rows]), color="C0")
    loss.set(title=f"loss, and its mean over {n} steps", yscale="log")
    if rows and rows[0].get("by_t"):
        for i in range(10):
            by_t.plot(steps, smooth([row["by_t"][i] for row in rows]), color=plt.cm.viridis(i / 9), label=f"{i / 10:.1f}-{(i + 1) / 10:.1f}")
        by_t.legend(fontsize=7, ncols=2, title="t (1 is noise)")
    by_t.set(title="loss by time", yscale="log")
    norm.plot(steps, [row["norm"] for row in rows], color="0.8", lw=0.5), norm.plot(steps, smooth([row["norm"] for row in rows]), color="C1")
    skipped = [row for row in rows if row["skipped"]]
    norm.plot([row["step"] for row in skipped], [row["norm"] for row in skipped], "rx", label=f"{len(skipped)} skipped"), norm.legend()
    norm.set(title="gradient norm", yscale="log")
    rate.plot(steps, [row["lr"] for row in rows], color="C2"), rate.set(title="learning rate")
    for axis in axes.flat:
        axis.set(xlabel="step"), axis.grid(alpha=0.3)
    figure.savefig(out / "curves.png", dpi=80), plt.close(figure)
