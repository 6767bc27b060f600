"""The order of examples: how it is shuffled, how several processes share it, how a run resumes;
what is drawn at random for each; and a look at data before training on it:

    python -m engine.data 'shards-{000..123}.tar' --check --model weights --sheet out.png

prints a line of JSON for each record (its name, prompt and sizes of pictures, or what is wrong with
it), and a summary on stderr; the exit status is 1 if anything is wrong. Where examples come from:
engine/sources.py.
"""
import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from engine.checks import check_config, printable
from engine.command import Parser, count, one_line_errors, path, path_text
from engine.files import check_writable, read_json, save_png
from engine.limits import MAX_SIZE
from engine.loading import read_tokenizer
from engine.outputs import check_kind, check_name
from engine.pictures import contact_sheet, to_pixels
from engine.sources import Example, open_source, square

# --------------------------------------------------------------------------- one order for all

def shuffled(source, seed):
    """A source's locations without end, epoch after epoch. Each epoch passes through a pool: once
    it is full, every location that enters pushes out one of them at random. The pool holds
    locations, not pictures, so it can be deep, and skipping a million examples reads headers
    only."""
    for epoch in itertools.count():
        rng = random.Random(f"{seed} epoch {epoch}")
        pool = []
        for location in source.locations(rng):
            pool.append(location)
            if len(pool) > source.pool:
                i = rng.randrange(len(pool))
                pool[i], pool[-1] = pool[-1], pool[i]
                yield pool.pop()
        rng.shuffle(pool)
        yield from pool


def mixed(sources, weights, seed):
    """(source, location) without end: each time from one of the sources, in proportion to the
    weights."""
    rng = random.Random(f"{seed} mixture")
    streams = [shuffled(s, f"{seed} {i}") for i, s in enumerate(sources)]
    while True:
        i = rng.choices(range(len(sources)), weights)[0]
        yield sources[i], next(streams[i])


def skip_consumed(stream, world, offsets):
    """What is left of a stream that `world` processes shared, once each has come to its offset."""
    return (x for i, x in enumerate(stream) if i >= offsets[i % world])


class Share(torch.utils.data.IterableDataset):
    """One process's share of the one order of all examples: every `world`-th. Yields
    (position, number, example), or instead of a broken example a str that says what is wrong.

    history: [(world, [offset of each process]), ...], one entry for each number of processes so
    far, the last one for now. What was read before is left out, so no example is seen twice in an
    epoch, even if a run resumes with more or fewer processes. `number` is the example's number in
    the whole order, whichever process reads it; `position` is its position in what was left when
    this number of processes began, and offsets are such positions.
    """

    def __init__(self, sources, weights, seed, rank, history):
        self.sources = sources
        self.weights = weights
        self.seed = seed
        self.rank = rank
        self.history = history

    def __iter__(self):
        # All examples, each with its number, less those that earlier processes read.
        stream = enumerate(mixed(self.sources, self.weights, self.seed))
        for world, offsets in self.history[:-1]:
            stream = skip_consumed(stream, world, offsets)

        # Every world-th of them, from this process's offset on.
        world, offsets = self.history[-1]
        mine = itertools.islice(enumerate(stream), self.rank, None, world)
        mine = itertools.dropwhile(lambda x: x[0] < offsets[self.rank], mine)

        # The worker processes of a DataLoader take turns.
        worker = torch.utils.data.get_worker_info()
        if worker:
            mine = itertools.islice(mine, worker.id, None, worker.num_workers)

        for position, (number, (origin, location)) in mine:
            try:
                yield position, number, origin.read(location)
            except (ValueError, OSError) as e:
                # Names and texts from files may hold what cannot be printed, or should not be.
                yield position, number, printable(e, 1000)


