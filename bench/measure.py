"""To measure with, on a CPU and on a GPU alike: seconds, alone or in alternating pairs; bytes alive
at once; operations counted one by one; what the machine can do at best.

The protocol: one run to warm up, in which operations are counted; then n runs, each between two
points where the device has nothing left to do; the median counts, lowest and highest are kept.
"""
import statistics
import time
import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def timed(f, device):
    """-> seconds, f()"""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def repeated(f, n, device):
    """-> {seconds: the median of n runs, low, high}"""
    times = [timed(f, device)[0] for _ in range(n)]
    return dict(seconds=statistics.median(times), low=min(times), high=max(times))


@dataclass
class Pairs:
    """Median seconds of two pieces of work done in turns; median, lowest and highest ratio of the
    first to the second within a pair."""
    first: float
    second: float
    ratio: float
    low: float
    high: float


def in_turns(f, g, n, device):
    """f and g n times, in alternating pairs: what slows the machine down slows both. -> Pairs"""
    times = [(timed(f, device)[0], timed(g, device)[0]) for _ in range(n)]
    ratios = [x / y for x, y in times]
    first, second = (statistics.median(column) for column in zip(*times))
    return Pairs(first, second, statistics.median(ratios), min(ratios), max(ratios))


# --------------------------------------------------------------------------------------- memory

class Counter(TorchDispatchMode):
    """Bytes of the storages that operations make and that are still alive: `now`, and `most` at
    once. held: tensors that exist already and count, too."""

    def __init__(self, *held):
        super().__init__()
        self.sizes = {}
        self.now = self.most = 0
        for t in held:
            self.add(t)

    def add(self, t):
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor):
                self.add(t)
        return out


def peak(f, held, device):
    """Bytes alive at once while f runs: on a GPU the allocator's own count, else tensor by tensor,
    those in `held` included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        f()
        return torch.cuda.max_memory_allocated()
    with Counter(*held) as counter:
        f()
    return counter.most


# ----------------------------------------------------------------------------------- operations

# Attention in one operation on a CPU, which torch's own count does not know.
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Operations(TorchDispatchMode):
    """Counts those of matrix products and convolutions: n."""
    n = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        self.n += self.count(f, args, kwargs or {}, out)
        return out

    def count(self, f, args, kwargs, out):
        # torch's own count is wrong for the gradient of grouped convolutions.
        if f is torch.ops.aten.convolution_backward.default:
            gradient, _, weight = args[:3]
            wanted = sum(args[-1][:2])
            return 2 * gradient.numel() * weight[0].numel() * wanted
        if f is FUSED:
            return sdpa_flop_count(*(t.shape for t in args[:3]))
        if f is FUSED_BACKWARD:
            return sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        if f.overloadpacket in flop_registry:
            return flop_registry[f.overloadpacket](*args, **kwargs, out_val=out)
        return 0


def operations(f):
    """-> operations of one run of f"""
    with Operations() as counter:
        f()
    return counter.n


def bytes_read(f):
    """-> bytes of the weights that one run of f reads: a layer's, each time it runs."""
    read = 0

    def hook(module, args, out):
        nonlocal read
        # Of an embedding table only some rows are read.
        if not isinstance(module, nn.Embedding):
            read += sum(p.nbytes for p in module.parameters(recurse=False))

    handle = nn.modules.module.register_module_forward_hook(hook)
    f()
    handle.remove()
    return read


def cost(f):
    """-> operations and bytes read of one run of f"""
    with Operations() as counter:
        read = bytes_read(f)
    return counter.n, read


# ----------------------------------------------------------------------------------- the machine

def best_rates(device, dtype, large=None, room=1 << 30):
    """-> operations per second of a matrix product or a 1x1 convolution, one that fits a cache or a
    large one of this side; bytes per second of a sum over `room` bytes. The best of 20."""
    def best(f, *args):
        return min(timed(lambda: f(*args), device)[0] for _ in range(20))

    # The second product is too large for a cache.
    large = large or (8192 if device == "cuda" else 2048)
    flops = 0
    for n, k, m in ((512, 448, 2240), (large, large, large)):
        x = torch.randn(n, k, device=device, dtype=dtype)
        w = torch.randn(m, k, device=device, dtype=dtype)
        product = best(torch.mm, x, w.T)
        convolution = best(nn.functional.conv2d, x.T[None, ..., None], w[..., None, None])
        flops = max(flops, 2 * n * k * m / min(product, convolution))
    numbers = torch.ones(room, dtype=torch.uint8, device=device).view(dtype)
    return flops, numbers.nbytes / best(torch.sum, numbers)
