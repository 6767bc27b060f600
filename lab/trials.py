"""Runs of the plan, trained together and scored: from a list of runs to a file of scores for each.

    runs -> groups that share examples -> stacks of models of one shape -> steps -> scores

A step makes its examples, their latents and the MLLM's reading of the prompts once, for all models
(engine/stacked.py). Models of one seed see the same noise and times; seeds differ in noise, times
and in the weights of the ladder. What is finished is kept, in RUN.json; what is not goes on from
its last checkpoint.
"""
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import pathlib
import random
import shutil
import time
import types
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import sample
import train
from engine import fast
from engine.data import Reader, Share, ignore_signals
from engine.device import commit, set_threads
from engine.files import as_json, read_json, weights_digest, write_text
from engine.pictures import to_pixels
from engine.runs import lock
from engine.sources import Generated
from engine.stacked import Learner, Prefix, Stack, read_prefix, signature
from engine.state import State, checkpoints, ema_weights, write_checkpoint
from lab import evaluate, plan
from lab.plan import Run
from tbac import TBAC, flow_matching
from toy import grader

# How arms learn, as the toy does in this stage: warm-up, weight decay, clipping, running mean,
# dropped texts. Steps, batch, learning rate and the shift of the times are the plan's.
RECIPE = types.SimpleNamespace(**train.PRESETS["toy"]["t2i"])
# What runs start from, folders in --start: the DiT before it met a ladder, with its autoencoder;
# and the MLLMs of the plan.
MLLM_FOLDERS = {"facts": "mllm", "captions": "captions", "gist": "gist", "random": "mllm"}
# Seconds between checkpoints: of 30 models one has 2 GB.
SAVE_EVERY = 180
# Pictures that are drawn at once, by all models of a stack together.
AT_ONCE = {"cpu": 96, "cuda": 4096}
# Steps whose inputs are made at once. A GPU is sooner done with them than asked for them.
AHEAD = {"cpu": 1, "cuda": 4}


# ------------------------------------------------------------------------------- what is written

def write_json(file: pathlib.Path, content) -> None:
    """A file that is there is whole."""
    write_text(file, as_json(content, indent=1))


def cases(args) -> list:
    """The prompts that runs are scored by, the same for all: of GenEval's six categories, in words
    that training uses; first those of seen pairs. (Those of pairs never seen are drawn
    for parts that ask for them. `primary` and `penultimate`, whose runs no other part has, do not.)
    """
    found = [case for case in evaluate.cases("draw", args.n) if case.category in evaluate.GENEVAL]
    if plan.is_long(args.study):
        return [case for case in found if case.pairs == "seen"]
    return sorted(found, key=lambda case: case.pairs != "seen")


def starts(mllm: str) -> tuple[str, str]:
    """The folders in --start that runs on this MLLM start from."""
    return "dit", MLLM_FOLDERS[mllm]


@functools.cache
def start_weights(start: pathlib.Path, mllm: str) -> str:
    """Eight letters that stand for them."""
    return weights_digest(*(start / name for name in starts(mllm)))


def folder_of(args, mllm: str) -> pathlib.Path:
    """Where runs on an MLLM are kept: named after all that their scores depend on beside arm, seed
    and the code, whose commit each of them names; and after when they are scored, by how many
    prompts."""
    prompts = "\n".join(case.prompt for case in cases(args))
    words = hashlib.sha256(prompts.encode()).hexdigest()[:8]
    weights = start_weights(args.start, mllm)
    settings = f"{args.steps}x{args.batch}x{args.lr:g}-{args.draw_steps}-{args.guidance:g}"
    settings += f"-{args.dtype}"
    return args.out / f"runs-{weights}-{words}-{settings}-{args.looks}x{args.n_early}"


def result(args, run: Run) -> dict:
    """What is known of a run: {"scores": {step: "0110...", right or wrong of each prompt}, ...}"""
    file = folder_of(args, run.arm.mllm) / f"{run.name}.json"
    return read_json(file) if file.is_file() else dict(scores={})


def is_finished(args, run: Run) -> bool:
    return str(args.steps) in result(args, run)["scores"]


def group_folder(runs: list[Run], args) -> pathlib.Path:
    """Of runs that learn together, until they are finished."""
    names = " ".join(run.name for run in runs)
    mllm = runs[0].arm.mllm
    return folder_of(args, mllm) / hashlib.sha256(names.encode()).hexdigest()[:8]


