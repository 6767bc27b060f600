"""Our speed beside the public libraries' on the same weights, same dtype, same machine, in turns within one run.

    pip install transformers==4.51.3 diffusers==0.34.0 accelerate                        beside requirements.txt; needed here only
    python bench/make_random.py /tmp/mid --size mid                                      121M random parameters (--size full: 5.7e9)
    python weights_convert.py --qwen /tmp/mid/qwen --sana /tmp/mid/sana --tbac /tmp/mid/tbac --out /tmp/mid/ours
    python bench/bench.py /tmp/mid --threads 2

Each piece of work is done by both after a warm-up, in alternating pairs; printed are the medians, the median ratio and its spread, and how far
the two results are apart. Ratios count: seconds on a shared machine do not. The floor is what ours could take at best: its operations at the
best rate that this machine showed for a large matrix product or convolution, or its weights through the measured memory bandwidth, whichever
is longer.
"""
import argparse
import functools
import json
import pathlib
import platform
import statistics
import sys
import time

import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from engine import data
import sample
from memory import Counter
from peer import Peer
from tbac import TBAC

PROMPT = "A red circle left of a blue square, drawn with chalk on a dark wall, in the light of a late summer evening, with some dust in the air."


def relative(a, b):
    a, b = a.detach().float(), b.detach().float()
    return ((a - b).norm() / b.norm()).item()


def picture(size, seed=0):
    """A picture of noise over a colour ramp; the pixels do not matter."""
    g = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 200, size)[None, :, None] + 55 * torch.rand(size, size, 3, generator=g)
    return Image.fromarray(x.byte().numpy())


