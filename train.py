"""Training, top to bottom: options, data, model, loss, optimizer, task, step, loop. The paper's
three stages teach the ladder (queries and connector) and the DiT; everything else is frozen:

    t2i    to draw from captions
    edit   the same, from pictures and an instruction
    mix    fine-tuning on both

    python train.py                                    the toy's t2i, on from the weights in toy/
    python train.py --preset paper --stage t2i --model weights/fresh --data 'shards-{000..123}.tar'
    torchrun --nproc-per-node 8 train.py --fsdp ...    the same on 8 GPUs

What is random about an example (its noise, its time, whether its text is dropped) is drawn from
(seed, step, number of the example): a run takes the same steps on any number of processes that
share as many examples a step, and resumes without any random state. lab/pretrain.py teaches the
toy's parts with the same loop.

Where the rest is: options in engine/options.py; examples in engine/sources.py; their order, times,
noise and latents in engine/data.py, batches in engine/stream.py; float32 weights, EMA and
checkpoints in engine/state.py; processes in engine/distributed.py; the log in engine/log.py.
"""
import dataclasses
import functools
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from engine import distributed, fast, log
from engine.checks import check_rules
from engine.command import one_line_errors
from engine.data import Latents, times_and_noise
from engine.device import set_threads
from engine.distributed import average_gradients, mean_over_processes
from engine.files import save_png
from engine.loading import belongs, check_learnable
from engine.options import parse, store
from engine.outputs import check_kind
from engine.runs import last_checkpoint, run_folder
from engine.sources import Example
from engine.state import State, ema_weights, gather_full, save
from engine.stream import batches, check_data, first_examples, open_reader
from sample import TOY_FOLDER, black, generate, latent_shape, shifted
from tbac import TBAC
from toy import language, world

# ------------------------------------------------------------------------------------- options

TOY = dict(batch=48, lr=1e-3, warmup=200, weight_decay=0.01, clip=1.0, ema=0.999, size=64,
           save_every=250, sheet_every=500, min_lr_ratio=0.02, cond_drop=0.05,
           model=str(TOY_FOLDER))
# The values of the released YAML files and, where they say nothing, of its train.py and dataset.py;
# batch is per GPU. (Eight workers are our choice.)
PAPER = dict(lr=1e-4, warmup=5000, min_lr_ratio=0.1, weight_decay=0.05, clip=0.5, cond_drop=0.1,
             ema=0.0, size=512, save_every=1000, sheet_every=1000, workers=8, grad_checkpoint=True)
PRESETS = {
    "toy": {
        "t2i": TOY | dict(steps=600, data=["toy"]),
        "edit": TOY | dict(steps=6500, lr=5e-4, data=["toy=0.3", "toy-edit=0.7"]),
        "mix": TOY | dict(steps=6000, data=["toy=0.5", "toy-edit=0.5"]),
    },
    "paper": {
        "t2i": PAPER | dict(steps=150_000, batch=16),
        "edit": PAPER | dict(epochs=10, batch=4),
        "mix": PAPER | dict(epochs=100, batch=4),
    },
}
# What --train lets learn: parts of the model, as regular expressions. "all" is the paper's choice,
# and what TBAC.trainable() lists. "ladder+cross" needs about half of its memory, "ladder" a little
# more than a third (docs/training.md).
LEARNS = {
    "all": ("ladder", "dit"),
    "ladder+cross": ("ladder", r"dit\.blocks\.\d+\.cross"),
    "ladder": ("ladder",),
}


def options(argv=None):
    return parse(argv, __doc__, PRESETS, LEARNS)


# ---------------------------------------------------------------------------------------- data

def draw_example(rng: random.Random, number: int, size: int,
                 held_out: frozenset = world.HELD_OUT) -> Example:
    """A scene of the toy world and a request for it. number: of the example, for makers that count;
    held_out: pairs of colour and shape that may only stand alone."""
    scene = language.scene_to_draw(rng, held_out)
    text, _ = language.request(scene, rng)
    return Example(text, (), world.render(scene, size))


def edit_example(rng: random.Random, number: int, size: int) -> Example:
    """A scene, an instruction, and the scene as it should become."""
    scene, instruction, target, _ = language.scene_to_edit(rng)
    return Example(instruction, (world.render(scene, size),), world.render(target, size))


