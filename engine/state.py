"""What changes while training, and how it is kept: spike guard, master weights, their running mean
(EMA), counts, checkpoints.

Under FSDP every tensor here is sharded; on the disk it is whole, so that a run goes on with another
number of processes.
"""
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from engine import checks
from engine.distributed import first_of_all
from engine.files import read_json, read_tensors, sync, weight_files, write_shards
from engine.limits import MAX_COUNT, MAX_HISTORY, MAX_PROCESSES, MAX_TRAINING_STEPS


# What an optimizer keeps for each parameter.
MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
FLOAT32_MAX = torch.finfo(torch.float32).max


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


def is_within(tensor: Tensor, largest: float = FLOAT32_MAX) -> bool:
    """Is every value finite, and at most so large?"""
    part = tensor.detach()
    part = part.to_local() if isinstance(part, DTensor) else part
    # NaN fails the comparison.
    return part.numel() == 0 or part.abs().amax().item() <= largest


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
    may shard; frozen: {name: tensor of the model that does not learn, as loaded}.

    params: float32 weights that learn; ema: their running mean, which is what a saved model has;
    step: steps so far; updates: those that were taken; seen: examples, on all processes; history:
    of data.Share; saved: the step of the last checkpoint.
    """

    def __init__(self, trained: dict[str, nn.Parameter], make_optimizer, ema_decay: float,
                 dtype=torch.float32, model=None, frozen: dict[str, Tensor] | None = None):
        self.weights = MasterWeights(trained, dtype)
        self.params = self.weights.params
        self.optimizer = make_optimizer(self.params)
        self.model = model
        self.frozen = fingerprint(frozen or {})
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
        for name, tensor in self.shards():
            yield name, gather_full(tensor)

    def shards(self):
        """Yields (name, tensor), of which this process may have a part only."""
        for name, p in self.params.items():
            kinds = {"param": p}
            if self.ema is not self.params:
                kinds["ema"] = self.ema[name]
            # AdamW has no moments where there was no gradient yet.
            kinds |= self.optimizer.state.get(p, {})
            for kind, tensor in kinds.items():
                yield f"{kind}.{name}", tensor

    def moments(self) -> dict[str, set[str]]:
        """What the optimizer (or one of several) keeps of each parameter."""
        kept = {}
        for optimizer in getattr(self.optimizer, "optimizers", [self.optimizer]):
            for group in optimizer.param_groups:
                kept |= dict.fromkeys(group["params"], MOMENTS[type(optimizer).__name__])
        return {name: kept[p] for name, p in self.params.items()}

    def counters(self) -> dict:
        """What is not a tensor, for JSON. tensors: how many belong to it."""
        return dict(step=self.step, updates=self.updates, seen=self.seen, history=self.history,
                    guard=vars(self.guard), tensors=sum(1 for _ in self.shards()),
                    model=self.model_config(), frozen=self.frozen)

    def model_config(self) -> dict:
        """The sizes and the wiring of the model that this is the state of."""
        config = getattr(self.model, "config", None)
        if config is None:
            return {}
        found = json.loads(json.dumps(dataclasses.asdict(config)))
        # A run may go on at another size.
        return {key: value for key, value in found.items() if key != "size"}

    @torch.no_grad()
    def load(self, folder) -> None:
        """Resumes from a checkpoint. ValueError for one that is damaged or does not fit, before
        anything here has changed."""
        counters = read_counters(folder, self.model_config(), self.frozen)
        stored = self.check_tensors(folder, counters["tensors"])
        self.step = self.saved = counters["step"]
        self.updates, self.seen = counters["updates"], counters["seen"]
        self.history = [(world, offsets) for world, offsets in counters["history"]]
        vars(self.guard).update(counters["guard"])
        for file in weight_files(folder):
            for name, tensor in read_tensors(file):
                self.load_tensor(name, tensor)
        for name, p in self.params.items():
            # A run with --ema 0 so far.
            if f"ema.{name}" not in stored:
                self.ema[name].copy_(p)
        self.weights.cast(self.params)

    def check_tensors(self, folder, n: int) -> set[str]:
        """-> the names of a checkpoint's n tensors. ValueError if one is missing, of another model
        or damaged."""
        stored, moments = set(), self.moments()
        for file in weight_files(folder):
            for name, tensor in read_tensors(file):
                self.check_tensor(file, name, tensor, moments)
                stored.add(name)
        for name in self.params:
            if f"param.{name}" not in stored:
                raise ValueError(f"{folder} lacks {name}, which learns here: "
                                 "of another --stage or --model?")
            if found := [kind for kind in moments[name] if f"{kind}.{name}" in stored]:
                for kind in moments[name] - set(found):
                    raise ValueError(f"{folder} lacks {kind}.{name}, but has {found[0]}.{name}")
        if len(stored) != n:
            raise ValueError(f"{folder} has {len(stored)} tensors, and its state.json says {n}")
        return stored

    def check_tensor(self, file, stored_name: str, tensor: Tensor, moments: dict) -> None:
        kind, _, name = stored_name.partition(".")
        p = self.params.get(name)
        expected = () if kind == "step" else getattr(p, "shape", None)
        known = p is not None and kind in {"param", "ema"} | moments[name]
        if not known or tensor.shape != expected:
            shape = tuple(tensor.shape)
            raise ValueError(f"{file} holds {checks.shown(stored_name)} {shape}, which does not "
                             "learn here: of another --stage or --model?")
        if tensor.dtype != torch.float32:
            raise ValueError(f"{file}: {stored_name} is {tensor.dtype}, expected torch.float32")
        if not is_within(tensor):
            raise ValueError(f"{file}: {stored_name} has values that are not finite")
        if kind in ("step", "exp_avg_sq") and tensor.numel() and tensor.min() < 0:
            raise ValueError(f"{file}: {stored_name} has values below 0")

    def not_finite(self) -> str | None:
        """The name of a tensor that must not be saved: of a weight, its mean or a moment with a
        value that is not finite, or that is not in the dtype that the model is used in."""
        dtype = getattr(getattr(self.model, "config", None), "dtype", "float32")
        largest = torch.finfo(getattr(torch, dtype)).max
        for name, tensor in self.shards():
            weight = name.startswith(("param.", "ema."))
            if not is_within(tensor, largest if weight else FLOAT32_MAX):
                return name
        return None

    def load_tensor(self, stored_name: str, tensor: Tensor) -> None:
        kind, name = stored_name.split(".", 1)
        p = self.params[name]
        if kind == "param":
            copy_sharded(p, tensor)
        elif kind == "ema":
            # With --ema 0 a stored mean is left out.
            if self.ema is not self.params:
                copy_sharded(self.ema[name], tensor)
        else:
            like = torch.empty((), device=p.device) if kind == "step" else torch.empty_like(p)
            self.optimizer.state[p][kind] = copy_sharded(like, tensor)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Sixteen letters that stand for some weights: 64 values of each tensor, spread evenly over it.
    Training changes all of them, and to read so few takes no time. Empty for no weights, and for
    those without values, which only count memory (the meta device)."""
    if not tensors or any(tensor.is_meta for tensor in tensors.values()):
        return ""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().flatten()
        values = values[::max(1, len(values) // 64)].float().cpu()
        found.update(f"{name} {tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return found.hexdigest()[:16]


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

CHECKPOINT = re.compile(r"step-\d{8}")


def checkpoints(out) -> list[pathlib.Path]:
    """The complete ones, oldest first. One that was being written when the machine stopped has
    another name, and so has whatever else somebody keeps there."""
    folder = pathlib.Path(out) / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in found if CHECKPOINT.fullmatch(file.name) and file.is_dir())


def resumable(out) -> str:
    """What --resume goes on from, for a message; nothing where there is no checkpoint."""
    found = checkpoints(out)
    return f"{found[-1]} is whole, --resume goes on from it" if found else ""


def save(model, state: State, frozen: dict[str, Tensor], args, rank: int) -> None:
    """A checkpoint, and the model with the mean weights. Called on every process, since shards are
    put together; written by the first.

    frozen: {name: tensor of the model that does not learn, as loaded}. ValueError, and nothing is
    written or removed, where the weights have become infinite or NaN.
    """
    if name := first_of_all(state.not_finite()):
        raise ValueError(f"step {state.step} is not saved: {name} has values that are not finite, "
                         "or too large for the model's dtype; take a smaller --lr. "
                         + resumable(args.out))
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
            raise ValueError(f"step {state.step} could not be saved: {e}. "
                             + resumable(args.out)) from None
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
    sync(*new.iterdir(), new)
    os.rename(new, folder / f"step-{state.step:08d}")
    sync(folder)
    for old in checkpoints(folder.parent)[:-keep]:
        # A link is not what a run has written.
        if not old.is_symlink():
            shutil.rmtree(old)


# ------------------------------------------------------------------------------ what state.json is

def is_history(value) -> bool:
    return isinstance(value, list) and len(value) <= MAX_HISTORY and all(map(is_entry, value))


def is_entry(value) -> bool:
    """[world, [offset of each process]]"""
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)):
        return False
    world, offsets = value
    return PROCESSES.test(world) and world == len(offsets) and all(map(EXAMPLES.test, offsets))


