"""Our speed beside the public libraries' on the same weights, same dtype, same machine, in turns
within one run.

    # Beside requirements.txt, needed here only:
    pip install transformers==4.51.3 diffusers==0.34.0 accelerate
    # 121M random parameters (--size full: 5.7e9)
    python -m bench.make_random /tmp/mid --size mid
    python -m bench.bench /tmp/mid --threads 2

Each piece of work is done by both after a warm-up, in alternating pairs; printed are the medians,
the median ratio and its spread, and how far the two results are apart. Ratios count: seconds on a
shared machine do not. The floor is what ours could take at best: its operations at the best rate
that this machine showed for a large matrix product or convolution, or its weights through the
measured memory bandwidth, whichever is longer.
"""

import torch
from torch import nn

from bench.measure import best_rates, cost, in_turns, peak
from bench.peer import Peer
from bench.sizes import size_of
from bench.work import distance, load, parser, write
from mllm import ASK, chat


class Theirs:
    """The peer's side of each piece of work."""

    def __init__(self, folder, inputs, tensors=None):
        folders = [folder / part for part in ("qwen", "sana", "tbac")]
        self.peer = Peer(*folders, inputs.device, inputs.dtype, tensors)
        self.inputs = inputs

    def prepare(self, task):
        return getattr(self, task.kind)(task)

    def encode(self, task):
        return torch.no_grad()(lambda: self.peer.encode(task.prompts, task.images))

    def draw(self, task):
        eps = self.inputs.noise(len(task.prompts), task.size)
        return lambda: self.peer.sample(task.prompts, eps, task.images, task.steps)

    def train(self, task):
        """It knows neither cached latents nor checkpoints."""
        pixels, t, eps = self.inputs.training(len(task.prompts))

        def run():
            loss = self.peer.train_step(pixels, task.prompts, task.images, t, eps)
            self.peer.zero_grad()
            return loss
        return run

    def answer(self, task):
        """64 tokens, greedy, from a PIL picture and a string, with the tied head that the peer does
        without otherwise."""
        mllm, device = self.peer.mllm, self.inputs.device
        table = mllm.model.embed_tokens.weight.detach()[:self.inputs.config.mllm.vocab_size]
        head = nn.Linear(1, 1, bias=False)
        head.weight = nn.Parameter(table, requires_grad=False)

        @torch.no_grad()
        def run():
            mllm.lm_head = head
            vision = self.peer.pixels(task.images[0], return_tensors="pt")
            units = int(vision["image_grid_thw"].prod()) // 4
            text = chat(task.prompts[0], [units], ASK)
            tokens = self.peer.tokenizer([text], return_tensors="pt").to(device)
            out = mllm.generate(
                **tokens, pixel_values=vision["pixel_values"].to(device, self.inputs.dtype),
                image_grid_thw=vision["image_grid_thw"].to(device),
                max_new_tokens=64, min_new_tokens=64, do_sample=False)
            mllm.lm_head = nn.Identity()
            return out[0, tokens.input_ids.shape[1]:].cpu()
        return run


# ------------------------------------------------------------------------------- the comparison

def compare_speed(ours, theirs, tasks, args):
    """-> {name: row of the table}, the machine's best rates while it was made."""
    dtype = ours.inputs.dtype
    rows, rates = {}, []
    for name, task in tasks.items():
        f, g = theirs.prepare(task), ours.prepare(task)
        # This is the warm-up, too.
        apart = distance(g(), f())
        pairs = in_turns(f, g, args.pairs, args.device)
        rows[name] = dict(peer=pairs.first, ours=pairs.second, ratio=pairs.ratio, low=pairs.low,
                          high=pairs.high, apart=apart, cost=cost(g))
        # Again and again: other users of the machine come and go.
        rates.append(best_rates(args.device, dtype))
        print(f"{name}: {pairs.ratio:.2f}", flush=True)
    flops, bandwidth = (max(column) for column in zip(*rates))
    for row in rows.values():
        row["floor"] = max(row["cost"][0] / flops, row["cost"][1] / bandwidth)
    return rows, dict(flops=flops, bandwidth=bandwidth)


def compare_memory(ours, theirs, tasks, args):
    """-> {name: row}, of the training steps."""
    rows = {}
    for name, task in tasks.items():
        if task.kind == "train" and not task.cached:
            x = peak(theirs.prepare(task), theirs.peer.parameters(), args.device)
            y = peak(ours.prepare(task), ours.model.parameters(), args.device)
            rows[f"peak memory, {name}"] = dict(peer=x, ours=y, ratio=y / x)
    return rows


def print_speed(rows):
    print("| work | peer s | ours s | ratio | lowest - highest | results apart | floor s | ours / "
          "floor |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [name, f"{row['peer']:.3f}", f"{row['ours']:.3f}", f"{row['ratio']:.2f}",
                 f"{row['low']:.2f} - {row['high']:.2f}", f"{row['apart']:.0e}",
                 f"{row['floor']:.3f}", f"{row['ours'] / row['floor']:.1f}"]
        print(f"| {' | '.join(cells)} |")


def print_memory(rows):
    for name, row in rows.items():
        peer, ours = row["peer"] / 1e9, row["ours"] / 1e9
        print(f"| {name} | {peer:.2f} GB | {ours:.2f} GB | {row['ratio']:.2f} | | | | |")


# --------------------------------------------------------------------------------- command line

def options():
    p = parser(__doc__, "qwen, sana, tbac, ours")
    p.add_argument("--plain", action="store_true", help="ours without engine/fast.py")
    return p.parse_args()


def main():
    args = options()
    ours, tasks = load(args, args.plain)
    theirs = Theirs(args.folder, ours.inputs)
    speed, machine = compare_speed(ours, theirs, tasks, args)
    flops, bandwidth = machine["flops"] / 1e9, machine["bandwidth"] / 1e9
    print(f"\nmeasured: {flops:.0f} GFLOP/s, {bandwidth:.1f} GB/s\n")
    print_speed(speed)
    memory = compare_memory(ours, theirs, tasks, args)
    print_memory(memory)
    size = size_of(ours.model.config)
    write(args, speed | memory, **machine, plain=args.plain, size=size)


if __name__ == "__main__":
    main()
