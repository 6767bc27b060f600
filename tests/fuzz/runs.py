"""Hostile run folders: what --resume reads, damaged key by key and tensor by tensor."""
import atexit
import functools
import os
import pathlib
import shutil
import tempfile

import torch
from safetensors.torch import load_file, save_file

import train
from tests.fuzz.harness import Case, command, damaged_copy
from tests.fuzz.models import edit_json, tiny

STATE = "checkpoints/step-00000002/state.json"
TENSORS = "checkpoints/step-00000002/model.safetensors"
RUN = ("--stage", "mix", "--size", 32, "--batch", 1, "--warmup", 1, "--sheet-every", 0, "--dtype",
       "float32", "--plain", "--steps", 2)


@functools.cache
def finished() -> pathlib.Path:
    """The folder of a run of two steps, made once, before any case is run."""
    out = pathlib.Path(tempfile.mkdtemp()) / "run"
    atexit.register(shutil.rmtree, out.parent, ignore_errors=True)
    args = train.options([str(word) for word in (*RUN, "--model", tiny(), "--out", out)])
    started = train.Run(args)
    list(started.steps())
    started.save()
    train.store(args)
    (out / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return out


def damaged(edit):
    return damaged_copy(finished, "run", edit)


def edit_tensors(change):
    def edit(folder):
        found = load_file(folder / TENSORS)
        change(found)
        save_file(found, folder / TENSORS)
    return edit


def first(found: dict, kind: str) -> str:
    return min(name for name in found if name.startswith(f"{kind}."))


def drop(*kinds: str, every: bool = False):
    def change(found):
        for kind in kinds:
            names = sorted(name for name in found if name.startswith(f"{kind}."))
            for name in names if every else names[:1]:
                del found[name]
    return edit_tensors(change)


def fill(kind: str, value: float):
    return edit_tensors(lambda found: found[first(found, kind)].fill_(value))


def replaced(kind: str, change):
    def edit(found):
        name = first(found, kind)
        found[name] = change(found[name])
    return edit_tensors(edit)


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


NAN, INF = float("nan"), float("inf")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
# what is wrong -> (how, what the message must name)
DAMAGE = {
    "one moment is missing": (drop("exp_avg"), r"lacks exp_avg\.\S+, but has"),
    "one variance is missing": (drop("exp_avg_sq"), r"lacks exp_avg_sq\.\S+, but has"),
    "one count is missing": (drop("step"), r"lacks step\.\S+, but has"),
    "all of one parameter": (drop(*MOMENTS), "tensors, and its state.json says"),
    "all moments": (drop(*MOMENTS, every=True), "tensors, and its state.json says"),
    "one mean is missing": (drop("ema"), "tensors, and its state.json says"),
    "all means": (drop("ema", every=True), "tensors, and its state.json says"),
    "one weight is missing": (drop("param"), "lacks .*which learns here"),
    "a variance below 0": (fill("exp_avg_sq", -1), r"exp_avg_sq\.\S+ has values below 0"),
    "a count below 0": (fill("step", -1), r"step\.\S+ has values below 0"),
    "a tensor more": (edit_tensors(lambda t: t.update(x=torch.zeros(1))), "holds 'x'"),
    "a name of escapes": (edit_tensors(lambda t: t.update({"\x1b[2J": torch.zeros(1)})),
                          r"holds '\\x1b\[2J'"),
    "a moment of another kind": (edit_tensors(lambda t: t.update(
        {"max" + first(t, "param")[5:]: t[first(t, "param")].clone()})), r"holds 'max\."),
    "half precision": (replaced("param", torch.Tensor.half), "float16"),
    "whole numbers": (replaced("exp_avg", torch.Tensor.int), "int32|I32"),
    "another shape": (replaced("exp_avg", lambda t: t[:1].clone()), r"holds 'exp_avg\."),
    "tensors are cut": (lambda folder: os.truncate(folder / TENSORS, 5000), "cannot be read"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), r"has no \*.safetensors"),
    "no state": (lambda folder: (folder / STATE).unlink(), "state.json is missing"),
    "the state is a FIFO": (lambda folder: ((folder / STATE).unlink(), os.mkfifo(folder / STATE)),
                            "state.json is not a regular file"),
    "another step": (lambda folder: (folder / STATE).parent.rename(
        folder / "checkpoints/step-00000007"), "step = 2, and the folder"),
    "an unknown option": (edit_json("options.json", "help", "true"), "unknown option 'help'"),
    "the log has no step": (write("log.jsonl", b'{"loss": 1}\n'), "log.jsonl, line 1 has no step"),
    "the log has text": (write("log.jsonl", b'{"step": 1, "loss": "x"}\n'), "line 1: loss = 'x'"),
    "the log is a number": (write("log.jsonl", b"3\n"), "log.jsonl, line 1 is no object"),
    "the log is a FIFO": (lambda folder: ((folder / "log.jsonl").unlink(),
                                          os.mkfifo(folder / "log.jsonl")), "not a regular file"),
}
DAMAGE |= {f"{value} in {kind}": (fill(kind, value), rf"{kind}\.\S+ has values that are not finite")
           for kind in ("param", "ema", *MOMENTS) for value in (NAN, INF)}
