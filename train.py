"""Training, top to bottom: model, examples and losses, what a person sees, loop. (`a` everywhere: the options, of options.py; optimizer and
checkpoints are state.py.)

The paper's three stages teach queries, connector and DiT; everything else is frozen:

    t2i    to draw from captions
    edit   the same, from pictures and an instruction
    mix    fine-tuning on both

    python train.py                                                              the toy's t2i, from toy/weights
    python train.py --preset paper --stage t2i --model weights --data 'shards-{000..123}.tar'
    torchrun --nproc-per-node 8 train.py --fsdp ...                              the same on 8 GPUs

The toy world's parts are made like the real ones, each in a stage of its own, before any ladder exists: vit, mllm, dcae, dit. What these
learn, and from what, is in lab/pretrain.py.

Whatever is random about an example (its noise, its time, whether its text is dropped) is drawn from (seed, step, number of the example): any
number of processes takes the same steps, and to resume a run no random state is needed but these numbers. (But for vit, mllm and dcae: their
losses hold means over the rows of one process.)
"""
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from engine import data
import sample
from lab import pretrain as parts
from engine.options import LADDER, LEARNS, options
from engine.state import State, checkpoints, curves, learning_rate, mean_weights, save, whole
from tbac import TBAC
from toy import language, world


def processes(a):
    """-> rank, number of processes: those of torchrun, or this one alone."""
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {a.device}: there is no CUDA here, take --device cpu")
    if "RANK" not in os.environ:
        if a.fsdp:
            raise ValueError("--fsdp shards over the processes that torchrun starts: torchrun --nproc-per-node N train.py --fsdp ...")
        return 0, 1
    if a.device.startswith("cuda"):                                             # with a number where a run goes on
        a.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(a.device)
    dist.init_process_group("nccl" if a.device.startswith("cuda") else "gloo")
    return dist.get_rank(), dist.get_world_size()


# ----------------------------------------------------------------------------------------------------------- toy examples

def draw_example(rng, number, size):
    scene = world.sample_scene(rng)
    return data.Example(language.request(scene, rng)[0], (), world.render(scene, size))


def edit_example(rng, number, size):
    scene = world.sample_scene(rng, rng.choice((1, 1, 2, 2, 2, 3)))
    order, target, _ = language.edit(scene, rng)
    return data.Example(order, (world.render(scene, size),), world.render(target, size))


# ---------------------------------------------------------------------------------------------------------------- model

def build(a):
    """-> the model as stored, but for the parts that learn: those in float32."""
    dtype = {part.split(".")[0]: torch.float32 for part in LEARNS[a.stage]}
    if a.model:
        model = TBAC.load(a.model, a.device, dtype)
    else:
        generator = torch.Generator().manual_seed(a.seed)
        model = TBAC(parts.TOY, parts.toy_tokenizer(a.out / "tokenizer.json")).to(a.device)
        for part in (model.mllm, model.ladder, model.dit):
            part.init_weights(generator)
    for part, folder in (take.split("=", 1) for take in a.take):
        other = TBAC.load(folder, a.device, dtype)
        setattr(model, part, getattr(other, part))
        names = ("n_query", "wiring") if part == "ladder" else (part,)
        model.config = dataclasses.replace(model.config, **{name: getattr(other.config, name) for name in names})
    if a.wiring or a.queries:
        model.config = dataclasses.replace(model.config, wiring=a.wiring or model.config.wiring, n_query=a.queries or model.config.n_query)
        model.ladder = model.config.ladder().to(a.device)
        model.ladder.init_weights(torch.Generator().manual_seed(a.seed))
    if a.take:
        with torch.device("meta"):
            like = TBAC(model.config)                                           # ValueError where DiT and autoencoder do not fit
        shapes = [{n: p.shape for n, p in m.ladder.named_parameters()} for m in (model, like)]
        if shapes[0] != shapes[1] or model.ladder.taps != like.ladder.taps:
            raise ValueError(f"--take {' '.join(a.take)}: the ladder does not fit the other parts; --wiring top makes a fresh one")
    if a.stage in (*LADDER, "dit"):                                             # from now on it draws at the size that it learns at
        model.config = dataclasses.replace(model.config, size=a.size)
    return model


