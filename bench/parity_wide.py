"""The same numbers as the public libraries at the released widths: 1.3e9 random parameters, every
layer as wide as the released ones, but few of them.

    python -m bench.make_random /tmp/wide --size wide            10 GB of disk
    python -m bench.parity_wide /tmp/wide --out bench/results/parity_wide.json

It needs transformers 4.51.3 and diffusers 0.34.0, float32, and memory for one model and its
gradients (9 GB). The sides come one after the other: the peer; ours, plain and fast; ours in
bfloat16 and with weights in 8 bits (engine/int8.py) against float32, call by call
(bench/first_difference.py). Each leaves its results in the folder and is not done again while they
are there; --side does one of them.
"""
import dataclasses
import gc
import json
import pathlib

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from bench.first_difference import differences, some_values, trace
from bench.peer import Peer
from bench.work import CAPTION, ORDER, Inputs, distance, picture
from engine import fast
from engine.command import Parser
from engine.device import machine
from engine.files import read_json
from engine.pictures import to_pixels
from tbac import TBAC, TBACConfig
from weights_convert import public_names


def odd(width, height, seed):
    """A picture whose last windows are not whole."""
    return picture(max(width, height), seed).resize((width, height), Image.Resampling.BICUBIC)


def all_cases(size):
    """name -> prompts, and None or a list of pictures for each"""
    odd_ones = [odd(333, 200, 1), odd(150, 400, 2), odd(640, 480, 3)]
    return {
        "text, of different lengths": ([CAPTION, "a dog"], None),
        "odd pictures, in one batch":
            ([ORDER, "mix the two"], [[odd_ones[0]], odd_ones[1:]]),
        "an edit": ([ORDER], [[picture(size, 4)]]),
    }


# Steps of a picture of the first prompt: the peer edits one prompt at a time.
SAMPLED = {"text, of different lengths": 4, "an edit": 3}
TRAINED = ("text, of different lengths", "odd pictures, in one batch")
# Of a gradient, evenly spaced.
N_VALUES = 1 << 16


def without_zeros(gradients):
    """What is added to all keys alike does not change a softmax: the gradient of that bias is 0,
    but for rounding."""
    return {name: g for name, g in gradients.items() if not name.endswith("cross.k.bias")}


class OurSide:
    """Each method: a case -> a tensor, or {name: tensor}."""

    def __init__(self, folder, quick):
        model = TBAC.load(folder / "ours")
        self.model = fast.enable(model) if quick else model
        self.inputs = Inputs(model.config, "cpu", torch.float32)

    def rungs(self, prompts, images):
        return self.model.encode(prompts, images)

    def velocity(self, x, t, rungs):
        return self.model.velocity(x, t, rungs)

    def latents(self, prompts, images, eps, steps):
        *_, last = sample.denoise(self.model, prompts, images, steps=steps, eps=eps)
        return last.x_t

    def loss(self, pixels, prompts, images, t, eps):
        """-> the loss; gradients are left behind"""
        loss = self.model.loss(self.encode(pixels), prompts, images, t, eps).mean()
        loss.backward()
        return loss

    def gradients(self):
        """By our names; the model has none afterwards."""
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return without_zeros(found)

    def encode(self, pixels):
        return self.model.dcae.encode(pixels)

    def decode(self, latents):
        return self.model.dcae.decode(latents)


class TheirSide:
    """The same of the public libraries."""

    def __init__(self, folder, config):
        self.peer = Peer(*(folder / part for part in ("qwen", "sana", "tbac")))
        self.inputs = Inputs(config, "cpu", torch.float32)
        with torch.device("meta"):
            empty = TBAC(config)
        self.names = {part: public_names(empty, part, "") for part in ("ladder", "dit")}

    def rungs(self, prompts, images):
        return self.peer.encode(prompts, images)

    def velocity(self, x, t, rungs):
        return self.peer.velocity(x, 1000 * t, rungs)

    def latents(self, prompts, images, eps, steps):
        return self.peer.sample(prompts, eps, images, steps)

    def loss(self, pixels, prompts, images, t, eps):
        return self.peer.train_step(pixels, prompts, images, t, eps)

    def gradients(self):
        peer = self.peer
        first, n = peer.first_query, peer.queries
        found = {"ladder.queries": peer.mllm.model.embed_tokens.weight.grad[first:first + n]}
        for part, module in (("ladder", peer.connector), ("dit", peer.dit)):
            own = dict(module.named_parameters())
            for public, ours in self.names[part].items():
                found[ours] = own[public].grad
        found = {name: grad.clone() for name, grad in found.items()}
        peer.zero_grad()
        return without_zeros(found)

    def encode(self, pixels):
        return self.peer.vae.encode(pixels).latent * self.peer.vae.config.scaling_factor

    def decode(self, latents):
        return self.peer.decode(latents)