def drop_condition(example: Example, rng: random.Random, p: float) -> tuple[str, list]:
    """-> prompt and images as training sees them: guidance compares with an empty prompt and with
    black images, so these have to be learnt. One number decides, as in the released code (which in
    its stage mix drops 2 p of the texts without images, too; here it is p in every stage):

        r in      [0, p)      [p, 2p)             [2p, 3p)       [3p, 1)
        images    no text     no text, black      black          as they are
        none      no text     as it is            as it is       as it is
    """
    r = rng.random()
    prompt, images = example.prompt, list(example.images)
    if r < (2 * p if images else p):
        prompt = ""
    if p <= r < 3 * p:
        images = black(images)
    return prompt, images


# --------------------------------------------------------------------------------------- model

def build(args) -> TBAC:
    """Loads --model, with what learns in float32. --take replaces parts by those of other folders;
    any of --wiring, --connector and --queries replaces the ladder by a fresh one."""
    if not (args.model and args.data):
        raise ValueError(f"--preset {args.preset} needs --model and --data")
    dtype = dict.fromkeys(LEARNS[args.train], torch.float32)
    model = TBAC.load(args.model, args.device, dtype)
    for take in args.take:
        part, folder = take.split("=", 1)
        take_part(model, part, TBAC.load(folder, args.device, dtype))
    if args.wiring or args.connector or args.queries:
        fresh_ladder(model, args)
    check_fit(model, args)
    set_size(model, args.size)
    return model


def take_part(model: TBAC, part: str, other: TBAC) -> None:
    """Replaces a part, and what the config says of it, by another model's."""
    setattr(model, part, getattr(other, part))
    names = ("n_query", "wiring", "connector") if part == "ladder" else (part,)
    new = {name: getattr(other.config, name) for name in names}
    model.config = dataclasses.replace(model.config, **new)


def fresh_ladder(model: TBAC, args) -> None:
    """A ladder that has learnt nothing, as the config says where args do not."""
    new = dict(wiring=args.wiring or model.config.wiring,
               connector=args.connector or model.config.connector,
               n_query=args.queries or model.config.n_query)
    model.config = dataclasses.replace(model.config, **new)
    ladder = model.config.build_ladder()
    ladder.init_weights(torch.Generator().manual_seed(args.seed))
    model.ladder = ladder.to(args.device)


def set_size(model: TBAC, size: int) -> None:
    """From now on it draws at the size that it learns at. ValueError for one that the autoencoder
    does not have."""
    latent_shape(model.config, size)
    model.config = dataclasses.replace(model.config, size=size)


def check_fit(model: TBAC, args) -> None:
    """ValueError where parts from several folders do not fit."""
    check_rules(model.config, "config")
    with torch.device("meta"):
        expected = model.config.build_ladder()
    found = {name: p.shape for name, p in model.ladder.named_parameters()}
    wanted = {name: p.shape for name, p in expected.named_parameters()}
    if found != wanted or model.ladder.taps != expected.taps:
        raise ValueError(f"--take {' '.join(args.take)}: the ladder does not fit the other parts; "
                         "--wiring ladder makes a fresh one")


# ---------------------------------------------------------------------------------------- loss

def ladder_loss(model: TBAC, latents: Latents, rows: list, args) -> tuple[Tensor, Tensor]:
    """TBAC.loss of one pass; times, noise and dropped conditions come from each row's generator.
    rows: [(Example, its random.Random)] -> losses (B,), times (B,)"""
    examples, rngs = zip(*rows)
    x0 = latents(model, examples)                                          # (B, C, h, w)
    conditions = [drop_condition(example, rng, args.cond_drop) for example, rng in rows]
    prompts, images = (list(column) for column in zip(*conditions))
    t, eps = times_and_noise(rngs, x0.shape[1:], args.device)              # (B,), (B, C, h, w)
    t = shifted(t, args.shift)
    return model.loss(x0, prompts, images, t, eps), t


# ----------------------------------------------------------------------------------- optimizer