def ignore_signals(worker):
    """For worker processes. A signal to all processes at once (Ctrl-C) is for the main one to
    answer: it needs its workers until it has saved. A second SIGTERM, as from a main process that
    cannot wait for a long read, ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def check_sendable(share, workers: int) -> None:
    """ValueError where worker processes would have to be sent what cannot be sent. (Only those that
    begin as a copy of this process, by "fork", need not: Linux up to Python 3.13.)"""
    if not workers or multiprocessing.get_start_method() == "fork":
        return
    # As multiprocessing does it. What an object raises that cannot be sent is its own affair.
    try:
        sent = bytes(ForkingPickler.dumps(share))
        if not hasattr(sys.modules["__main__"], "__file__") and b"__main__" in sent:
            raise ValueError("what is defined in a notebook, another process does not have")
    except Exception as e:
        raise ValueError(f"--workers {workers}: a source cannot be sent to another process ({e}). "
                         "Make examples with a function that stands at the top of a file, not with "
                         "a lambda or a function inside a function, or take --workers 0") from None


class Reader:
    """Yields (number, example) of a Share, good ones only. Broken records are listed in `bad`.
    `offset` is where to resume: the position after the last example read."""

    def __init__(self, share, workers=0, max_bad=0.01):
        self.share = share
        self.workers = workers
        self.max_bad = max_bad
        self.bad = []
        self.seen = 0
        _, offsets = share.history[-1]
        self.offset = offsets[share.rank]

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        """ValueError with the list of broken records if they are too many."""
        check_sendable(self.share, self.workers)
        bad_in_a_row = 0
        for position, number, example in self.records():
            self.seen += 1
            self.offset = position + 1
            if isinstance(example, str):
                self.bad.append(example)
                bad_in_a_row += 1
                if bad_in_a_row == 1000 or self.too_many_bad():
                    message = (f"{len(self.bad)} of {self.seen} records are broken, "
                               "more than --max-bad allows, or a thousand in a row:")
                    raise ValueError("\n".join([message, *self.bad]))
            else:
                bad_in_a_row = 0
                yield number, example

    def records(self) -> Iterator[tuple]:
        """What the share gives, read by worker processes or by this one."""
        loader = torch.utils.data.DataLoader(self.share, batch_size=None, num_workers=self.workers,
                                             worker_init_fn=ignore_signals)
        try:
            yield from loader
        except (ValueError, OSError) as e:
            if not self.workers:
                raise
            # A worker's error has its whole traceback for a text: what it says is the last line.
            said = str(e).strip().splitlines()[-1].partition(": ")[2]
            raise (OSError if isinstance(e, OSError) else ValueError)(said) from None

    def too_many_bad(self) -> bool:
        """More than chance explains if the fraction `max_bad` of all records were broken: beyond
        three standard deviations above the mean, and two more for the beginning."""
        mean = self.max_bad * self.seen
        return len(self.bad) > mean + 3 * mean ** 0.5 + 2


# --------------------------------------------------------------------------- noise and latents

def times_and_noise(rngs, shape, device) -> tuple[Tensor, Tensor]:
    """Times (B,), uniform in (0, 1], and standard normal noise (B, *shape), each row from its own
    random.Random."""
    t = torch.tensor([1 - rng.random() for rng in rngs])
    rows = []
    for rng in rngs:
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        rows.append(torch.randn(shape, generator=generator))
    return t.to(device), torch.stack(rows).to(device)


# What a cache of latents is called, and the files in it; the number is of a process that writes.
LATENTS_FOLDER = re.compile(r"[0-9a-f]{16}")
LATENTS_FILE = re.compile(r"[0-9a-f]{32}\.(safetensors|\d+)")


def remove_latents(folder: pathlib.Path) -> None:
    """Deletes a cache of latents: the files that were written there, and the folder if nothing else
    is in it. What has another name was not written by this program, and stays."""
    if not LATENTS_FOLDER.fullmatch(folder.name) or folder.is_symlink():
        return
    # Another process may delete it at the same time.
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            if LATENTS_FILE.fullmatch(file.name):
                file.unlink(missing_ok=True)
        folder.rmdir()


class Latents(nn.Module):
    """Pictures -> latents by the autoencoder. With --cache-latents it runs once per picture, and
    the result is kept in --out/latents, in a folder named after size, dtype, autoencoder and its
    weights: where one of them changes, the old folder no longer fits and is deleted."""

    def __init__(self, model, args):
        super().__init__()
        self.device = args.device
        self.dtype = getattr(torch, args.dtype)
        side = args.size // model.config.dcae.factor
        self.shape = (model.config.dcae.latent_channels, side, side)
        self.folder = None
        if args.cache_latents:
            digest = hashlib.sha256(f"{args.size} {args.dtype} {model.config.dcae}".encode())
            for weight in model.dcae.state_dict().values():
                digest.update(weight.float().cpu().numpy().tobytes())
            self.folder = args.out / "latents" / digest.hexdigest()[:16]
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.parent.iterdir():
                if old != self.folder:
                    remove_latents(old)

    def file(self, name: str) -> pathlib.Path:
        digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"

    def known(self, name: str) -> Tensor | None:
        """The latents of a record's picture, if they are cached."""
        if not self.folder:
            return None
        try:
            x0 = load_file(self.file(name))["x0"]
        # The file does not exist, or it is damaged: then it is written anew.
        except (OSError, SafetensorError, KeyError):
            return None
        return x0 if x0.shape == self.shape and x0.isfinite().all() else None

    def keep(self, name: str, x0: Tensor):
        """Cache latents. The file gets its name once it is complete."""
        file = self.file(name)
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file({"x0": x0.contiguous()}, unfinished)
        os.replace(unfinished, file)

    @torch.no_grad()
    def forward(self, model, examples: list[Example]) -> Tensor:
        """-> latents (B, C, h, w) of the targets; a target may be latents already."""
        targets = [example.target for example in examples]
        new = [i for i, target in enumerate(targets) if not isinstance(target, Tensor)]
        if new:
            pixels = to_pixels([targets[i] for i in new], self.device, self.dtype)
            for i, x0 in zip(new, model.dcae.encode(pixels)):
                targets[i] = x0
                # A generated example has no name and never comes again.
                if self.folder and examples[i].name:
                    self.keep(examples[i].name, x0)
        return torch.stack([x0.to(self.device) for x0 in targets])


