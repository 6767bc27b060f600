"""Hostile command lines: numbers, devices, texts, paths, and what lies where a picture, a run or
scores are to be written."""
import contextlib
import fcntl
import json
import os
import shutil
import struct
import zlib

from PIL import Image

import sample
import train
import weights_convert
from lab import ablate, evaluate, figures, pretrain
from tests.conftest import TINY
from tests.fuzz.harness import Case, command
from tests.fuzz.models import tiny

# No option means one of these.
NUMBERS = ("nan", "-nan", "inf", "-inf", "-1", "1e38", "1e400", "abc", "", "0x10", "1,5", "1 2",
           "99999999999999999999", "9" * 5000, "\udcff", "\0")
SCRIPTS = {
    "sample": (sample.options, ("a dog",), "n seed steps guidance image-guidance size port"),
    "train": (train.options, (), "queries size cond-drop shift max-bad steps epochs batch "
              "accumulate lr warmup min-lr-ratio weight-decay clip ema seed workers save-every "
              "keep sheet-every"),
    "pretrain": (pretrain.options, (), "steps lr batch"),
    "evaluate": (evaluate.options, (), "n pictures seed steps guidance image-guidance batch"),
    "ablate": (ablate.options, ("settings",), "seeds steps batch looks n pictures draw-steps jobs"),
}
DEVICES = ("hpu", "banana", "", "cuda:x", "cuda:-1", "cuda:99999", "meta", "cpu:1:2", "\udcff",
           "x" * 10_000)
PATHS = ("", "\udcff", "a\udcff/b")


def number_cases():
    for script, (options, first, names) in SCRIPTS.items():
        for name in names.split():
            for value in NUMBERS:
                words = [*first, f"--{name}={value}"]
                yield Case(f"{script} --{name} {value[:30]!r}", lambda _, o=options, w=words: o(w),
                           names=f"^error: .*--{name}")


def option_cases():
    for script, (options, first, _) in SCRIPTS.items():
        for option, values in (("device", DEVICES), ("model", PATHS), ("out", PATHS)):
            for value in values:
                words = [*first, f"--{option}={value}"]
                yield Case(f"{script} --{option} {value[:30]!r}",
                           lambda _, o=options, w=words: o(w), names=f"^error: .*--{option}")
        for words in (["--nothing"], ["--mod", "x"], ["--dtype", "int4"]):
            yield Case(f"{script} {words}", lambda _, o=options, w=[*first, *words]: o(w),
                       names="^error: ")
    for words in (["--n", "2", "--n"], ["a", "--ask", "b"], ["--image", "x.png", "draw"],
                  ["--ask", "x" * 100_000], ["\udcff"], ["x" * 1_000_000], ["a", "--size", "1x2x3"],
                  ["a", "--size", "999999999x1"], ["a", "--solver", "x"]):
        yield Case(f"sample {str(words)[:50]}", lambda _, w=words: sample.options(w),
                   names="^error: ")
    for words in (["--take", "x"], ["--take", "dit"], ["--take", "dit="], ["--wiring", "x"],
                  ["--stage", "x"], ["--preset", "paper", "--stage", "x"], ["--betas", "0.9"],
                  ["--betas", "nan", "0"], ["--betas", "1", "0"], ["--data"], ["--data", "\udcff"]):
        yield Case(f"train {words}", lambda _, w=words: train.options(w), names="^error: ")


# ------------------------------------------------------------------------------ what drawing meets

def model(folder):
    shutil.copytree(tiny(), folder / "model")


def draw(*words):
    return command(sample.main, *(words or ("a dog",)), "--model", "{}/model", "--steps", 1)


def held(name: str, make):
    def arrange(folder):
        model(folder)
        (folder / "aim").write_text("precious")
        make(folder / name)
    return arrange


def png(file):
    Image.new("RGB", (32, 32)).save(file, "png")