def results(side, size):
    """Yields (row: name, tensor). Training is compared on pictures of half the side."""
    inputs = side.inputs
    for case, (prompts, images) in all_cases(size).items():
        pixels, t, eps = inputs.training(len(prompts), size // 2)
        with torch.no_grad():
            rungs = side.rungs(prompts, images)
            yield f"rungs: {case}", rungs
            yield f"velocity: {case}", side.velocity(eps, t, rungs)
            if steps := SAMPLED.get(case):
                given = prompts[:1], images and images[:1], inputs.noise(1)
                yield f"sampled latents: {case}", side.latents(*given, steps)
        if case in TRAINED:
            yield f"loss: {case}", side.loss(pixels, prompts, images, t, eps)
            for name, grad in side.gradients().items():
                values = some_values(grad, N_VALUES)
                yield f"gradients of the {part_of(name)}: {case}, {name}", values
    with torch.no_grad():
        pixels = to_pixels([picture(size, 5)], "cpu", torch.float32)
        yield f"autoencoder, encode: {size} px", side.encode(pixels)
        yield f"autoencoder, decode: {size} px", side.decode(inputs.noise(1))


def part_of(name):
    return name.split(".")[1] if name.startswith("ladder") else "DiT"


def traced(folder, dtype, int8=False):
    """Every layer of ours, on a picture of half the side."""
    model = TBAC.load(folder / "ours", dtype=dtype, int8=int8)
    model.config = dataclasses.replace(model.config, size=model.config.size // 2)
    return trace(model)


SIDES = {
    "peer": lambda folder, config: results(TheirSide(folder, config), config.size),
    "plain": lambda folder, config: results(OurSide(folder, False), config.size),
    "fast": lambda folder, config: results(OurSide(folder, True), config.size),
    "float32": lambda folder, config: traced(folder, torch.float32).items(),
    "bfloat16": lambda folder, config: traced(folder, torch.bfloat16).items(),
    "int8": lambda folder, config: traced(folder, torch.float32, int8=True).items(),
}


def file_of(folder, side):
    return folder / f"parity-{side}.safetensors"


def compute(folder, side, config):
    """Writes a side's results."""
    found = {}
    for name, tensor in SIDES[side](folder, config):
        found[name] = tensor.detach().clone().contiguous()
        if side in ("peer", "plain", "fast") and "gradients" not in name:
            print(f"{side}: {name}", flush=True)
    save_file(found, file_of(folder, side))
    gc.collect()


def errors(folder, side):
    """{name: relative error} of a side to the peer"""
    found, expected = (load_file(file_of(folder, name)) for name in (side, "peer"))
    if found.keys() != expected.keys():
        raise ValueError(f"{side} and peer do not have the same results: delete their files in "
                         f"{folder}")
    rows = {name: distance(tensor, expected[name]) for name, tensor in found.items()}
    for part in ("connector", "DiT"):
        for case in TRAINED:
            names = [name for name in found if name.startswith(f"gradients of the {part}: {case}")]
            ours, theirs = (torch.cat([side[name].flatten() for name in names])
                            for side in (found, expected))
            rows[f"gradients of the {part}, as one vector: {case}"] = distance(ours, theirs)
    return rows


def worst(found):
    """{row: the largest error, where}"""
    rows = {}
    for name, error in found.items():
        row, where = name.split(": ", 1)
        rows[row] = max(rows.get(row, (-1, "")), (error, where))
    return rows


def options():
    p = Parser(description=__doc__)
    p.add_argument("folder", type=pathlib.Path, help="made by bench.make_random")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--side", choices=SIDES, help="only this, and no comparison")
    p.add_argument("--out", type=pathlib.Path, required=True, help="JSON file")
    return p.parse_args()


def main():
    args = options()
    torch.set_num_threads(args.threads)
    config = TBACConfig.from_dict(read_json(args.folder / "ours" / "config.json"))
    for side in [args.side] if args.side else SIDES:
        if not file_of(args.folder, side).exists():
            compute(args.folder, side, config)
    if args.side:
        return
    found = dict(run=machine("cpu"))
    for side in ("plain", "fast"):
        found[side] = worst(errors(args.folder, side))
        for row, (error, where) in found[side].items():
            print(f"{side}: {row}: {error:.1e} ({where})")
    exact = load_file(file_of(args.folder, "float32"))
    for side in ("bfloat16", "int8"):
        found[side] = dict(differences(load_file(file_of(args.folder, side)), exact))
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
