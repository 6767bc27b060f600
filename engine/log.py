"""The log of a run: a progress bar, a line of JSON for each step, curves drawn from them."""
import contextlib
import dataclasses
import json
import math
import sys

import numpy as np
import torch
from matplotlib import cm
from matplotlib.figure import Figure
from tqdm import tqdm

from engine.checks import Kind, number, or_null, several, whole
from engine.files import as_json, new_file, open_to_read
from engine.limits import MAX_TRAINING_STEPS
from engine.pictures import contact_sheet


@dataclasses.dataclass
class Report:
    """After a step: what it cost, and why it was skipped, if it was. by_t: mean loss in ten bins of
    t of this process's rows. examples: these rows, by name or text, if the step was skipped."""
    step: int
    loss: float
    norm: float
    lr: float
    skipped: str | None
    by_t: list | None
    examples: list | None


def peak_memory(device: str) -> float:
    """GB, of the GPU or of this process; NaN where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Windows has no such module.
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def mean_loss(results: list) -> float:
    """results: [(losses (B,), times (B,) or None)] of each pass"""
    return torch.cat([losses for losses, _ in results]).mean().item()


def loss_by_time(results: list) -> list | None:
    """The mean loss in ten bins of t, of this process's rows; None where a bin has no row."""
    losses, times = zip(*results)
    if times[0] is None:
        return None
    losses, times = torch.cat(losses), torch.cat(times)
    bins = (times * 10).clamp(max=9.99).long()
    found = [losses[bins == i] for i in range(10)]
    return [part.mean().item() if len(part) else None for part in found]


def example_names(passes) -> list[str]:
    """What the log calls the examples of a step: a record's name, else its text."""
    examples = [example for rows in passes for example, _ in rows]
    found = [getattr(e, "name", "") or getattr(e, "prompt", e) for e in examples]
    return [str(name)[:200] for name in found]