# ----------------------------------------------------------------------- look before you train

# Pictures on a sheet, and their side.
SHOWN = 16
SHOWN_SIDE = 128
# Pictures to start from that a sheet shows of one record.
SHOWN_SOURCES = 3
CONTROL = re.compile(r"<\|\w+\|>")


class Summary:
    """What is counted while the records pass: broken ones by reason, prompts, pictures."""

    def __init__(self, args):
        self.args = args
        self.tokenizer = None
        if args.model:
            self.tokenizer = read_tokenizer(args.model / "tokenizer.json")
            file = args.model / "config.json"
            self.max_prompt = check_config(read_json(file), file)["max_prompt"]
        self.began = time.time()
        self.records = 0
        self.n_usable = 0
        self.n_pictures = 0
        self.broken = collections.Counter()
        self.tokens = collections.Counter()
        self.sizes = collections.Counter()
        self.control = collections.Counter()
        # A sample of the records, for the sheet: (pictures, labels) each.
        self.shown = []

    def add_broken(self, error: Exception) -> None:
        self.records += 1
        self.broken[getattr(error, "reason", type(error).__name__)] += 1

    def add(self, example: Example) -> None:
        self.records += 1
        self.n_pictures += 1 + len(example.images)
        self.sizes[example.target.size] += 1
        self.control.update(set(CONTROL.findall(example.prompt)))
        if self.tokenizer:
            self.tokens[len(self.tokenizer.encode(example.prompt))] += 1
        self.n_usable += 1
        # Each record has the same chance to be among those that are shown.
        place = self.n_usable - 1
        if place >= SHOWN:
            place = random.Random(place).randrange(self.n_usable)
        if self.args.sheet and place < SHOWN:
            self.shown[place:place + 1] = [self.show(example)]

    def show(self, example: Example) -> tuple[list, list]:
        """What the sheet shows of a record: the pictures, small, and a label for each."""
        target = example.target
        if self.args.size:
            target = square(target, self.args.size)
        pictures = [*example.images[:SHOWN_SOURCES], target]
        side = (SHOWN_SIDE, SHOWN_SIDE)
        small = [ImageOps.contain(picture, side, Image.Resampling.BICUBIC) for picture in pictures]
        return small, ["from"] * (len(pictures) - 1) + [example.prompt]

    def sheet(self) -> Image.Image:
        pictures = [picture for pictures, _ in self.shown for picture in pictures]
        labels = [label for _, labels in self.shown for label in labels]
        return contact_sheet(pictures, labels, columns=min(8, len(pictures)),
                             size=(SHOWN_SIDE, SHOWN_SIDE))

    def lines(self) -> list[str]:
        n_broken = sum(self.broken.values())
        speed = self.n_pictures / max(time.time() - self.began, 1e-9)
        found = [f"{self.records} records, {n_broken} of them broken; {speed:.0f} pictures/s"]
        found += [f"  {n:7} broken: {reason}" for reason, n in self.broken.most_common(20)]
        if self.tokens:
            cut = sum(n for length, n in self.tokens.items() if length > self.max_prompt)
            found.append(f"tokens of a prompt: {spread(self.tokens)}; {cut} prompts have more than "
                         f"{self.max_prompt}, which is all that is read")
        for token, n in self.control.most_common(5):
            found.append(f"prompts that hold {printable(token)}, which is read as a control token: "
                         f"{n}")
        if self.sizes:
            sides = collections.Counter()
            for size, n in self.sizes.items():
                sides[min(size)] += n
            found.append(f"shorter side of a picture to draw: {spread(sides)}{self.enlarged()}")
            most = self.sizes.most_common(3)
            found.append("most frequent: " + ", ".join(f"{w}x{h} ({n})" for (w, h), n in most))
        return found

    def enlarged(self) -> str:
        side = self.args.size
        if not side:
            return ""
        small = sum(n for size, n in self.sizes.items() if min(size) < side)
        return f"; {small} are smaller than {side} and will be enlarged"