class Learner(nn.Module):
    """What learns in this stage, and nothing else: exactly this is optimized, and wrapped by DDP or FSDP. Its forward is the stage's loss. extra:
    what that loss needs beside the model and no saved model keeps: `data.Latents`, or a module of parts.EXTRA that learns along."""

    def __init__(self, model, a):
        super().__init__()
        for part in LEARNS[a.stage]:
            self.add_module(part.replace(".", "/"), model.get_submodule(part))  # no dots in a module's name; `trained` puts them back
        nothing = lambda config: nn.Module()
        self.extra = data.Latents(model, a) if a.stage in LADDER else parts.EXTRA.get(a.stage, nothing)(model.config).to(a.device)
        self.rest, self.a = (model,), a                                         # in a tuple, so that what is frozen is not a part

    def forward(self, rows):
        """rows: list of (example, its own random.Random) -> losses (B,), times (B,) or None"""
        return parts.LOSS.get(self.a.stage, ladder_loss)(self.rest[0], self.extra, rows, self.a)

    def trained(self):
        return {n.replace("/", "."): p for n, p in self.named_parameters()}


class Cast(nn.Module):
    """Gives a float32 parameter to its module in another dtype; gradients come back in float32."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, p):
        return p.to(self.dtype)


def prepare(model, a, world):
    """-> learner, ready for any number of processes, {name: float32 parameter that learns}, {name: tensor that is frozen, as stored}."""
    learner, dtype = Learner(model, a), getattr(torch, a.dtype)
    trained = learner.trained()
    frozen = {n: t for n, t in model.state_dict().items() if n not in trained}  # as stored: the cast below makes new tensors
    for n, p in model.named_parameters():
        p.requires_grad_(n in trained)
        if n not in trained:
            p.data = p.data.to(dtype)
    if a.grad_checkpoint:
        for block in (*model.dit.blocks, *model.mllm.layers, *model.mllm.vision.blocks):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if a.fsdp:
        fully_shard(learner, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))
        return learner, learner.trained(), frozen
    for module in list(learner.modules()) if dtype != torch.float32 else ():
        for name in [n for n, _ in module.named_parameters(recurse=False)]:
            parametrize.register_parametrization(module, name, Cast(dtype), unsafe=True)             # unsafe: it may change the dtype
    if world > 1:                                                               # a step of stage mllm may hold no pictures
        learner = nn.parallel.DistributedDataParallel(learner, find_unused_parameters=a.stage == "mllm", gradient_as_bucket_view=True)
    return learner, trained, frozen


# ----------------------------------------------------------------------------------------------------------------- loss

def dropped(example, rng, drop):
    """-> prompt, images, as training sees them. Without pictures: a tenth without text. With: a tenth without text, a tenth with black pictures,
    a tenth with neither (one number decides, as in the released code)."""
    r, images = rng.random(), list(example.images)
    if drop <= r < 3 * drop:
        images = [image.point(lambda _: 0) for image in images]
    return "" if r < (2 if images else 1) * drop else example.prompt, images


def ladder_loss(model, extra, rows, a):
    """The paper's step: flow matching on the rungs."""
    examples, rngs = zip(*rows)
    x0 = extra(model, examples)                                                 # (B, C, h, w)
    prompts, images = zip(*(dropped(example, rng, a.drop) for example, rng in rows))
    t, eps = data.noise(rngs, x0.shape[1:], a.device)                           # (B,), (B, C, h, w)
    t = sample.shifted(t, a.shift)
    return model.flow_losses(x0, model.encode(list(prompts), list(images)), t, eps), t


# --------------------------------------------------------------------------------------------------- what a person sees