class Work:
    """Both models, and one method per row of the table; each returns (peer's function, ours), and both give a tensor to compare."""

    def __init__(self, folder, device, dtype):
        self.peer = Peer(folder / "qwen", folder / "sana", folder / "tbac", device, dtype)
        self.ours = TBAC.load(folder / "ours", device, dtype)
        self.ours.ladder.requires_grad_(True), self.ours.dit.requires_grad_(True)
        self.device, self.dtype, self.size = device, dtype, self.ours.config.size
        self.side = self.size // self.ours.config.dcae.factor
        self.image = picture(self.size)

    def noise(self, n):
        return torch.randn(n, self.ours.config.dit.channels, self.side, self.side, generator=torch.Generator().manual_seed(n)).to(self.device)

    def encode(self, prompts, images=None):
        return self.quiet(lambda: self.peer.encode(prompts, images)), self.quiet(lambda: self.ours.encode(prompts, images))

    @staticmethod
    def quiet(f):
        return torch.no_grad()(f)

    def encode_prompt(self):
        return self.encode(["", PROMPT])

    def encode_edit(self):
        return self.encode(["", "", "make the circle green"], [[Image.new("RGB", self.image.size)], [self.image], [self.image]])

    def sampling(self, prompts, images=None):
        eps = self.noise(len(prompts))

        def ours():
            *_, last = sample.denoise(self.ours, prompts, images, steps=20, eps=eps)
            return last.x_t
        return lambda: self.peer.sample(prompts, eps, images, steps=20), ours

    def sample_picture(self):
        return self.sampling([PROMPT])

    def sample_edit(self):
        return self.sampling(["make the circle green"], [[self.image]])

    def sample_four(self):
        return self.sampling([PROMPT] * 4)

    def checkpoint(self, on):
        """What train.py does for --grad-checkpoint."""
        for block in (*self.ours.dit.blocks, *self.ours.mllm.layers):
            if on:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
            else:
                del block.forward

    def train(self, prompts, images=None, cached=False, again=False):
        n = len(prompts)
        pixels = data.to_pixels([picture(self.size, i) for i in range(n)], self.device, self.dtype)
        s, eps = torch.linspace(0.1, 0.9, n, device=self.device), self.noise(n).to(self.dtype)
        x0 = self.ours.dcae.encode(pixels).detach()

        def peer():
            loss = self.peer.train_step(pixels, prompts, images, s, eps)
            self.peer.zero_grad()
            return loss

        def ours():
            if again:
                self.checkpoint(True)
            rungs = self.ours.encode(prompts, images) if cached else None
            loss = self.ours.flow_losses(x0, rungs, s, eps).mean() if cached else self.ours.loss(pixels, prompts, images, s, eps)
            loss.backward()
            self.ours.zero_grad()
            if again:
                self.checkpoint(False)
            return loss
        return peer, ours

    def prompts(self, n):
        return [f"{PROMPT} Number {i}." for i in range(n)]

    def train_t2i(self):
        return self.train(self.prompts(4))

    def train_t2i_cached(self):
        return self.train(self.prompts(4), cached=True)

    def train_t2i_again(self):
        return self.train(self.prompts(4), again=True)

    def train_edit(self, **how):
        return self.train(["make the circle green", "remove the square"], [[picture(self.size, 1)], [picture(self.size, 2)]], **how)

    def train_edit_again(self):
        return self.train_edit(again=True)

    def answer(self):
        """64 tokens about a picture; both greedy, both from a PIL picture and a string."""
        question = "what is in the image?"
        head = nn.Linear(1, 1, bias=False)
        head.weight = nn.Parameter(self.peer.mllm.model.embed_tokens.weight.detach()[:self.ours.config.mllm.vocab_size], requires_grad=False)

        def peer():
            self.peer.mllm.lm_head = head
            units = "<|image_pad|>" * self.ours.mllm.prepare([question], [[self.image]]).ids.eq(self.ours.mllm.tokenizer.special["image_pad"]).sum()
            text = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{units}<|vision_end|>{question}" \
                   "<|im_end|>\n<|im_start|>assistant\n"
            tokens, vision = self.peer.tokenizer([text], return_tensors="pt").to(self.device), self.peer.pixels([self.image], return_tensors="pt")
            seen = dict(pixel_values=vision["pixel_values"].to(self.device, self.dtype), image_grid_thw=vision["image_grid_thw"].to(self.device))
            out = self.peer.mllm.generate(**tokens, **seen, max_new_tokens=64, min_new_tokens=64, do_sample=False)
            self.peer.mllm.lm_head = nn.Identity()
            return out[0, tokens.input_ids.shape[1]:]

        def ours():
            ids, = self.ours.mllm.generate(self.ours.mllm.prepare([question], [[self.image]]), 64)
            return torch.tensor(ids, device=self.device)
        return self.quiet(peer), self.quiet(ours)


ROWS = {"encode a prompt with its null prompt": "encode_prompt", "encode an edit (three rows)": "encode_edit",
        "20-step picture, encode to latents": "sample_picture", "20-step edit": "sample_edit", "four pictures of one prompt": "sample_four",
        "training step t2i": "train_t2i", "training step t2i, latents cached": "train_t2i_cached", "training step edit": "train_edit",
        "training step t2i, --grad-checkpoint": "train_t2i_again", "training step edit, --grad-checkpoint": "train_edit_again",
        "answer of 64 tokens about a picture": "answer"}
MEMORY = {f"peak memory, {name}": method for name, method in ROWS.items() if name.startswith("training") and "cached" not in name}


