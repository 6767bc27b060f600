"""Fixtures: the tiny checkpoint, converted once by the command line, and what the public
implementations gave for it."""
import json
import pathlib
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file

from engine import fast
from tbac import TBAC
from tests.browser import PROGRAMS, Browser, program

ROOT = pathlib.Path(__file__).parent.parent
TINY = ROOT / "tests" / "fixtures" / "tiny"
CASES = ("t2i", "edit", "edit_multi")


def relative(a, b):
    """|a - b| / |b|, the measure of every parity claim."""
    return ((a - b).norm() / b.norm()).item()


def run(*command):
    """A script ("sample.py", ...) or a module ("-m", "lab.evaluate", ...) of this project, with its
    arguments, in a process of its own."""
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          cwd=ROOT)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "model"
    sources = ["--qwen", TINY / "qwen", "--sana", TINY / "sana", "--tbac", TINY / "tbac"]
    done = run("weights_convert.py", *sources, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def tiny(tiny_folder):
    """The tiny model on the plain path."""
    return TBAC.load(tiny_folder)


@pytest.fixture(scope="session")
def one(tiny_folder):
    """The tiny model on the fast path, one for all tests, which leave it as it is."""
    return fast.enable(TBAC.load(tiny_folder))


@pytest.fixture(scope="session")
def gradient():
    """A picture, 56 wide and 84 high."""
    return Image.radial_gradient("L").resize((56, 84)).convert("RGB")


@pytest.fixture(params=["plain", "fast"])
def model(request, tiny):
    """The tiny model, once on the plain path and once on the fast one."""
    return fast.enable(tiny) if request.param == "fast" else tiny


@pytest.fixture(scope="session")
def golden():
    return load_file(TINY / "golden.safetensors")


@pytest.fixture(scope="session")
def recorded():
    """case -> (prompts, None or lists of images); the settings of the sampling runs; and a function
    that opens a picture by its name."""
    meta = json.loads((TINY / "golden.json").read_text())

    def picture(name):
        return Image.open(TINY / "images" / f"{name}.png").convert("RGB")

    cases = {}
    for case in CASES:
        names = meta["images"][case]
        images = names and [list(map(picture, row)) for row in names]
        cases[case] = meta["captions"][case], images
    return cases, meta["samples"], picture


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium (tests/browser.py)."""
    if program() is None:
        pytest.skip(f"there is no {' or '.join(PROGRAMS)}")
    with Browser() as started:
        yield started
