"""How far from the recorded outputs of the public libraries, on any device and in any precision:
the tiny checkpoint of the tests (tests/test_2_parity.py holds the same on the CPU)."""
import json
import pathlib

import torch
from PIL import Image
from safetensors.torch import load_file

import sample
from bench.sizes import ROOT
from bench.work import distance
from engine import fast
from tbac import TBAC
from weights_convert import convert

TINY = ROOT / "tests" / "fixtures" / "tiny"
GRADIENTS = {"queries": "ladder.queries", "connector.0.weight": "ladder.connector.0.weight",
             "connector.3.weight": "ladder.connector.3.weight",
             "dit.first_block.attn2.to_k": "dit.blocks.0.cross.k.weight"}


def exact_products():
    """On a GPU float32 products are rounded to 10 bits (TF32) where PyTorch is let to."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


class Recorded:
    """What the public libraries gave for the tiny checkpoint, and ours on the same inputs."""

    def __init__(self, scratch):
        self.folder = pathlib.Path(scratch) / "model"
        convert(TINY / "qwen", TINY / "sana", TINY / "tbac", self.folder)
        self.golden = load_file(TINY / "golden.safetensors")
        self.meta = json.loads((TINY / "golden.json").read_text())

    def load(self, device, dtype, quick):
        model = TBAC.load(self.folder, device, dtype)
        return fast.enable(model) if quick else model

    def request(self, case):
        """-> prompts, and None or a list of pictures for each"""
        rows = self.meta["images"][case]
        return self.meta["captions"][case], rows and [[self.picture(n) for n in r] for r in rows]

    def picture(self, name):
        return Image.open(TINY / "images" / f"{name}.png").convert("RGB")

    def results(self, model, case):
        """{name: tensor} for one case, named as in the recorded file."""
        prompts, images = self.request(case)
        device, dtype = model.ladder.queries.device, model.ladder.queries.dtype
        known = {name.removeprefix(f"{case}."): t.to(device) for name, t in self.golden.items()
                 if name.startswith(case + ".")}
        rungs = model.encode(prompts, images)
        latents = model.dcae.encode(known["target"].to(dtype))
        loss = model.loss(latents, prompts, images, known["sigma"], known["noise"]).mean()
        loss.backward()
        parameters = dict(model.named_parameters())
        found = {"rungs": rungs, "loss": loss,
                 "velocity": model.velocity(known["x"], known["t"] / 1000, rungs),
                 "latents": latents,
                 "decoded": model.dcae.decode(known["latents"].to(dtype))}
        found |= {f"grad.{name}": parameters[ours].grad for name, ours in GRADIENTS.items()}
        for name, settings in self.meta["samples"].items():
            if name.startswith(case + "."):
                eps = known[name.removeprefix(f"{case}.") + ".noise"]
                *_, last = sample.denoise(model, prompts, images, eps=eps, **settings)
                found[name.removeprefix(f"{case}.") + ".latents"] = last.x_t
        model.zero_grad()
        return found

    def errors(self, model):
        """{"t2i: rungs": relative error to what is recorded}"""
        rows = {}
        for case in self.meta["captions"]:
            for name, t in self.results(model, case).items():
                expected = self.golden[f"{case}.{name}"]
                rows[f"{case}: {name}"] = distance(t.cpu(), expected)
        return rows