def example_sheet(examples: list, drawn: list, size: int):
    """For each example what it starts from, what it should become, and what was drawn -> a PIL
    page. size: side of a picture in pixels."""
    pictures, labels = [], []
    for example, picture in zip(examples, drawn):
        # A cached target is latents, not a picture.
        target = [] if isinstance(example.target, torch.Tensor) else [example.target]
        pictures += [*example.images, *target, picture]
        labels += ["from"] * len(example.images) + ["to"] * len(target) + [example.prompt]
    # Pictures to start from may have any size.
    return contact_sheet(pictures, labels, scale=max(1, 128 // size), columns=6, size=(size, size))


class Log:
    """Writes log.jsonl and the bar while a run goes on: `with Log(run) as log`, `log.write(report,
    seconds)` after each step. The first process writes the steps, each process names its own broken
    records."""

    def __init__(self, run):
        self.run = run
        self.args = run.args
        self.mean = None                    # of the loss, for the bar
        self.named = 0                      # broken records that are in the log

    def __enter__(self):
        args, rank = self.args, self.run.rank
        path = args.out / "log.jsonl"
        self.file = open(path, "a")
        # A crash may have left half a line.
        if rank == 0 and path.read_bytes()[-1:] not in (b"", b"\n"):
            self.file.write("\n")
            # Before another process adds a line of its own.
            self.file.flush()
        self.bar = tqdm(total=args.steps, initial=self.run.state.step, desc=args.stage,
                        mininterval=1, disable=rank > 0)
        return self

    def __exit__(self, *_):
        self.file.close()
        self.bar.close()

    def write(self, report, seconds: float) -> None:
        args, run = self.args, self.run
        rate = args.batch * args.accumulate * run.n_process / seconds       # pictures a second
        memory = peak_memory(args.device)
        self.name_broken(report.step)
        if run.rank == 0:
            row = dataclasses.asdict(report)
            row |= dict(images_per_second=round(rate, 2), memory_gb=round(memory, 3))
            self.file.write(as_json(row) + "\n")
            if report.skipped:
                self.bar.write(f"step {report.step} not taken: {report.skipped}")
        elif report.skipped:
            row = dict(step=report.step, process=run.rank, examples=report.examples)
            self.file.write(as_json(row) + "\n")
        self.file.flush()
        self.show(report, rate, memory)

    def name_broken(self, step: int) -> None:
        bad = self.run.reader.bad[self.named:]
        if bad:
            self.named += len(bad)
            self.file.write(as_json(dict(step=step, process=self.run.rank, bad=bad)) + "\n")
            self.bar.write("\n".join(f"skipped: {what}" for what in bad))

    def show(self, report, rate: float, memory: float) -> None:
        if self.mean is None or not math.isfinite(self.mean):
            self.mean = report.loss
        else:
            self.mean = 0.98 * self.mean + 0.02 * report.loss
        self.bar.update()
        text = (f"loss {self.mean:.4f}, norm {report.norm:.2f}, lr {report.lr:.1e}, "
                f"{rate:.1f} images/s, {memory:.1f} GB")
        self.bar.set_postfix_str(text, refresh=False)


# --------------------------------------------------------------------------------------- curves

VALUE = or_null(number(-sys.float_info.max, sys.float_info.max))
# What a line of log.jsonl may say of a step; the first two always.
ROW = {
    "step": whole(0, MAX_TRAINING_STEPS),
    "loss": VALUE,
    "norm": VALUE,
    "lr": VALUE,
    "skipped": or_null(Kind("a text", lambda value: isinstance(value, str))),
    "by_t": or_null(several(10, 10, VALUE)),
}


def check_row(row, where: str) -> None:
    """ValueError for a line that says of a step what cannot be."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object")
    for key, kind in ROW.items():
        if key in row:
            kind.check(row[key], f"{where}: {key}")
        elif key in ("step", "loss"):
            raise ValueError(f"{where} has no {key}")


def read_log(out) -> list[dict]:
    """The steps in log.jsonl, in order. A run that was killed, and goes on from a checkpoint or
    anew, writes some once more: with the first of them all that were ahead of it no longer count. A
    crash has cut a row in half."""
    rows = []
    with open_to_read(out / "log.jsonl") as lines:
        for i, line in enumerate(lines):
            row = {}
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line.decode(errors="replace"))
            # Lines without a loss are of broken records, or of another process.
            if not isinstance(row, dict) or "loss" in row:
                check_row(row, f"{out / 'log.jsonl'}, line {i + 1}")
                while rows and rows[-1]["step"] >= row["step"]:
                    rows.pop()
                rows.append(row)
    return rows


def smooth(values: list, n: int) -> np.ndarray:
    """Means over the last n values, of those that are there; NaN where none is."""
    # None becomes NaN.
    x = np.array(values, float)
    if not len(x):
        return x
    there = np.isfinite(x)
    sums, counts = (np.convolve(row, np.ones(n))[:len(x)] for row in (np.where(there, x, 0), there))
    with np.errstate(invalid="ignore"):
        return sums / counts


def plot_curves(out) -> None:
    """curves.png from log.jsonl: loss, loss by t, gradient norm with skipped steps, learning rate.
    """
    rows = read_log(out)
    n = max(1, len(rows) // 100)
    figure = Figure((12, 8), layout="constrained")
    loss, by_time, norm, rate = figure.subplots(2, 2).flat
    plot_smoothed(loss, rows, "loss", n, "C0")
    loss.set(title=f"loss, and its mean over {n} steps", yscale="log")
    plot_by_time(by_time, rows, n)
    plot_smoothed(norm, rows, "norm", n, "C1")
    skipped = [row for row in rows if row.get("skipped")]
    norm.plot([row["step"] for row in skipped], [row.get("norm") for row in skipped], "rx",
              label=f"{len(skipped)} skipped")
    norm.legend()
    norm.set(title="gradient norm", yscale="log")
    rate.plot([row["step"] for row in rows], [row.get("lr") for row in rows], color="C2")
    rate.set(title="learning rate")
    for axis in (loss, by_time, norm, rate):
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
    with new_file(out / "curves.png") as file:
        figure.savefig(file, format="png", dpi=80)


def plot_smoothed(axis, rows: list[dict], key: str, n: int, color: str) -> None:
    steps = [row["step"] for row in rows]
    values = [row.get(key) for row in rows]
    axis.plot(steps, values, color="0.8", lw=0.5)
    axis.plot(steps, smooth(values, n), color=color)


def plot_by_time(axis, rows: list[dict], n: int) -> None:
    axis.set(title="loss by time", yscale="log")
    if not rows or not rows[0].get("by_t"):
        return
    steps = [row["step"] for row in rows]
    for i in range(10):
        values = smooth([row["by_t"][i] if row.get("by_t") else None for row in rows], n)
        label = f"{i / 10:.1f}-{(i + 1) / 10:.1f}"
        axis.plot(steps, values, color=cm.viridis(i / 9), label=label)
    axis.legend(fontsize=7, ncols=2, title="t (1 is noise)")