# --------------------------------------------------------------------------- models of one group

def all_of(folder, start: pathlib.Path) -> pathlib.Path:
    """For a rehearsal: a --start, all of whose parts are this folder's -> start"""
    start.mkdir(parents=True, exist_ok=True)
    for name in ("dit", *MLLM_FOLDERS.values()):
        if not (start / name).exists():
            (start / name).symlink_to(folder.resolve(), target_is_directory=True)
    return start


def with_mllm(folder, name: str, device: str) -> TBAC:
    """The model of a folder as this MLLM of the plan's, and a fresh ladder. Drawn on the CPU, so
    that every device has the same."""
    model = TBAC.load(folder, "cpu", torch.float32)
    if name == "random":
        model.mllm.init_weights(torch.Generator().manual_seed(0))
    model.ladder.init_weights(torch.Generator().manual_seed(0))
    return model.to(device)


def base_model(args, mllm: str) -> TBAC:
    """The parts that all runs of a group start from, the frozen ones in --dtype: the DiT and the
    autoencoder whose latents it has learnt, and one of the MLLMs."""
    model = TBAC.load(args.start / "dit", args.device, torch.float32)
    other = with_mllm(args.start / MLLM_FOLDERS[mllm], mllm, args.device)
    model.mllm = other.mllm
    model.config = dataclasses.replace(model.config, mllm=other.config.mllm)
    dtype = getattr(torch, args.dtype)
    model.mllm.to(dtype)
    model.dcae.to(dtype)
    set_threads(model)
    return fast.enable(model)


def learner(model: TBAC, run: Run) -> Learner:
    """A fresh ladder by the run's arm and seed, and a copy of the DiT."""
    arm = run.arm
    config = dataclasses.replace(model.config, wiring=arm.wiring, connector=arm.connector,
                                 n_query=arm.n_query)
    ladder = config.build_ladder()
    ladder.init_weights(torch.Generator().manual_seed(run.seed))
    device = model.ladder.queries.device
    return Learner(ladder.to(device), copy.deepcopy(model.dit))


def build_stacks(model: TBAC, runs: list[Run], width: int) -> list[tuple[Stack, list[Run]]]:
    """Models of one shape in one stack, at most `width` of them."""
    by_shape = {}
    for run in runs:
        built = learner(model, run)
        by_shape.setdefault(signature(built), []).append((built, run))
    stacks = []
    for members in by_shape.values():
        for i in range(0, len(members), width):
            learners, own = zip(*members[i:i + width])
            stacks.append((Stack(model.config, model.mllm, learners), list(own)))
    return stacks