PLACES = {
    "a FIFO": os.mkfifo,
    "a folder": lambda file: file.mkdir(),
    "a link to a file": lambda file: file.symlink_to("aim"),
    "a link to nothing": lambda file: file.symlink_to("nothing"),
    "a link to a device": lambda file: file.symlink_to("/dev/null"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a text": lambda file: file.write_text("precious"),
    "an empty file": lambda file: file.write_text(""),
    "a JPEG": lambda file: Image.new("RGB", (4, 4)).save(file, "jpeg"),
}


def place_cases():
    for name, more in (("o.png", ()), ("o-2.png", ("--n", 2)), ("o-explain.png", ("--explain",)),
                       ("o-explain.html", ("--explain",))):
        for what, make in PLACES.items():
            yield Case(f"sample: {name} is {what}", draw("a dog", "--out", "{}/o.png", *more),
                       held(name, make), names=r"o.*(png|html)")
        if name.endswith("png"):
            yield Case(f"sample: {name} is a PNG", draw("a dog", "--out", "{}/o.png", *more),
                       held(name, png), "works", writes=("o*.png", "o-explain.html"))
    for out in ("aim", "LICENSE.txt", "o.jpg", "no/o.png", "x" * 300 + ".png", ".png", "/dev/null",
                "/proc/o.png", "."):
        path = out if out.startswith("/") else "{}/" + out
        yield Case(f"sample --out {out[:30]}", draw("a dog", "--out", path),
                   held("other", png), names="(?i)out|name too long|proc")
    for size in ("0", "30", "32x31", "8192x1", "-32", "32x", "x"):
        yield Case(f"sample --size {size}", draw("a dog", f"--size={size}"), model, names="size")


# -------------------------------------------------------------------------------------- pictures in

def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data))
            + chunk(b"IEND", b""))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file closefile\nshowpage\n"
