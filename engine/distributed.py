"""One process or many: who they are, how what learns is spread over them, what they agree on."""
import datetime
import functools
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from engine.device import check as check_device


def start_processes(args) -> tuple[int, int]:
    """-> rank, number of processes: those of torchrun, or this one alone."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: there is no CUDA here, take --device cpu")
    if "RANK" not in os.environ:
        if args.fsdp:
            raise ValueError("--fsdp shards over the processes that torchrun starts: "
                             "torchrun --nproc-per-node N train.py --fsdp ...")
        return 0, 1
    # A run that goes on may name the GPU that it had.
    if args.device.startswith("cuda"):
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("RANK is set and LOCAL_RANK is not: start with torchrun")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(args.device)
        torch.cuda.set_device(args.device)
    # While the first one writes a model and a checkpoint, the others wait for it.
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo",
                            timeout=datetime.timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size()


def shard(model, dtype: torch.dtype) -> None:
    """FSDP2: what learns is sharded over the processes, float32, and gathered in `dtype` for the
    loss; gradients are averaged and scattered in float32. What is frozen stays whole everywhere."""
    frozen = {p for p in model.parameters() if not p.requires_grad}
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    # Without a mesh it takes the GPU where there is one, whatever --device says.
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    register_fsdp_forward_method(model, "loss")


def checkpoint_blocks(model) -> None:
    """--grad-checkpoint: a block's inner results are computed again in the backward pass."""
    for block in (*model.dit.blocks, *model.mllm.layers, *model.mllm.vision.blocks):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def average_gradients(params) -> None:
    """Data parallelism: each process has the gradient of its own rows; afterwards all have the
    mean.
    A parameter that no process has used keeps none. (FSDP has averaged already.)"""
    params = [p for p in params if not isinstance(p, DTensor)]
    if not dist.is_initialized() or not params:
        return
    used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    dist.all_reduce(used)
    bucket = []
    for p, anywhere in zip(params, used.tolist()):
        if anywhere:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            bucket.append(p.grad)
        if sum(grad.numel() for grad in bucket) > BUCKET:
            average(bucket)
            bucket = []
    if bucket:
        average(bucket)


# Numbers sent at once: few messages are sooner there than hundreds, and a copy of all gradients
# would be large.
BUCKET = 8_000_000


def average(tensors: list) -> None:
    """Over the processes, in place."""
    whole = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(whole)
    whole /= dist.get_world_size()
    for t, mean in zip(tensors, whole.split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))


def mean_over_processes(value: float, device: str) -> float:
    if not dist.is_initialized():
        return value
    dtype = torch.float64 if device == "cpu" else torch.float32
    total = torch.tensor(value, dtype=dtype, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def gather_objects(value, world: int) -> list:
    """A small object of each process, on all of them."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def first_of_all(value):
    """The first process's value that is not None, on all of them; None if there is none."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return next((found for found in gather_objects(value, world) if found is not None), None)


def end_process(status: int) -> None:
    """The end of a run. One of many processes ends at once: the threads of gloo may hold a last
    tensor while Python closes down, and letting go of it then aborts (pytorch pull request
    179291)."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        raise SystemExit(status)


class StopSignal:
    """SIGTERM or Ctrl-C end a run after its step; a second Ctrl-C at once. number: the signal that
    came, or None."""

    def __init__(self):
        self.number = None

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def asked(self, device: str) -> bool:
        """Was any process told to stop?"""
        return mean_over_processes(float(self.number is not None), device) > 0

    def handle(self, number, frame) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