DAMAGE |= {f"{name} is {content[:12]}": (write(name, content), pathlib.Path(name).name)
           for name in (STATE, "options.json")
           for content in (b"", b"[]", b"{}", b"null", b'{"step": 2, ', b"\xff\xfe",
                           b"[" * 100_000)}
# Key by key, as JSON; None: missing.
KEYS = {
    "step": ("null", '"2"', "1", "-1", "1.5", "1000000000000", "true", None),
    "updates": ("null", '"2"', "3", "-1", "true", None),
    "seen": ("null", "1", "-1", "1e300", None),
    "tensors": ("null", "0", "1", '"x"', None),
    "guard": ("null", "[]", "{}", None),
    "guard.mean_loss": ("NaN", "-1", '"x"', "Infinity", None),
    "guard.in_a_row": ("null", "11", "-1", None),
    "guard.skipped": ("null", "[]", None),
    "history": ("null", "{}", "[1]", "[[1]]", "[[1, 2]]", "[[2, [1]]]", "[[0, []]]",
                "[[1000000000, []]]", "[[1, [1000000000]]]", '[[1, ["x"]]]', "[[1, [-1]]]", None),
    "model": ("null", "[]", "{}", None),
    "model.wiring": ('"final"', "3", None),
    "model.dit.n_layer": ("3", None),
}
OPTIONS = {
    "batch": ('"x"', "[1, 2]", "null", "0", "1e400", "{}", "true"),
    "lr": ("null", "NaN", "1e38", '"x"'), "guard": ('"yes"', "1", "null"),
    "clip": ("NaN", "null", "-1"), "betas": ("[1]", "0.9", "[0.9, 2]", "null"),
    "stage": ('"x"', "null", "3"), "preset": ('"x"', "null"), "dtype": ('"int8"', "null"),
    "device": ('"hpu"', "null"), "data": ("[]", "[1]", '["none"]'), "wiring": ('"x"', '"final"'),
    "queries": ("0", '"x"', "9"), "model": ('"none"', "3", "null"), "take": ('["x"]', '"x"'),
    "seed": ("-1", "1e30"), "shift": ("NaN", "0"),
}


def damage_table():
    yield from DAMAGE.items()
    for key, values in KEYS.items():
        for value in values:
            yield f"state.json: {key} = {value}", (edit_json(STATE, key, value), "state.json")
    for key, values in OPTIONS.items():
        for value in values:
            yield f"options.json: {key} = {value}", (edit_json("options.json", key, value), "")


def resume_cases():
    resume = command(train.main, "--resume", "--steps", 3, "--out", "{}/run")
    for what, (edit, names) in damage_table():
        yield Case(f"--resume: {what}", resume, damaged(edit), names=names)