def adamw(params: dict[str, Tensor], lr: float) -> torch.optim.Optimizer:
    """As train.adamw: weight decay for matrices only. A stack has one dimension more."""
    matrices = [p for p in params.values() if p.dim() > 2]
    vectors = [p for p in params.values() if p.dim() <= 2]
    groups = [dict(params=matrices, weight_decay=RECIPE.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


@torch.no_grad()
def clip_each(params: list[Tensor]) -> Tensor:
    """Clips the gradient of each model of a stack by its own norm -> norms (N,)"""
    norms = torch.cat([p.grad.flatten(1) for p in params], 1).norm(dim=1)   # (N,)
    factors = (RECIPE.clip / (norms + 1e-6)).clamp(max=1)
    shaped = [factors.view(-1, *[1] * (p.dim() - 1)) for p in params]
    torch._foreach_mul_([p.grad for p in params], shaped)
    return norms


def noise_of_step(seed: int, step: int, shape) -> tuple[Tensor, Tensor]:
    """Of a seed and a step: times (B,) in (0, 1], noise (B, C, h, w). Drawn on the CPU, so that
    every device has the same."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {step}").getrandbits(63))
    return 1 - torch.rand(shape[0], generator=generator), torch.randn(shape, generator=generator)


@dataclasses.dataclass
class Inputs:
    """Of one step: latents x0 (B, C, h, w), what the MLLM has read, {seed: times (B,)} and
    {seed: noise (B, C, h, w)}; and where the examples go on."""
    x0: Tensor
    prefix: Prefix
    times: dict[int, Tensor]
    eps: dict[int, Tensor]
    offset: int

    def hand_over(self, stream) -> None:
        """From the stream that they were made on to this one."""
        here = torch.cuda.current_stream()
        here.wait_stream(stream)
        drawn = [*self.times.values(), *self.eps.values()]
        for tensor in (self.x0, *self.prefix.tensors(), *drawn):
            tensor.record_stream(here)


class Group:
    """All runs that share their examples, from their weights to their files."""

    def __init__(self, runs: list[Run], args):
        if args.device.startswith("cuda:"):
            # Streams and CUDA graphs are those of the current device.
            torch.cuda.set_device(args.device)
        self.runs = runs
        self.args = args
        self.commit = commit()
        mllm, n_held_out = runs[0].examples
        self.model = base_model(args, mllm)
        self.stacks = build_stacks(self.model, runs, args.width)
        params = {f"{i}.{name}": p for i, (stack, _) in enumerate(self.stacks)
                  for name, p in stack.params.items()}
        optimizer = functools.partial(adamw, lr=args.lr)
        self.state = State(params, optimizer, RECIPE.ema, getattr(torch, args.dtype))
        self.folder = group_folder(runs, args)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check_code()
        self.resume()
        make = functools.partial(train.draw_example, size=self.model.config.size,
                                 held_out=plan.pairs_held_out(n_held_out))
        share = Share([Generated(make, 0)], [1.0], 0, 0, self.state.history)
        self.reader = Reader(share, args.workers)
        self.saved = time.monotonic()

    def check_code(self) -> None:
        """ValueError where other code has begun these runs: a run is of one commit."""
        file = self.folder / "commit.txt"
        if not file.exists():
            write_text(file, self.commit)
        if (begun := file.read_text()) != self.commit:
            raise ValueError(f"{self.folder} was begun by commit {begun}, not {self.commit}: go on "
                             "with that, or anew in another --out")

    def resume(self) -> None:
        """From the last checkpoint, if there is one. ValueError where its stacks are others."""
        try:
            if found := checkpoints(self.folder):
                self.state.load(found[-1])
        except ValueError as e:
            raise ValueError(f"{e} (A study goes on with the --width that it began with, or anew "
                             "in another --out)") from None
        self.state.history = self.state.history or [(1, [0])]

    # ---- a step

    def batches(self):
        """Yields the inputs of each step. On a GPU they are made on a stream of their own, while
        the step before still learns."""
        examples = iter(self.reader)
        on_gpu = self.args.device.startswith("cuda")
        stream = torch.cuda.Stream() if on_gpu else None
        if on_gpu:
            # The weights that it reads were written on the other one.
            stream.wait_stream(torch.cuda.current_stream())
        ahead = AHEAD["cuda" if on_gpu else "cpu"]
        for first in itertools.count(self.state.step, ahead):
            rows, offsets = [], []
            for _ in range(ahead):
                rows.append(list(itertools.islice(examples, self.args.batch)))
                offsets.append(self.reader.offset)
            # Where there is no stream, this does nothing.
            with torch.cuda.stream(stream):
                steps = self.inputs(first, rows, offsets)
            for inputs in steps:
                if on_gpu:
                    inputs.hand_over(stream)
                yield inputs

    @torch.no_grad()
    def inputs(self, first: int, rows: list[list], offsets: list[int]) -> list[Inputs]:
        """What all models share, and each seed's times and noise, of some steps from `first` on.
        rows: the numbered examples of each."""
        model = self.model
        device = self.args.device
        batch = self.args.batch
        every = [(step, *row) for step, own in enumerate(rows, first) for row in own]
        drop = functools.partial(train.drop_condition, p=RECIPE.cond_drop)
        prompts = [drop(example, random.Random(f"{step} {number}"))[0]
                   for step, number, example in every]
        targets = [example.target for _, _, example in every]
        pixels = to_pixels(targets, device, getattr(torch, self.args.dtype))
        x0 = model.dcae.encode(pixels).float().split(batch)                 # (B, C, h, w) each
        n_layer = max(stack.n_layer for stack, _ in self.stacks)
        prefix = read_prefix(model.mllm, prompts, model.config.max_prompt, n_layer)
        order = torch.arange(len(every), device=device).split(batch)
        seeds = sorted({run.seed for run in self.runs})
        found = []
        for i, offset in enumerate(offsets):
            drawn = [noise_of_step(seed, first + i, x0[i].shape) for seed in seeds]
            times, eps = (torch.stack(tensors).to(device) for tensors in zip(*drawn))
            found.append(Inputs(x0[i], prefix.rows(order[i]), dict(zip(seeds, times)),
                                dict(zip(seeds, eps)), offset))
        return found

    def losses(self, inputs: Inputs):
        """Yields those of each stack, (N, B), with their graphs."""
        x0 = inputs.x0
        for stack, runs in self.stacks:
            t = torch.stack([inputs.times[run.seed] for run in runs])       # (N, B)
            eps = torch.stack([inputs.eps[run.seed] for run in runs])       # (N, B, C, h, w)
            t = torch.stack([sample.shifted(row, run.arm.shift) for row, run in zip(t, runs)])
            x_t, v = flow_matching(x0.repeat(len(runs), 1, 1, 1), t.flatten(), eps.flatten(0, 1))
            given = (inputs.prefix, x_t.view_as(eps), t, v.view_as(eps))
            if eps.is_cuda and stack.captured is None:
                stack.capture(*given)
            yield stack.losses(*given)

    def step(self, inputs: Inputs) -> list[Tensor]:
        """One step of every model -> of each stack the losses (N,)"""
        state = self.state
        found = []
        for losses in self.losses(inputs):
            losses = losses.mean(1)
            losses.sum().backward()
            found.append(losses.detach())
        for i in range(len(self.stacks)):
            clip_each([p for name, p in state.params.items() if name.startswith(f"{i}.")])
        given = dict(steps=self.args.steps, lr=self.args.lr)
        settings = types.SimpleNamespace(**vars(RECIPE) | given)
        for group in state.optimizer.param_groups:
            group["lr"] = train.learning_rate(state.step, settings)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.update_ema()
        state.weights.cast(state.params)
        state.step += 1
        state.seen += len(inputs.x0)
        state.history[-1] = (1, [inputs.offset])
        return found

    # ---- scores

    @torch.no_grad()
    def score(self, stack: Stack, prompts: list, grade: Callable) -> Tensor:
        """-> (N, prompts), 1 where the picture is right. The noise is that of lab.evaluate, for all
        models the same."""
        device = self.args.device
        at_once = max(1, AT_ONCE["cuda" if device.startswith("cuda") else "cpu"] // stack.n)
        found = []
        for i in range(0, len(prompts), at_once):
            part = prompts[i:i + at_once]
            eps = evaluate.noise([(case, 0) for case in part], 0, self.model.config, device)
            texts = [case.prompt for case in part]
            *_, last = sample.denoise(stack, texts * stack.n, eps=eps.repeat(stack.n, 1, 1, 1),
                                      conditioning=stack.conditioning(texts),
                                      steps=self.args.draw_steps, guidance=self.args.guidance)
            pictures = self.model.decode(last.x_t)
            found.append((len(part), grade(is_right, pictures, part * stack.n)))
        parts = [torch.tensor(list(right)).view(stack.n, n) for n, right in found]
        return torch.cat(parts, 1)

    def write_scores(self, prompts: list, grade: Callable) -> None:
        """Scores every model by these prompts, into its file. First all are scored, then all are
        written: runs that end together are finished together, or go on together."""
        self.check_finite()
        with ema_weights(self.state):
            found = [(run, row) for stack, runs in self.stacks
                     for run, row in zip(runs, self.score(stack, prompts, grade))]
        for run, row in found:
            scores = result(self.args, run)["scores"]
            scores[str(self.state.step)] = "".join(map(str, row.int().tolist()))
            about = dict(arm=dataclasses.asdict(run.arm), seed=run.seed, commit=self.commit)
            file = folder_of(self.args, run.arm.mllm) / f"{run.name}.json"
            write_json(file, about | dict(scores=scores))

    def check_finite(self) -> None:
        """ValueError where a model has become infinite or NaN."""
        if name := self.state.not_finite():
            raise ValueError(f"step {self.state.step}: {name} has values that are not finite; "
                             "take a smaller --lr")

    def save(self) -> None:
        """A checkpoint, unless this step has one."""
        self.check_finite()
        if self.state.step != self.state.saved:
            write_checkpoint(self.folder / "checkpoints", self.state, self.state.tensors(), keep=1)
        self.state.saved = self.state.step
        self.saved = time.monotonic()

    def train(self, looks: dict[int, list], grade: Callable, stop: Callable, bar) -> bool:
        """Until all steps are done, or stop() -> are they? looks: {step: prompts to score by}"""
        bar.update(self.state.step * len(self.runs))
        batches = self.batches()
        while self.state.step < self.args.steps and not stop():
            self.step(next(batches))
            bar.update(len(self.runs))
            if self.state.step in looks:
                self.write_scores(looks[self.state.step], grade)
            elif time.monotonic() - self.saved > SAVE_EVERY:
                self.save()
        if self.state.step >= self.args.steps:
            shutil.rmtree(self.folder, ignore_errors=True)
            return True
        self.save()
        return False


def is_right(picture, case) -> bool:
    return bool(evaluate.drawn(grader.grade(picture), case)["category"])


# ------------------------------------------------------------------------------------- all of them

def early(args) -> list:
    """The prompts that models are scored by along the way: the first of each category."""
    found = []
    for category in evaluate.GENEVAL:
        own = [case for case in cases(args) if (case.category, case.pairs) == (category, "seen")]
        found += own[:args.n_early]
    return found


def scored_at(args) -> list[int]:
    """The steps after which models are scored, the last one included; all where they are fewer."""
    looks = min(args.looks, args.steps)
    return [round(args.steps * (i + 1) / looks) for i in range(looks)]


def three_quarters(args) -> int | None:
    """Where the last quarter begins, as near as there is a look. None where there is none before
    the end."""
    *earlier, last = scored_at(args)
    return min(earlier, key=lambda step: abs(step - 0.75 * last), default=None)


def looks(args, runs: list[Run]) -> dict[int, list]:
    """{step: the prompts that runs are scored by there}: a few along the way; all where the last
    quarter begins, and where it ends."""
    every = cases(args)
    if not any(plan.scored_by_never_seen(run.arm) for run in runs):
        every = [case for case in every if case.pairs == "seen"]
    found = dict.fromkeys(scored_at(args), early(args)) | {args.steps: every}
    if start := three_quarters(args):
        found[start] = every
    return found


def groups_of(runs: list[Run], args) -> list[list[Run]]:
    """The runs that are not finished, by those that learn together: from the same examples, at most
    --together of them. (And finished ones, where their group has a checkpoint.)"""
    by_examples = {}
    for run in dict.fromkeys(runs):
        by_examples.setdefault(run.examples, []).append(run)
    groups = []
    for own in by_examples.values():
        for i in range(0, len(own), args.together):
            part = own[i:i + args.together]
            left = [run for run in part if not is_finished(args, run)]
            if left:
                # Those of a checkpoint go on together, even if some were written as finished.
                groups.append(part if checkpoints(group_folder(part, args)) else left)
    return groups


@contextlib.contextmanager
def claimed(folder: pathlib.Path):
    """Yields whether this group is ours: another process, given the same command, may be at it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(folder))
        # It may also have just finished, and taken the folder away.
        except (ValueError, FileNotFoundError):
            ours = False
        else:
            ours = True
        yield ours


def train_all(runs: list[Run], args, stop: Callable) -> bool:
    """Trains and scores the runs that are not finished, group by group, but those that another
    process is training -> are all finished now?"""
    groups = groups_of(runs, args)
    if not groups:
        return True
    n = sum(map(len, groups))
    # A fork would inherit locks of threads that it does not have.
    fresh = multiprocessing.get_context("spawn")
    # Ctrl-C reaches them, too: the models that they still grade are to be written.
    pool = concurrent.futures.ProcessPoolExecutor(args.jobs, fresh, ignore_signals, (0,))
    with (pool,
          tqdm(total=n * args.steps, unit="step", desc=f"{n} models", smoothing=0.05) as bar):
        grade = functools.partial(pool.map, chunksize=16) if args.jobs > 1 else map
        for own in groups:
            if stop():
                break
            # Another process may have finished it meanwhile.
            if all(is_finished(args, run) for run in own):
                continue
            with claimed(group_folder(own, args)) as ours:
                # Or just now.
                if ours and not all(is_finished(args, run) for run in own):
                    Group(own, args).train(looks(args, own), grade, stop, bar)
    return all(is_finished(args, run) for run in runs)
