"""To measure with: seconds in alternating pairs, operations counted one by one, what the machine
can do at best."""
import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def timed(f, device):
    """-> seconds, f()"""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


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


# ----------------------------------------------------------------------------------- operations

class Operations(TorchDispatchMode):
    """Counts those of matrix products and convolutions: n."""
    n = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        # torch's own count is wrong for the gradient of grouped convolutions.
        if f is torch.ops.aten.convolution_backward.default:
            gradient, _, weight = args[:3]
            wanted = sum(args[-1][:2])
            self.n += 2 * gradient.numel() * weight[0].numel() * wanted
        elif f.overloadpacket in flop_registry:
            self.n += flop_registry[f.overloadpacket](*args, **kwargs or {}, out_val=out)
        return out


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

def best_rates(device, dtype):
    """-> operations per second of a matrix product or a 1x1 convolution, one that fits a cache or a
    large one; bytes per second of a large sum. The best of 20."""
    def best(f, *args):
        return min(timed(lambda: f(*args), device)[0] for _ in range(20))

    large = 8192 if device == "cuda" else 2048
    flops = 0
    for n, k, m in ((512, 448, 2240), (large, large, large)):
        x = torch.randn(n, k, device=device, dtype=dtype)
        w = torch.randn(m, k, device=device, dtype=dtype)
        product = best(torch.mm, x, w.T)
        convolution = best(nn.functional.conv2d, x.T[None, ..., None], w[..., None, None])
        flops = max(flops, 2 * n * k * m / min(product, convolution))
    numbers = torch.ones(1 << 30, dtype=torch.uint8, device=device).view(dtype)
    return flops, numbers.nbytes / best(torch.sum, numbers)