PROCESSES = checks.whole(1, MAX_PROCESSES)
EXAMPLES = checks.whole(0, MAX_COUNT * MAX_PROCESSES)
STEPS = checks.whole(0, MAX_TRAINING_STEPS)
COUNTERS = {
    "step": STEPS,
    "updates": STEPS,
    "seen": EXAMPLES,
    "history": checks.Kind("a list of [number of processes, [an offset of each]]", is_history),
    "guard": {
        "mean_loss": checks.or_null(checks.number(0, FLOAT32_MAX)),
        "mean_norm": checks.or_null(checks.number(0, FLOAT32_MAX)),
        "skipped": STEPS,
        "in_a_row": checks.whole(0, 10),
    },
    "tensors": checks.whole(1, MAX_COUNT),
    "model": checks.Kind("an object", lambda value: isinstance(value, dict)),
    "frozen": checks.Kind("a text", lambda value: isinstance(value, str)),
}


def read_counters(folder: pathlib.Path, model: dict, frozen: str) -> dict:
    """state.json. ValueError that names the first key that is missing or wrong, or of another model
    than this one (`State.model_config`, `State.frozen`)."""
    file = folder / "state.json"
    found = read_json(file)
    if isinstance(found, dict):
        # It had not been added yet.
        found.setdefault("frozen", "")
    found = checks.check_keys(found, COUNTERS, str(file))
    if model and found["model"]:
        # It has no format: what is not there had not been added yet.
        found["model"] = checks.upgraded(found["model"], 1)
    if found["step"] != int(folder.name.removeprefix("step-")):
        raise ValueError(f"{file}: step = {found['step']}, and the folder has another one")
    if not found["updates"] <= found["step"] <= found["seen"]:
        raise ValueError(f"{file}: updates, step and seen, {found['updates']}, {found['step']} and "
                         f"{found['seen']}, must not be less than the one before")
    # All processes count in one order. After a thousand broken records in a row a run stops.
    passed = sum(max(offsets) for _, offsets in found["history"])
    if passed > 1000 * (found["seen"] + len(found["history"]) + 1):
        raise ValueError(f"{file}: history says that {passed} examples were passed, and seen "
                         f"says {found['seen']}")
    for key in model | found["model"]:
        stored, here = found["model"].get(key), model.get(key)
        if stored != here:
            raise ValueError(f"{file}: the run has model.{key} = {checks.shown(stored)}, here it "
                             f"is {checks.shown(here)}: take the same options, or another --out")
    if found["frozen"] not in ("", frozen):
        raise ValueError(f"{file}: what does not learn (MLLM, autoencoder) had other weights in "
                         "this run: take the same --model and --take, or another --out")
    return found
