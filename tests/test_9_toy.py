"""The shipped weights, last: pictures convince too early."""
import json
import random

import pytest
import torch

import data
import sample
from tbac import TBAC
from train import TOY_FOLDER


@pytest.fixture(scope="module")
def toy():
    return TBAC.load(TOY_FOLDER)


def test_it_fits_in_16_megabytes_and_says_how_it_was_made():
    assert sum(f.stat().st_size for f in TOY_FOLDER.iterdir()) < 16 * 2 ** 20
    record = json.loads((TOY_FOLDER / "record.json").read_text())
    assert {"commands", "seed", "hardware", "scores"} <= record.keys()


def test_the_autoencoder_keeps_colours(toy):
    """Mean error of a reconstruction well under that of a blank page."""
    x = sample.to_pixels([data.render(data.sample_scene(random.Random(i))) for i in range(32)], "cpu")
    with torch.no_grad():
        back = toy.dcae.decode(toy.dcae.encode(x))
    assert (back - x).pow(2).mean() < 0.1 * (x - x.median()).pow(2).mean()


def test_it_draws_a_picture(toy):
    pictures = sample.generate(toy, ["a red circle left of a blue square"] * 2, steps=4)
    assert all(p.size == (64, 64) and len(p.getcolors(4096)) > 20 for p in pictures)
