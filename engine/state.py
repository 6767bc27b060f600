"""What changes while training, and how it is kept: spike guard, master weights, their running mean
(EMA), counts, checkpoints.

Under FSDP every tensor here is sharded; on the disk it is whole, so that a run goes on with another
number of processes.
"""
import contextlib
import functools
import itertools
import json
import math
import os
import shutil

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.files import read_tensors, sync, weight_files, write_shards


class Guard:
    """Decides *before* the optimizer step whether it is taken. The limits are the released code's,
    which compares after the step, and with means that hold the spike already; here skipped values
    do not enter the means."""

    def __init__(self):
        self.mean_loss = self.mean_norm = None      # running means (0.99) of the steps taken
        self.skipped = self.in_a_row = 0

    def reason(self, loss: float, norm: float) -> str | None:
        """Why not to take this step, or None."""
        if not math.isfinite(loss) or not math.isfinite(norm) or norm > 1e6:
            return f"loss {loss:g}, gradient norm {norm:g}"
        if self.mean_loss is not None and loss > 20 * self.mean_loss:
            return f"loss {loss:g} is above 20 times its mean {self.mean_loss:g}"
        if self.mean_norm is not None and norm > max(1, 25 * self.mean_norm):
            return f"gradient norm {norm:g} is above 25 times its mean {self.mean_norm:g}"
        return None

    def refusal(self, loss: float, norm: float) -> str | None:
        """Why this step is refused, or None. Keeps the means and the counts. ValueError at the
        tenth refusal in a row."""
        reason = self.reason(loss, norm)
        if reason is None:
            self.mean_loss = running_mean(self.mean_loss, loss)
            self.mean_norm = running_mean(self.mean_norm, norm)
            self.in_a_row = 0
            return None
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == 10:
            raise ValueError(
                f"ten steps in a row were skipped, the last one for: {reason}. Look at the data of "
                "these steps in log.jsonl, then --resume with a smaller --lr, a longer --warmup or "
                "a smaller --clip; --no-guard takes every step")
        return reason


def running_mean(old: float | None, new: float) -> float:
    return new if old is None else 0.99 * old + 0.01 * new


# ------------------------------------------------------------------------------ mixed precision

class MasterWeights:
    """Mixed precision. The model computes with `working` weights in `dtype`; the optimizer
    steps on `params`, float32 copies. A gradient becomes float32 as soon as it is complete, and
    several passes add up in float32. For dtype float32 the two are the same parameters.

    working: {name: parameter of the model, float32 at the start}
    """

    def __init__(self, working: dict[str, nn.Parameter], dtype: torch.dtype = torch.float32):
        self.working = self.params = working
        self.dtype = dtype
        if dtype != torch.float32:
            self.params = {}
            for name, p in working.items():
                master = self.params[name] = nn.Parameter(p.detach().clone())
                p.register_post_accumulate_grad_hook(functools.partial(hand_over, master))
            self.cast(self.params)

    @torch.no_grad()
    def cast(self, values: dict[str, Tensor]) -> None:
        """Rounds these values, the masters' or their mean, into the working weights."""
        for name, p in self.working.items():
            if self.params is not self.working:
                p.data = values[name].to(self.dtype)
            elif p is not values[name]:
                p.copy_(values[name])


def hand_over(master: nn.Parameter, working: nn.Parameter) -> None:
    """Moves a working weight's gradient to its master."""
    grad = working.grad.float()
    master.grad = grad if master.grad is None else master.grad + grad
    working.grad = None
    # Nothing needs its value any more, so its memory goes; the next `cast` brings it back.
    working.data = working.data.new_empty(0)


# ------------------------------------------------------------------------------------ the state