PICTURES = {
    "PostScript": POSTSCRIPT,
    "PDF": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>',
    "a bomb": png_of(40_000, 40_000, bytes(100)),
    "a large one": png_of(9400, 9400, bytes(9400 * 9400 * 4 // 100)),
    "no width": png_of(0, 10), "no data": png_of(10, 10),
    "thin": png_of(100_000, 1, bytes(400_001)),
    "text": b"not a picture", "empty": b"", "half a PNG": png_of(10, 10)[:30],
    "a JPEG cut": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "a GIF cut": b"GIF89a\x01\x00",
    "XPM": b'/* XPM */\nstatic char *x[] = {"1 1 1 1", "a c #fff", "a"};',
    "a tar": b"x" * 512,
}


def picture_cases():
    for what, content in PICTURES.items():
        for name in ("in.jpg", "in.png"):
            def arrange(folder, name=name, content=content):
                model(folder)
                (folder / name).write_bytes(content)
            yield Case(f"--image: {what} called {name}",
                       draw("edit it", "--image", "{}/" + name, "--out", "{}/o.png"), arrange,
                       names="in\\.")
    for what in ("a FIFO", "a folder", "a link to nothing", "a link to itself", "a text"):
        yield Case(f"--image: {what}", draw("--ask", "what?", "--image", "{}/in.png"),
                   held("in.png", PLACES[what]), names="in.png")
    yield Case("--image: /dev/zero", draw("--ask", "what?", "--image", "/dev/zero"), model,
               names="/dev/zero")
    yield Case("--image: 17 of them", draw("--ask", "what?", "--image", *["{}/a.png"] * 17),
               held("a.png", png), names="limit|more than")
    yield Case("--image is --out", draw("edit it", "--image", "{}/o.png", "--out", "{}/o.png"),
               held("o.png", png), names="would be lost")


# ------------------------------------------------------------------------------------ runs, scores

def run(*words):
    length = () if "--epochs" in words else ("--steps", 1)
    return command(train.main, "--model", "{}/model", "--size", 32, "--batch", 1, *length,
                   "--warmup", 1, "--sheet-every", 0, "--plain", "--out", "{}/run", *words)


def run_place(name: str, make):
    def arrange(folder):
        model(folder)
        (folder / "aim").write_text("precious")
        (folder / "run").mkdir()
        make(folder / "run" / name)
    return arrange


def locked(folder):
    """By a process that lives as long as the case: the parent of the one that meets it."""
    model(folder)
    (folder / "run").mkdir()
    file = open(folder / "run" / ".lock", "w+")                 # noqa: SIM115
    file.write("process 1 on elsewhere")
    file.flush()
    fcntl.lockf(file, fcntl.LOCK_EX)
    KEPT.append(file)


KEPT = []


def run_cases():
    text = PLACES["a text"]
    for name in ("config.json", "model.safetensors", "model-00001-of-00002.safetensors",
                 "options.json", "log.jsonl", "curves.png", "tokenizer.json", "sheet-00000001.png"):
        yield Case(f"train --out holds {name}", run(), run_place(name, text), names="holds")
    for name in (".lock", "options.json", "log.jsonl", "curves.png"):
        for what in ("a FIFO", "a link to a file", "a link to nothing", "a folder"):
            yield Case(f"train: {name} is {what}", run(), run_place(name, PLACES[what]),
                       names=f"{name}")
    for name in ("checkpoints", "latents"):
        yield Case(f"train: {name} is a text", run("--cache-latents"), run_place(name, text),
                   names=name)
    yield Case("train --out is locked", run(), locked, names="is running there")
    yield Case("train --out is a text", run(), lambda folder: (model(folder), text(folder / "run")),
               names="run")
    yield Case("train --out is the model", run("--out", "{}/model"), model, names="holds a model")
    yield Case("train --out is the model, --resume", run("--out", "{}/model", "--resume"), model,
               names="holds a model")
    for data in ("a-{0..99999999999}.tar", "a-{9..1}.tar", "none.tar", "/dev/zero", "toy=0",
                 "toy=1e400", "toy=nan", "toy=", "none", "x" * 5000, "a\nb\x1b[2J", "**/*" * 500):
        yield Case(f"train --data {data[:30]!r}", run("--data", data), model, names="--data")
    for words in (("--size", 31), ("--take", "dit={}/none"), ("--epochs", 1), ("--fsdp",),
                  ("--device", "cuda:77"), ("--wiring", "final", "--queries", 10_000, "--epochs",
                                            "1e6")):
        yield Case(f"train {words}", run(*words), model)
    yield Case("train --curves without a log", run("--curves"), model, names="log.jsonl")
    limits = run("--lr", 100, "--weight-decay", 100, "--clip", 1e9, "--shift", 1000, "--no-guard")
    yield Case("train with everything at its limit", limits, model, "any", "finite")


def other_cases():
    evaluation = command(evaluate.main, "--model", "{}/model", "--out", "{}/run")
    for name in ("scores.json", "failures.png"):
        for what in ("a FIFO", "a link to a file", "a folder"):
            yield Case(f"evaluate: {name} is {what}", evaluation, run_place(name, PLACES[what]),
                       names=name)
    table = command(ablate.main, "settings", "--model", "{}/model", "--out", "{}/run")
    yield Case("ablate: settings.json is a FIFO", table, run_place("settings.json", os.mkfifo),
               names="settings.json")
    for script in (evaluate.main, ablate.main, figures.main):
        words = ["settings"] if script is ablate.main else []
        yield Case(f"{script.__module__}: no model",
                   command(script, *words, "--model", "{}/none"), names="none")
    source = ("--qwen", TINY / "qwen", "--sana", TINY / "sana")
    for name in ("model-best.safetensors", "config.json", "x"):
        yield Case(f"weights_convert --out holds {name}",
                   command(weights_convert.main, *source, "--out", "{}/run"),
                   run_place(name, PLACES["a text"]), names="holds")
    for words in ((), ("--qwen", "x"), ("--out", "x"), (*source, "--out", ""),
                  ("--qwen", "{}/none", "--sana", "{}/none", "--out", "{}/new"),
                  ("--export", "{}/none", "--out", "{}/new"),
                  ("--export", "{}", "--out", "{}/new")):
        yield Case(f"weights_convert {words[:2]}", command(weights_convert.main, *words))


def release_locks():
    while KEPT:
        with contextlib.suppress(OSError):
            KEPT.pop().close()


def log_row(**changes) -> str:
    return json.dumps(dict(step=1, loss=1.0, norm=1.0, lr=1.0, skipped=None, by_t=None) | changes)


def curve_cases():
    rows = {
        "no step": '{"loss": 1}', "a step of text": log_row(step="1"), "a list": "[1]",
        "a loss of text": log_row(loss="x"), "by_t too short": log_row(by_t=[1]),
        "by_t of text": log_row(by_t="0123456789"), "a step of 1e300": log_row(step=1e300),
        "a step below 0": log_row(step=-5), "skipped is a number": log_row(skipped=3),
    }
    for what, row in rows.items():
        yield Case(f"--curves: {what}", run("--curves"),
                   run_place("log.jsonl", lambda file, row=row: file.write_text(row + "\n")),
                   names="log.jsonl, line 1")
    for what, text in {"empty": "", "half a line": log_row() + '\n{"st', "garbage": "\x00" * 1000,
                       "nested": "[" * 100_000, "huge values": log_row(loss=1e308)}.items():
        yield Case(f"--curves: {what}", run("--curves"),
                   run_place("log.jsonl", lambda file, text=text: file.write_text(text)), "any",
                   writes=("run/curves.png",))
