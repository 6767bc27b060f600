"""What loading costs: peak host memory over the weights' own size, seconds, and seconds from the command to the first picture.

    python bench/load.py DIR [--device cuda] [--dtype bfloat16]

Each measurement is a process of its own; counted is what its peak (VmHWM of the kernel) adds to that of the imports alone. On a CPU the
weights themselves are part of it, on a GPU only what passes through.
"""
import argparse
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
LOAD = """
import pathlib, time, torch
from tbac import TBAC
high = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before, start = high(), time.perf_counter()
model = TBAC.load({folder!r}, {device!r}, {dtype})
print(sum(p.nbytes for p in model.state_dict().values()), high() - before, time.perf_counter() - start)
"""


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder"), p.add_argument("--device", default="cpu"), p.add_argument("--dtype", choices=("float32", "bfloat16"))
    p.add_argument("--picture", action="store_true", help="also the time to the first picture, 20 steps")
    a = p.parse_args()
    code = LOAD.format(folder=str(pathlib.Path(a.folder).resolve()), device=a.device, dtype=a.dtype and f"torch.{a.dtype}")
    for disk in ("cold or not", "warm"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
        weights, added, seconds = map(float, done.stdout.split())
        print(f"{disk}: {weights / 1e9:.2f} GB of weights, peak {added / 1e9:.2f} GB = {added / weights:.2f} x, {seconds:.1f} s")
    if a.picture:
        start = time.perf_counter()
        command = [sys.executable, "sample.py", "a dog", "--model", a.folder, "--device", a.device, "--out", "/tmp/first.png"]
        subprocess.run(command + (["--dtype", a.dtype] if a.dtype else []), cwd=ROOT, check=True)
        print(f"command to first picture: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