def sheet(model, learner, state, examples, a):
    """Pictures for fixed prompts from fixed noise: for each example what it starts from, what it should become, and what is drawn."""
    with mean_weights(learner, state):
        drawn = [sample.generate(model, [e.prompt], [list(e.images)], generator=torch.Generator(a.device).manual_seed(i), size=a.size,
                                 steps=1 if a.dry_run else 20)[0] for i, e in enumerate(examples)]
    shown = [(picture, label) for e, d in zip(examples, drawn)
             for picture, label in (*((i, "from") for i in e.images), (e.target, "to"), (d, e.prompt)) if not isinstance(picture, torch.Tensor)]
    return data.sheet([p for p, _ in shown], [text for _, text in shown], scale=max(1, 128 // a.size), columns=6)


# ----------------------------------------------------------------------------------------------------------------- loop

@dataclasses.dataclass
class Report:
    """After a step: what it cost, and why it was skipped, if it was. by_t: mean loss in ten bins of t of this process's rows. examples: these
    rows, by name or text, if the step was skipped."""
    step: int
    loss: float
    norm: float
    lr: float
    skipped: str | None
    by_t: list | None
    examples: list | None


def batches(reader, state, a):
    """Yields the rows of one pass: [(example, random.Random of its own), ...]."""
    examples, first = iter(reader), None
    while True:
        batch = first or list(itertools.islice(examples, a.batch))
        first = batch if a.overfit else None
        yield [(example, random.Random(f"{a.seed} {state.step} {number}")) for number, example in batch]


def sync_gradients(learner, on):
    """DDP and FSDP add gradients over processes in the last pass of a step only."""
    if isinstance(learner, FSDPModule):
        learner.set_requires_gradient_sync(on)
    else:
        learner.require_backward_grad_sync = on


def mean_of(values, device):
    """Mean over the processes of a list of numbers."""
    x = torch.tensor(values, dtype=torch.float64 if device == "cpu" else torch.float32, device=device)
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x.tolist()


def bins(losses, times):
    which = (times * 10).clamp(max=9.99).long()
    return [losses[which == i].mean().item() if (which == i).any() else None for i in range(10)]


def names(passes):
    """What the log calls examples: a record's name, else its text."""
    return [str(getattr(example, "name", "") or getattr(example, "prompt", example))[:200] for rows in passes for example, _ in rows]


def training_loop(learner, state, stream, a, stop=lambda: False):
    """Yields a Report after every step, until a.steps or until some process is told to stop."""
    asked, per_step = False, a.batch * a.accumulate * (dist.get_world_size() if dist.is_initialized() else 1)
    while state.step < a.steps and not asked:
        done, passes = [], list(itertools.islice(stream, a.accumulate))
        for i, rows in enumerate(passes):
            sync_gradients(learner, i == a.accumulate - 1)
            losses, times = learner(rows)                                       # (B,), (B,)
            (losses.mean() / a.accumulate).backward()
            done.append((losses.detach(), times))
        losses, times = (None if x[0] is None else torch.cat(x) for x in zip(*done))
        loss, asked = mean_of([losses.mean().item(), float(stop())], a.device)
        norm = whole(nn.utils.clip_grad_norm_(state.params.values(), a.clip)).item()
        skipped = state.guard.refuses(loss, norm) if a.guard else None
        if not skipped:
            state.update(a)
        state.optimizer.zero_grad()
        state.step, state.seen = state.step + 1, state.seen + per_step
        by_t = None if times is None else bins(losses, times)
        yield Report(state.step, loss, norm, learning_rate(state.step - 1, a), skipped, by_t, names(passes) if skipped else None)


def peak_memory(device):
    """GB, of the GPU or of this process; NaN where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:                                                         # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def sources(a, latents, own):
    """--data -> sources, weights, None where none was given"""
    draw, edit = (functools.partial(make, size=a.size) for make in (draw_example, edit_example))
    toys = {"toy": parts.EXAMPLE.get(a.stage, draw), "toy-edit": edit} | own
    specs = [(spec, None) if not sep or not w.replace(".", "", 1).isdigit() else (name, float(w))
             for spec in a.data for name, sep, w in [spec.rpartition("=")]]
    return [data.source(spec, toys, a.seed, a.size, latents) for spec, _ in specs], [w for _, w in specs]


def reader_of(a, state, rank, world, latents, own):
    """The examples of this process, from where the run has come to; --epochs becomes --steps."""
    where, weights = sources(a, latents, own)
    if a.overfit:
        state.past = []                                                         # always the first batch
    if not (state.past and state.past[-1][0] == world):                         # from here on with so many processes
        state.past.append((world, [0] * world))
    if a.epochs:
        if any(isinstance(s, data.Toy) for s in where):
            raise ValueError("--epochs: the toy world has no end, give --steps")
        records = [sum(1 for _ in tqdm(s.locations(random.Random(0)), "count records", disable=rank > 0)) for s in where]
        a.steps = state.step + math.ceil((a.epochs * sum(records) - state.seen) / (a.batch * a.accumulate * world))
        if set(weights) == {None}:                                              # an epoch has all of each source
            weights = records
    weights = [1.0 if w is None else w for w in weights]
    return data.Reader(data.Share(where, weights, a.seed, rank, state.past), a.workers, a.max_bad)


class Run:
    """All of a run: `steps()` trains and yields a Report after every step, for a notebook to watch or to stop; `train` below is its use.
    own: examples of your own, {word for --data: make(random.Random, number) -> data.Example}."""

    def __init__(self, a, own=None):
        self.a, (self.rank, self.world), self.asked, last = a, processes(a), None, checkpoints(a.out)
        if last and not a.resume:
            raise ValueError(f"{a.out} holds a run already: --resume, or another --out")
        if a.preset == "paper" and not (a.model and a.data):
            raise ValueError("--preset paper needs --model and --data")
        torch.manual_seed(a.seed)                                               # for what a stage makes from nothing
        self.model = build(a)
        self.learner, trained, self.frozen = prepare(self.model, a, self.world)
        self.state = State(trained, a)
        if last:
            self.state.load(last[-1])
        if a.resume and self.rank == 0:
            print(f"goes on from {last[-1]}" if last else f"no checkpoint in {a.out}: starts anew")
        inner = self.learner.module if hasattr(self.learner, "module") else self.learner
        self.reader = reader_of(a, self.state, self.rank, self.world, inner.extra.known if a.stage in LADDER else None, own or {})
        first = data.Share(self.reader.share.sources, self.reader.share.weights, a.seed, 0, [(1, [0])])
        self.shown = [e for _, e in itertools.islice(data.Reader(first, max_bad=a.max_bad), 8)] if a.stage in LADDER else []

    def steps(self):
        """To be asked for once: its examples begin where the last checkpoint was."""
        return training_loop(self.learner, self.state, batches(self.reader, self.state, self.a), self.a, lambda: self.asked is not None)

    def save(self):
        reached = [self.reader.reached] * self.world
        if self.world > 1:
            dist.all_gather_object(reached, self.reader.reached)
        self.state.past[-1] = (self.world, reached)
        save(self.model, self.state, self.frozen, self.a, self.rank)
        self.state.saved = self.state.step

    def sheet(self):
        page = sheet(self.model, self.learner, self.state, self.shown, self.a)
        if self.rank == 0:
            page.save(self.a.out / f"sheet-{self.state.step:08d}.png")


def train(run):
    """Steps, and what happens between them: the bar, the log, checkpoints, sheets. Ends early, after a checkpoint, when told to."""
    a, state, written, named, mean, file = run.a, run.state, None, 0, None, run.a.out / "log.jsonl"
    per_step = a.batch * a.accumulate * run.world
    line = lambda row: json.dumps(json.loads(json.dumps(row), parse_constant=lambda _: None)) + "\n"         # NaN is not JSON
    with tqdm(total=a.steps, initial=state.step, desc=a.stage, mininterval=1, disable=run.rank > 0) as bar, open(file, "a") as log:
        if run.rank == 0 and file.read_bytes()[-1:] not in (b"", b"\n"):        # a crash left half a line
            log.write("\n")
        began = time.time()
        for r in run.steps():
            took = time.time() - began
            mean = r.loss if mean is None or not math.isfinite(mean) else 0.98 * mean + 0.02 * r.loss
            row = dataclasses.asdict(r) | dict(images_per_second=round(per_step / took, 2), memory_gb=round(peak_memory(a.device), 3))
            if bad := run.reader.bad[named:]:                                   # each process names its own
                named = len(run.reader.bad)
                log.write(line(dict(step=r.step, process=run.rank, bad=bad)))
                bar.write("\n".join(f"skipped: {what}" for what in bad))
            if run.rank == 0:
                log.write(line(row))
                if r.skipped:
                    bar.write(f"step {r.step} not taken: {r.skipped}")
            elif r.skipped:
                log.write(line(dict(step=r.step, process=run.rank, examples=r.examples)))
            log.flush()
            bar.update()
            said = f"loss {mean:.4f}, norm {r.norm:.2f}, lr {r.lr:.1e}, {per_step / took:.1f} images/s, {row['memory_gb']:.1f} GB"
            bar.set_postfix_str(said, refresh=False)
            if r.step % a.save_every == 0 or r.step == a.steps:
                run.save()
                written = r.step
            if run.shown and a.sheet_every and (r.step % a.sheet_every == 0 or r.step == a.steps):
                run.sheet()
            began = time.time()
    if state.step != written:                                                   # stopped early, or resumed to write the model only
        run.save()


def main():
    try:
        a = options(about=__doc__)
        if a.curves:
            return curves(a.out)
        with tempfile.TemporaryDirectory() as scratch:
            a.out = pathlib.Path(scratch) if a.dry_run else a.out
            a.out.mkdir(parents=True, exist_ok=True)
            run = Run(a)
            if run.rank == 0:
                (a.out / ".options.json").write_text(json.dumps(vars(a), indent=1, default=str))
                os.replace(a.out / ".options.json", a.out / "options.json")

            def stop(number, frame):
                """At the end of this step; at a second Ctrl-C at once."""
                if run.asked == number == signal.SIGINT:
                    raise KeyboardInterrupt
                run.asked = number
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop)
            train(run)
            if run.rank == 0:
                curves(a.out)
                if a.stage == "dcae":
                    parts.unit_latents(a.out, a)
            if dist.is_initialized():
                dist.destroy_process_group()
    except (ValueError, OSError, SafetensorError) as e:
        raise SystemExit(f"error: {e}") from None
    if run.asked:
        print(f"stopped at step {run.state.step}, saved; --resume goes on")
        raise SystemExit(128 + run.asked)


if __name__ == "__main__":
    main()
