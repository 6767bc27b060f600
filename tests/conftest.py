"""Fixtures: the tiny checkpoint, converted once by the command line, and what the public implementations gave for it."""
import json
import pathlib
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file

from tbac import TBAC

ROOT = pathlib.Path(__file__).parent.parent
TINY = ROOT / "tests" / "fixtures" / "tiny"
CASES = ("t2i", "edit", "edit_multi")


def relative(a, b):
    """|a - b| / |b|, the measure of every parity claim."""
    return ((a - b).norm() / b.norm()).item()


def run(script, *args):
    script = ROOT / script if script.endswith(".py") else script
    return subprocess.run([sys.executable, str(script), *map(str, args)], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "model"
    done = run("weights_convert.py", "--qwen", TINY / "qwen", "--sana", TINY / "sana", "--tbac", TINY / "tbac", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def tiny(tiny_folder):
    return TBAC.load(tiny_folder)


@pytest.fixture(scope="session")
def golden():
    return load_file(TINY / "golden.safetensors")


@pytest.fixture(scope="session")
def recorded():
    """case -> (prompts, None or lists of images); and the settings of the sampling runs."""
    meta = json.loads((TINY / "golden.json").read_text())
    picture = lambda name: Image.open(TINY / "images" / f"{name}.png").convert("RGB")
    cases = {c: (meta["captions"][c], meta["images"][c] and [[picture(n) for n in row] for row in meta["images"][c]]) for c in CASES}
    return cases, meta["samples"], picture
