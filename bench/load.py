"""What loading costs: peak host memory over the weights' own size, seconds, and seconds from the
command to the first picture and to an answer.

    python -m bench.load DIR [--device cuda] [--dtype bfloat16] [--int8] [--low-memory] [--picture]
                         [--out FILE]

Each measurement is a process of its own. Of loading, what its peak (getrusage) adds to that of the
imports alone is counted: on a CPU the weights themselves are part of it, on a GPU only what passes
through. Of a whole command, all of its peak.
A whole model of the released sizes on a laptop (23 GB of disk, 13 GB of memory, in bfloat16); a
second setting is added to the same file:

    python -m bench.make_random /tmp/full --size full --dtype bfloat16
    python -m bench.load /tmp/full/ours --dtype bfloat16 --picture --out bench/results/whole.json
    python -m bench.load /tmp/full/ours --dtype bfloat16 --low-memory --picture --out ...
"""
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from bench.sizes import ROOT
from engine.command import Parser, one_line_errors
from engine.device import machine
from engine.files import read_json

LOAD = """
import time
import torch
from engine.log import peak_memory
from tbac import TBAC

before, start = peak_memory("cpu"), time.perf_counter()
model = TBAC.load({folder!r}, {device!r}, {dtype}, int8={int8}, low_memory={low_memory})
seconds = time.perf_counter() - start
weights = sum(t.nbytes for t in model.state_dict().values()) / 1e9
print(weights, peak_memory("cpu") - before, seconds)
"""

RUN = """
import sample
from engine.log import peak_memory

sample.main()
print(peak_memory("cpu"))
"""


def options():
    p = Parser(description=__doc__)
    p.add_argument("folder", type=pathlib.Path)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"))
    p.add_argument("--int8", action="store_true")
    p.add_argument("--low-memory", action="store_true")
    p.add_argument("--picture", action="store_true",
                   help="also the commands to a picture of 2 and of 20 steps, and to an answer")
    p.add_argument("--plain", action="store_true", help="the commands without engine/fast.py")
    p.add_argument("--out", type=pathlib.Path,
                   help="results as JSON, beside those of other settings that are there")
    return p.parse_args()


def setting(args):
    """Beside the dtype, as sample.py has it."""
    return [f"--{name}" for name in ("int8", "low-memory", "plain")
            if getattr(args, name.replace("-", "_"))]


def measure_load(args):
    """-> rows. Twice: the first time the files may have to come from the disk."""
    dtype = args.dtype and f"torch.{args.dtype}"
    code = LOAD.format(folder=str(args.folder.resolve()), device=args.device, dtype=dtype,
                       int8=args.int8, low_memory=args.low_memory)
    rows = {}
    for disk in ("load, cold disk or not", "load, warm disk"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1])
        weights, added, seconds = map(float, done.stdout.split())
        rows[disk] = dict(seconds=seconds, weights=weights, peak=added)
        print(f"{disk}: {weights:.2f} GB of weights, "
              f"peak {added:.2f} GB = {added / weights:.2f} x, {seconds:.1f} s", flush=True)
    return rows


def measure_commands(args):
    """-> rows: seconds of whole commands and the peak of their memory in GB"""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        picture = f"{scratch}/first.png"
        commands = {
            "picture, 2 steps": ["a dog", "--steps", "2", "--out", picture],
            "picture, 20 steps": ["a dog", "--out", picture],
            "answer about it": ["--ask", "what is in the picture?", "--image", picture],
        }
        for name, words in commands.items():
            rows[name] = measure_command(args, words)
            print(f"{name}: {rows[name]['seconds']:.1f} s, peak {rows[name]['peak']:.2f} GB",
                  flush=True)
    return rows


def measure_command(args, words):
    command = [sys.executable, "-c", RUN, *words, "--model", str(args.folder.resolve()),
               "--device", args.device, *setting(args)]
    if args.dtype:
        command += ["--dtype", args.dtype]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    return dict(seconds=seconds, peak=float(done.stdout.split()[-1]))


def main():
    args = options()
    rows = measure_load(args)
    if args.picture:
        rows |= measure_commands(args)
    if args.out:
        found = read_json(args.out) if args.out.exists() else {}
        name = ", ".join([args.dtype or "as stored", *setting(args)])
        found[name] = dict(run=machine(args.device), rows=rows)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