def learning_rate(step: int, args) -> float:
    """Linear warm-up, then a cosine down to min_lr_ratio of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * cosine)


def adamw(params: dict[str, nn.Parameter], args) -> torch.optim.Optimizer:
    """Weight decay for what has two dimensions or more, the queries among it; not for biases and
    gains."""
    matrices = [p for p in params.values() if p.dim() > 1]
    vectors = [p for p in params.values() if p.dim() <= 1]
    groups = [dict(params=matrices, weight_decay=args.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)


# ---------------------------------------------------------------------------------------- task

def ladder_sheet(run) -> Image.Image:
    """Fixed prompts from fixed noise: for each example what it starts from, what it should become,
    and what is drawn."""
    args = run.args
    drawn = []
    for i, example in enumerate(run.shown):
        generator = torch.Generator().manual_seed(i)
        drawn += generate(run.model, [example.prompt], [list(example.images)],
                          generator=generator, size=args.size, steps=1 if args.dry_run else 20)
    return log.example_sheet(run.shown, drawn, args.size)


@dataclasses.dataclass
class Task:
    """What a stage trains. helper: a module that the loss needs beside the model and no saved model
    keeps: an auxiliary head, whose parameters learn along, or here the autoencoder's latents."""
    learns: tuple[str, ...]             # parts of the model, as regular expressions
    loss: Callable                      # (model, helper, rows, args) -> losses (B,), times or None
    makers: dict[str, Callable]         # {word for --data: make(rng, number, size) -> example}
    build: Callable                     # args -> model
    helper: Callable                    # (model, args) -> that module
    sheet: Callable                     # run -> a page of pictures that shows how well it goes
    optimizer: Callable                 # ({name: parameter}, args) -> optimizer


LADDER_TASK = Task(learns=LEARNS["all"], loss=ladder_loss,
                   makers={"toy": draw_example, "toy-edit": edit_example}, build=build,
                   helper=Latents, sheet=ladder_sheet, optimizer=adamw)


# ---------------------------------------------------------------------------------------- step

def backward(run, rows: list, n_pass: int) -> tuple[Tensor, Tensor | None]:
    """Adds the gradient of one pass. -> losses (B,), times (B,) or None"""
    # The model computes with copies, in --dtype, of the float32 weights that learn. The last
    # backward pass freed them one by one (engine/state.py:MasterWeights): here they are made anew.
    run.state.weights.cast(run.state.params)
    losses, times = run.loss(rows)
    (losses.mean() / n_pass).backward()
    return losses.detach(), times


def training_step(run, passes: list) -> tuple[float, float, str | None, list]:
    """One optimizer step on some passes, each a list of rows -> mean loss, gradient norm, why the
    step was not taken or None, what `backward` gave."""
    args, state = run.args, run.state
    optimizer = state.optimizer
    results = [backward(run, rows, len(passes)) for rows in passes]
    average_gradients(state.params.values())
    loss = mean_over_processes(log.mean_loss(results), args.device)
    norm = gather_full(clip_grad_norm_(state.params.values(), args.clip)).item()
    # A spike of the loss or of the gradient is refused: no step.
    skipped = state.guard.refusal(loss, norm) if args.guard else None
    if not skipped:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step, args)
        optimizer.step()
        state.update_ema()
    optimizer.zero_grad()
    return loss, norm, skipped, results


# ---------------------------------------------------------------------------------------- loop

