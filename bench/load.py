"""What loading costs: peak host memory over the weights' own size, seconds, and seconds from the
command to the first picture.

    python -m bench.load DIR [--device cuda] [--dtype bfloat16]

Each measurement is a process of its own; counted is what its peak (getrusage) adds to that of the
imports alone. On a CPU the weights themselves are part of it, on a GPU only what passes through.
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
LOAD = """
import time
import torch
from engine.log import peak_memory
from tbac import TBAC

before, start = peak_memory("cpu"), time.perf_counter()
model = TBAC.load({folder!r}, {device!r}, {dtype})
seconds = time.perf_counter() - start
weights = sum(t.nbytes for t in model.state_dict().values()) / 1e9
print(weights, peak_memory("cpu") - before, seconds)
"""


def options():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=pathlib.Path)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"))
    p.add_argument("--picture", action="store_true",
                   help="also the time to the first picture, 20 steps")
    p.add_argument("--plain", action="store_true", help="the picture without engine/fast.py")
    return p.parse_args()


def measure_load(args):
    """Twice: the first time the files may have to come from the disk."""
    dtype = args.dtype and f"torch.{args.dtype}"
    code = LOAD.format(folder=str(args.folder.resolve()), device=args.device, dtype=dtype)
    for disk in ("cold or not", "warm"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True,
                              capture_output=True, text=True)
        weights, added, seconds = map(float, done.stdout.split())
        print(f"{disk}: {weights:.2f} GB of weights, "
              f"peak {added:.2f} GB = {added / weights:.2f} x, {seconds:.1f} s")


def measure_picture(args):
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "sample.py", "a dog", "--model", str(args.folder.resolve()),
                   "--device", args.device, "--out", f"{scratch}/first.png"]
        if args.dtype:
            command += ["--dtype", args.dtype]
        if args.plain:
            command += ["--plain"]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True)
        print(f"command to first picture: {time.perf_counter() - start:.1f} s")


def main():
    args = options()
    measure_load(args)
    if args.picture:
        measure_picture(args)


if __name__ == "__main__":
    main()