class State:
    """What changes while training, and what a checkpoint holds.

    trained: {name: parameter of the model}, float32; make_optimizer: {name: parameter} ->
    optimizer; ema_decay: of the running mean, 0 for none; dtype: to compute in; model: what FSDP
    may shard.

    params: float32 weights that learn; ema: their running mean, which is what a saved model has;
    step: steps so far; updates: those that were taken; seen: examples, on all processes; history:
    of data.Share; saved: the step of the last checkpoint.
    """

    def __init__(self, trained: dict[str, nn.Parameter], make_optimizer, ema_decay: float,
                 dtype=torch.float32, model=None):
        self.weights = MasterWeights(trained, dtype)
        self.params = self.weights.params
        self.optimizer = make_optimizer(self.params)
        self.model = model
        self.ema_decay = ema_decay
        self.step = self.updates = self.seen = 0
        self.saved = None
        self.guard = Guard()
        self.history = []
        self.ema = self.params
        if ema_decay:
            self.ema = {name: p.detach().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def update_ema(self) -> None:
        """After an optimizer step."""
        self.updates += 1
        if self.ema_decay:
            # A short memory at first, to forget the start.
            decay = min(self.ema_decay, self.updates / (self.updates + 10))
            torch._foreach_lerp_(list(self.ema.values()), list(self.params.values()), 1 - decay)

    # ---- to and from a checkpoint

    def tensors(self):
        """Yields (name, whole tensor), on every process at once where they are sharded."""
        for name, p in self.params.items():
            kinds = {"param": p}
            if self.ema is not self.params:
                kinds["ema"] = self.ema[name]
            # AdamW has no moments where there was no gradient yet.
            kinds |= self.optimizer.state.get(p, {})
            for kind, tensor in kinds.items():
                yield f"{kind}.{name}", gather_full(tensor)

    def counters(self) -> dict:
        """What is not a tensor, for JSON."""
        return dict(step=self.step, updates=self.updates, seen=self.seen, history=self.history,
                    guard=vars(self.guard))

    @torch.no_grad()
    def load(self, folder) -> None:
        """Resumes from a checkpoint. ValueError for a checkpoint that does not fit."""
        counters = json.loads((folder / "state.json").read_text())
        self.step = self.saved = counters["step"]
        self.updates, self.seen = counters["updates"], counters["seen"]
        self.history = [(world, offsets) for world, offsets in counters["history"]]
        vars(self.guard).update(counters["guard"])
        stored = set()
        for file in weight_files(folder):
            for name, tensor in read_tensors(file):
                self.load_tensor(folder, name, tensor)
                stored.add(name)
        for name, p in self.params.items():
            if f"param.{name}" not in stored:
                raise ValueError(f"{folder} lacks {name}, which learns here: "
                                 "of another --stage or --model?")
            # A run with --ema 0 so far.
            if f"ema.{name}" not in stored:
                self.ema[name].copy_(p)
        self.weights.cast(self.params)

    def load_tensor(self, folder, stored_name: str, tensor: Tensor) -> None:
        kind, name = stored_name.split(".", 1)
        p = self.params.get(name)
        if p is None or (kind != "step" and tensor.shape != p.shape):
            raise ValueError(f"{folder} holds {stored_name} {tuple(tensor.shape)}, which does not "
                             "learn here: of another --stage or --model?")
        if kind == "param":
            copy_sharded(p, tensor)
        elif kind == "ema":
            # With --ema 0 a stored mean is left out.
            if self.ema is not self.params:
                copy_sharded(self.ema[name], tensor)
        else:
            like = torch.empty((), device=p.device) if kind == "step" else torch.empty_like(p)
            self.optimizer.state[p][kind] = copy_sharded(like, tensor)


def gather_full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_sharded(into: Tensor, whole: Tensor) -> Tensor:
    """Fills a tensor that may be sharded from a whole one."""
    if isinstance(into, DTensor):
        whole = distribute_tensor(whole.to(into.device), into.device_mesh, into.placements)
    return into.copy_(whole)


@contextlib.contextmanager
def ema_weights(state: State):
    """The model with its mean weights, whole on every process."""
    sharded = isinstance(state.model, FSDPModule)
    kept = state.params
    if kept is state.weights.working:
        kept = {name: p.detach().clone() for name, p in kept.items()}
    state.weights.cast(state.ema)
    if sharded:
        state.model.unshard()
    try:
        yield
    finally:
        if sharded:
            state.model.reshard()
        state.weights.cast(kept)


# ---------------------------------------------------------------------------------- checkpoints

def checkpoints(out) -> list:
    """The complete ones, oldest first. One that was being written when the machine stopped has
    another name."""
    return sorted((out / "checkpoints").glob("step-*"))


def save(model, state: State, frozen: dict[str, Tensor], args, rank: int) -> None:
    """A checkpoint, and the model with the mean weights. Called on every process, since shards are
    put together; written by the first.

    frozen: {name: tensor of the model that does not learn, as stored}
    """
    # A resumed run may have had nothing left to do.
    new_step = state.step != state.saved
    tensors = state.tensors() if new_step else ()
    weights = model_tensors(state, frozen)
    if rank > 0:
        for _ in itertools.chain(tensors, weights):
            pass
    else:
        try:
            if new_step:
                write_checkpoint(args.out / "checkpoints", state, tensors, args.keep)
            model.save(args.out, tensors=weights)
        except (OSError, SafetensorError) as e:
            shutil.rmtree(args.out / "checkpoints" / ".new", ignore_errors=True)
            last = checkpoints(args.out)
            intact = f"{last[-1]} is whole, --resume goes on from it" if last else ""
            raise ValueError(f"step {state.step} could not be saved: {e}. {intact}") from None
    state.saved = state.step


def model_tensors(state: State, frozen: dict[str, Tensor]):
    """Yields (name, whole tensor) of the model: frozen ones as they are, the mean of the others."""
    yield from frozen.items()
    for name, mean in state.ema.items():
        # What only training needs stays in the checkpoint.
        if not name.startswith("aux_head."):
            yield name, gather_full(mean)


def write_checkpoint(folder, state: State, tensors, keep: int) -> None:
    """Written aside, then renamed; of the older ones the last `keep` - 1 stay."""
    new = folder / ".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write_shards(new, tensors)
    (new / "state.json").write_text(json.dumps(state.counters()))
    sync(new)
    os.rename(new, folder / f"step-{state.step:08d}")
    sync(folder)
    for old in checkpoints(folder.parent)[:-keep]:
        shutil.rmtree(old)