def spread(counts: collections.Counter) -> str:
    """{value: how often} -> the range and the median, in words."""
    middle = sum(counts.values()) / 2
    passed = itertools.accumulate(n for _, n in sorted(counts.items()))
    median = next(value for value, n in zip(sorted(counts), passed) if n >= middle)
    return f"{min(counts)} to {max(counts)}, median {median}"


def told(example: Example) -> dict:
    """A record as a row of JSON."""
    sizes = ["{}x{}".format(*image.size) for image in (*example.images, example.target)]
    return dict(name=example.name, prompt=example.prompt, sources=sizes[:-1], target=sizes[-1])


def check_sheet(file: pathlib.Path, spec: str) -> None:
    """ValueError where it could not be written, or something would be lost."""
    check_name("--sheet", file)
    check_kind(file)
    if file.exists() and pathlib.Path(spec).resolve() in file.resolve().parents:
        raise ValueError(f"--sheet {file} may be one of the pictures to read, and would be lost: "
                         "give another name")
    if not file.parent.is_dir():
        raise ValueError(f"--sheet {file}: there is no folder {file.parent}")
    check_writable(file.parent)


def check(args) -> int:
    """Reads every record as training does, and prints what it finds. -> the exit status"""
    if args.sheet:
        check_sheet(args.sheet, args.spec)
    source = open_source(args.spec, {}, 0)
    summary = Summary(args)
    bar = tqdm(source.locations(), "records", disable=sys.stdout.isatty() or None)
    for number, location in enumerate(bar):
        try:
            example = source.read(location)
            row = told(example)
            summary.add(example)
        except (ValueError, OSError) as e:
            where = getattr(e, "where", f"record {number}")
            row = dict(name=str(where), error=printable(e, 1000))
            summary.add_broken(e)
        print(json.dumps(row))
    print("\n".join(summary.lines()), file=sys.stderr)
    if args.sheet and summary.shown:
        save_png(summary.sheet(), args.sheet)
        print(f"wrote {args.sheet}", file=sys.stderr)
    return 1 if summary.broken or not summary.records else 0


def options(argv=None) -> argparse.Namespace:
    p = Parser(prog="python -m engine.data", description=__doc__)
    p.add_argument("spec", type=path_text,
                   help="as for --data of train.py: a folder, a tar, 'a-{000..123}.tar'")
    p.add_argument("--check", action="store_true", required=True, help="read every record")
    p.add_argument("--size", type=count(1, MAX_SIZE), help="side that training will have: tells "
                   "which pictures are smaller, and shows on the sheet how they are cropped")
    p.add_argument("--model", type=path, help="folder whose tokenizer counts tokens")
    p.add_argument("--sheet", type=path, metavar="FILE",
                   help=f"also write a picture (PNG) of {SHOWN} records, drawn by lot")
    return p.parse_args(argv)


def main() -> None:
    args = options()
    with one_line_errors():
        try:
            status = check(args)
        # Whoever reads the lines has seen enough.
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 1
    raise SystemExit(status)


if __name__ == "__main__":
    main()
