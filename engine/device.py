"""What a device can do, whether it does it right, and what it and the code on it are called."""
import importlib.metadata
import os
import pathlib
import platform
import subprocess

import torch
import torch.nn.functional as F

from dit import DiT, DiTConfig
from engine.files import read_json, read_tensors, weight_files
from engine.int8 import count_parameters

ROOT = pathlib.Path(__file__).parent.parent
TOY = ROOT / "toy" / "weights"
# Models of fewer parameters run on one thread: see `set_threads`.
SMALL = 50e6


def usable(own: torch.dtype, device) -> torch.dtype:
    """The dtype to compute in, where none is asked for: the model's own. Half precision on an
    NVIDIA GPU is what the card can do: bfloat16 from compute capability 8.0 on, else float16."""
    if own == torch.float32 or torch.device(device).type != "cuda":
        return own
    capability = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def set_threads(model) -> None:
    """One thread for a small model on a CPU. Its products take microseconds, and threads that wait
    for each other at the end of each cost more than they save as soon as another program runs.
    Whoever sets OMP_NUM_THREADS is obeyed."""
    if count_parameters(model) < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def check(device) -> None:
    """ValueError where there is no such device, or where it computes wrong numbers."""
    try:
        torch.empty(0, device=device)
    # No such device, or a PyTorch that was built without it.
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {device}: {str(e).splitlines()[0]}") from None
    if torch.device(device).type == "mps":
        check_numbers(device)


# -------------------------------------------------------------------- which machine, which code

def processor() -> str:
    """Its name; where the system hides it, family and model."""
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    facts = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    number = f"family {facts.get('cpu family')}, model {facts.get('model')}"
    return f"{facts['model name']} ({number})"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: str) -> dict:
    """What a number was measured on: processor, cores, threads, versions."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    packages = ("torch", "transformers", "diffusers", "triton")
    versions = {package: version(package) for package in packages}
    return dict(device=name, processor=processor(), cores=os.cpu_count(),
                threads=torch.get_num_threads(), python=platform.python_version(),
                system=platform.system(), cuda=torch.version.cuda, versions=versions)


def commit() -> str:
    """The code's commit; with "+" if it was changed since; "unknown" outside a git checkout."""
    try:
        head = git("rev-parse", "--short", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


# ------------------------------------------------------------------------ does it compute right?

def randn(*shape, device) -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def product(rows: int, inner: int, columns: int, device) -> torch.Tensor:
    return randn(rows, inner, device=device) @ randn(inner, columns, device=device)


def transposed_product(device) -> torch.Tensor:
    """Of a tall matrix seen sideways, after larger memory has come and gone: what is reported to go
    wrong (pytorch issue 193487)."""
    tall = randn(50_000, 25, device=device)
    large = [torch.zeros(n * 1_000_000, device=device) for n in (1, 3, 8)]
    del large
    return tall.T @ tall


def convolution(device) -> torch.Tensor:
    return F.conv2d(randn(2, 16, 33, 33, device=device), randn(24, 16, 3, 3, device=device),
                    padding=1)


def masked_fill(device) -> torch.Tensor:
    x = randn(4, 3, 65, 65, device=device)
    mask = torch.ones(65, 65, dtype=torch.bool, device=device).tril()
    return x.masked_fill(~mask, -torch.inf).softmax(-1)


@torch.no_grad()
def first_velocity(device) -> torch.Tensor:
    """The toy's DiT at t = 1, on rungs of noise."""
    config = DiTConfig(**read_json(TOY / "config.json")["dit"])
    dit = DiT(config)
    stored = {name.removeprefix("dit."): t for file in weight_files(TOY)
              for name, t in read_tensors(file) if name.startswith("dit.")}
    dit.load_state_dict(stored)
    dit.to(device)
    rungs = randn(config.n_layer, 1, 16, config.caption_dim, device=device)
    time = torch.full((1,), 1000.0, device=device)
    x = randn(1, config.channels, 8, 8, device=device)
    return dit(x, time, dit.project_kv(rungs))


PROBES = {
    "a product of 64 x 64 matrices": lambda device: product(64, 64, 64, device),
    "a product with odd sizes": lambda device: product(911, 77, 1031, device),
    "a product of a row with a large matrix": lambda device: product(1, 2048, 4096, device),
    "a product of a transposed matrix": transposed_product,
    "a convolution": convolution,
    "a masked softmax": masked_fill,
    "the toy's first velocity": first_velocity,
}


def check_numbers(device, probes: dict = PROBES) -> None:
    """ValueError for the first probe whose result on the device is not the CPU's. It takes about a
    second."""
    for name, probe in probes.items():
        expected = probe("cpu")
        found = probe(device).cpu()
        off = ((found - expected).norm() / expected.norm()).item()
        # NaN is above nothing.
        if not off < 1e-3:
            raise ValueError(
                f"device {device} computes wrong numbers: {name} is off by {off:.2g} of its size, "
                f"expected less than 0.001, with PyTorch {torch.__version__}. Take --device cpu, "
                "or another version of PyTorch")