def timed(f, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def rates(device, dtype):
    """-> operations per second of a matrix product or 1x1 convolution, one that fits a cache and a large one, bytes per second of a large sum: the
    best of 20."""
    def best(f, *args):
        return min(timed(lambda: f(*args), device)[0] for _ in range(20))

    fastest, y = 0, torch.ones(1 << 30, dtype=torch.uint8, device=device).view(dtype)
    for n, k, m in ((512, 448, 2240), (8192, 8192, 8192) if device == "cuda" else (2048, 2048, 2048)):
        x, w = torch.randn(n, k, device=device, dtype=dtype), torch.randn(m, k, device=device, dtype=dtype)
        quick = min(best(torch.mm, x, w.T), best(nn.functional.conv2d, x.T[None, ..., None], w[..., None, None]))
        fastest = max(fastest, 2 * n * k * m / quick)
    return fastest, y.nbytes / best(torch.sum, y)


class Operations(TorchDispatchMode):
    """Counts those of matrix products and convolutions."""
    n = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        if f is torch.ops.aten.convolution_backward.default:                    # torch's own count is wrong for grouped ones
            gradient, _, weight = args[:3]
            self.n += 2 * gradient.numel() * weight[0].numel() * sum(args[-1][:2])
        elif f.overloadpacket in flop_registry:
            self.n += flop_registry[f.overloadpacket](*args, **kwargs or {}, out_val=out)
        return out


def cost(f):
    """-> operations of the matrix products and convolutions in one run, bytes of the weights that they read each time they run."""
    read = 0

    def hook(module, args, out):
        nonlocal read
        read += sum(p.nbytes for p in module.parameters(recurse=False)) if not isinstance(module, nn.Embedding) else 0
    handle = nn.modules.module.register_module_forward_hook(hook)
    with Operations() as operations:
        f()
    handle.remove()
    return operations.n, read


def peak(f, device, *held):
    """Bytes alive at once, tensor by tensor; on a GPU the allocator's own count."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        f()
        return torch.cuda.max_memory_allocated()
    with Counter(*held) as counter:
        f()
    return counter.most


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=pathlib.Path, help="with qwen, sana, tbac (public layouts) and ours")
    p.add_argument("--device", default="cpu"), p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--threads", type=int, default=2), p.add_argument("--pairs", type=int, default=5)
    p.add_argument("--only", default="", help="rows whose name contains this"), p.add_argument("--out", type=pathlib.Path, help="results as JSON")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    dtype = getattr(torch, a.dtype)
    work, results, seen = Work(a.folder, a.device, dtype), {}, []
    for name, method in ROWS.items():
        if a.only in name:
            peer, ours = getattr(work, method)()
            apart = relative(ours(), peer())                                    # the warm-up
            pairs = [(timed(peer, a.device)[0], timed(ours, a.device)[0]) for _ in range(a.pairs)]
            ratios = sorted(x / y for x, y in pairs)
            x, y = (statistics.median(times) for times in zip(*pairs))
            results[name] = dict(peer=x, ours=y, ratio=statistics.median(ratios), low=ratios[0], high=ratios[-1], apart=apart, cost=cost(ours))
            seen.append(rates(a.device, dtype))                                 # again and again: other users of the machine come and go
            print(f"{name}: {statistics.median(ratios):.2f}", flush=True)
    flops, bandwidth = map(max, zip(*seen)) if seen else (1, 1)
    print(f"\nmeasured: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s\n")
    print("| work | peer s | ours s | ratio | lowest - highest | results apart | floor s | ours / floor |\n|---|---|---|---|---|---|---|---|")
    for name, row in results.items():
        row["floor"] = max(row["cost"][0] / flops, row["cost"][1] / bandwidth)
        print(f"| {name} | {row['peer']:.3f} | {row['ours']:.3f} | {row['ratio']:.2f} | {row['low']:.2f} - {row['high']:.2f} | {row['apart']:.0e} "
              f"| {row['floor']:.3f} | {row['ours'] / row['floor']:.1f} |")
    for name, method in MEMORY.items():
        if a.only in name:
            peer, ours = getattr(work, method)()
            x, y = peak(peer, a.device, *work.peer.parameters()), peak(ours, a.device, *work.ours.parameters())
            results[name] = dict(peer=x, ours=y, ratio=y / x)
            print(f"| {name} | {x / 1e9:.2f} GB | {y / 1e9:.2f} GB | {y / x:.2f} | | | | |", flush=True)
    if a.out:
        name = torch.cuda.get_device_name() if a.device == "cuda" else platform.machine()
        facts = dict(flops=flops, bandwidth=bandwidth, device=name, dtype=a.dtype, threads=a.threads, pairs=a.pairs, torch=torch.__version__)
        a.out.write_text(json.dumps(dict(run=facts, rows=results), indent=1))


if __name__ == "__main__":
    main()