class Run:
    """All of a run: `steps()` trains and yields a Report after every step, for a notebook to watch
    or to stop; `train` below is its use. own: examples of your own, {word for --data:
    make(random.Random, number) -> Example}."""

    def __init__(self, args, task: Task = LADDER_TASK, own: dict | None = None):
        self.args, self.task = args, task
        self.rank, self.n_process = distributed.start_processes(args)
        self.stop = distributed.StopSignal()
        last = last_checkpoint(args)
        makers = {word: functools.partial(make, size=args.size)
                  for word, make in task.makers.items()} | (own or {})
        check_data(args, makers)
        torch.manual_seed(args.seed)
        self.model = task.build(args)
        set_threads(self.model)
        if not args.plain:
            fast.enable(self.model)
        self.helper = task.helper(self.model, args)
        self.state, self.frozen = self.prepare()
        if last:
            self.state.load(last)
        if args.resume and self.rank == 0:
            start = f"no checkpoint in {args.out}: starts anew"
            print(f"goes on from {last}" if last else start)
        # Latents.known: a record whose latents are cached need not be decoded.
        latents = getattr(self.helper, "known", None)
        # Where --epochs are asked for, this turns them into args.steps.
        self.reader = open_reader(args, self.state, self.rank, self.n_process, makers, latents)
        self.shown = first_examples(self.reader, 8)

    def prepare(self) -> tuple[State, dict]:
        """Freezes what does not learn and keeps it in --dtype. -> the state of what does, and
        {name: tensor that is frozen, as loaded}."""
        args, dtype = self.args, getattr(torch, self.args.dtype)
        learns = self.task.learns if args.train == "all" else LEARNS[args.train]
        check_learnable(self.model, learns)
        names = {name for name, _ in self.model.named_parameters() if belongs(name, learns)}
        # Taken first: below the model gets new tensors, these stay as they were loaded.
        frozen = {name: t for name, t in self.model.state_dict().items() if name not in names}
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in names)
            if not p.requires_grad:
                p.data = p.data.to(dtype)
        if args.grad_checkpoint:
            distributed.checkpoint_blocks(self.model)
        if args.fsdp:
            # FSDP casts by itself what it gathers: no copies in another dtype are needed.
            distributed.shard(self.model, dtype)
            dtype = torch.float32
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        trained |= {f"aux_head.{name}": p for name, p in self.helper.named_parameters()
                    if p.requires_grad}
        optimizer = functools.partial(self.task.optimizer, args=args)
        state = State(trained, optimizer, args.ema, dtype, self.model, frozen)
        return state, frozen

    def loss(self, rows: list) -> tuple[Tensor, Tensor | None]:
        return self.task.loss(self.model, self.helper, rows, self.args)

    def steps(self) -> Iterator[log.Report]:
        """Yields a Report after every step, until args.steps, or until some process is told to
        stop. To be asked for once: its examples begin where the last checkpoint was."""
        args, state = self.args, self.state
        per_step = args.batch * args.accumulate * self.n_process
        stream = batches(self.reader, state, args)
        while state.step < args.steps and not self.stop.asked(args.device):
            passes = list(itertools.islice(stream, args.accumulate))
            loss, norm, skipped, results = training_step(self, passes)
            # Whoever looks at the model between steps finds it up to date.
            state.weights.cast(state.params)
            lr = learning_rate(state.step, args)
            state.step += 1
            state.seen += per_step
            names = log.example_names(passes) if skipped else None
            yield log.Report(state.step, loss, norm, lr, skipped, log.loss_by_time(results), names)

    def save(self) -> None:
        """A checkpoint, and the model as it is to be used."""
        offsets = distributed.gather_objects(self.reader.offset, self.n_process)
        self.state.history[-1] = (self.n_process, offsets)
        save(self.model, self.state, self.frozen, self.args, self.rank)

    def save_sheet(self) -> None:
        """How well it goes, in pictures."""
        with ema_weights(self.state), torch.no_grad():
            page = self.task.sheet(self)
        if self.rank == 0:
            save_png(page, self.args.out / f"sheet-{self.state.step:08d}.png")


def train(run: Run) -> None:
    """Steps, and what happens between them: the log, checkpoints, sheets. Ends early, after a
    checkpoint, when told to."""
    args, state = run.args, run.state
    written = None
    with log.Log(run) as writer:
        began = time.time()
        for report in run.steps():
            writer.write(report, time.time() - began)
            last = report.step == args.steps
            if last or report.step % args.save_every == 0:
                run.save()
                written = report.step
            if args.sheet_every and (last or report.step % args.sheet_every == 0):
                run.save_sheet()
            began = time.time()
    # Stopped early, or resumed to write the model only.
    if written != state.step:
        run.save()


def launch(args, task: Task = LADDER_TASK, finish: Callable | None = None) -> None:
    """A run from its options to its end. finish(run): what is left to do for the first process."""
    with run_folder(args):
        run = Run(args, task)
        if run.rank == 0:
            store(args)
        run.stop.listen()
        train(run)
        if run.rank == 0:
            log.plot_curves(args.out)
            if finish:
                finish(run)
    status = 0
    if run.stop.number:
        print(f"stopped at step {run.state.step}, saved; --resume goes on")
        status = 128 + run.stop.number
    distributed.end_process(status)


def main(args=None, task: Task = LADDER_TASK, finish: Callable | None = None) -> None:
    args = args or options()
    with one_line_errors():
        if args.curves:
            check_kind(args.out / "curves.png")
            log.plot_curves(args.out)
        else:
            launch(args, task, finish)


if __name__ == "__main__":
    main()
