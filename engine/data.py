"""Examples to learn from: where they come from (generated, or pictures with texts in tars or in a
folder), in which order they come, how several processes share them, and how a run resumes.

A source has `locations(rng)`, which yields where its records are, and `read(location)`, which turns
one into an Example. A broken record is skipped and reported. Nothing is extracted from a tar, and
at most one record at a time is in memory.
"""
import glob
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.pictures import open_image, to_pixels

# Suffixes of pictures in tars.
KINDS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Example:
    """prompt: the text. images: the pictures it refers to (none: text to image). target: the
    picture to draw, or its latents. name: the record's, for logs and caches; generated examples
    have none."""

    prompt: str
    images: tuple
    target: Image.Image | Tensor
    name: str = ""


# ------------------------------------------------------------------------------------- sources

class Generated:
    """An endless source: example i is make(rng, i). Its rng depends on (seed, i) alone, so there is
    nothing to shuffle."""

    pool = 0

    def __init__(self, make, seed):
        self.make = make
        self.seed = seed

    def locations(self, rng):
        return itertools.count()

    def read(self, i: int) -> Example:
        return self.make(random.Random(f"{self.seed} {i}"), i)


class Pictures:
    """What the two sources of real data share: records refer to files, and every picture becomes a
    square, resized to its shorter side and cropped at the centre.

    latents: a function from a record's name to the latents of its target, or to None; what it
    returns takes the target's place."""

    # Locations to shuffle among, see `shuffled`.
    pool = 10_000

    def __init__(self, size, latents=None):
        self.size = size
        self.latents = latents

    def square(self, file, name: str) -> Image.Image:
        image = open_image(file, name)
        return ImageOps.fit(image, (self.size, self.size), Image.Resampling.BICUBIC)

    def example(self, name, text, sources, target) -> Example:
        """text: str or UTF-8 bytes; sources: list of files; target: a file. ValueError where one of
        them is missing or broken."""
        if not isinstance(text, str | bytes):
            raise ValueError(f"{name}: the record has no text")
        if target is None:
            raise ValueError(f"{name}: the record has no picture to draw")
        try:
            # A str, too, is checked: JSON can hold what UTF-8 cannot, such as "\ud800".
            encoded = text.encode() if isinstance(text, str) else text
            text = encoded.decode()
        except UnicodeError:
            raise ValueError(f"{name}: the text is not UTF-8") from None
        known = self.latents(name) if self.latents else None
        images = tuple(self.square(file, f"{name}, source") for file in sources)
        if known is None:
            return Example(text, images, self.square(target, f"{name}, target"), name)
        return Example(text, images, known, name)


def key_suffix(name: str) -> tuple[str, str]:
    """'train/0001.source.jpg' -> ('train/0001', 'source.jpg'): a record's key, and which part of
    the record this is."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return folder + slash + key, suffix.lower()


class Tars(Pictures):
    """webdataset tars: the members of a record share their name up to the first dot. `txt` and
    `jpg` (jpeg, png, webp); for editing `txt`, `source.jpg` (or source0.jpg, source1.jpg, ...) and
    `target.jpg`. Read in place, nothing is ever extracted."""

    def __init__(self, files: list[str], size, latents=None):
        super().__init__(size, latents)
        self.files = files

    def locations(self, rng):
        """(file, key, {suffix: (offset, bytes)}) of every record, tar by tar in random order; only
        headers are read."""
        for file in rng.sample(self.files, len(self.files)):
            try:
                with tarfile.open(file, "r:") as tar:
                    for key, parts in self.records(tar):
                        # A key may occur twice, so the name says where the record begins.
                        start, _ = next(iter(parts.values()))
                        yield file, f"{key}, byte {start}", parts
            except tarfile.TarError as e:
                # A record without parts: reading it fails with this message.
                yield file, f"damaged tar, the rest of it is lost: {e}", {}

    def records(self, tar):
        """(key, {suffix: (offset, bytes)}) of every record: neighbours with the same key."""
        for key, members in itertools.groupby(self.members(tar), lambda m: key_suffix(m.name)[0]):
            parts = {}
            for member in members:
                suffix = key_suffix(member.name)[1]
                parts[suffix] = member.offset_data, member.size
            yield key, parts

    @staticmethod
    def members(tar):
        """The files in a tar. tarfile.TarError where it is damaged."""
        while member := tar.next():
            # tarfile remembers all members, which are too many in a long stream.
            tar.members.clear()
            if member.isfile():
                yield member
        # tarfile takes a broken header for the end, but the end is a block of zeros.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"byte {tar.offset} begins neither a header nor the end mark")

    def read(self, location) -> Example:
        file, key, parts = location
        text = None
        pictures = {}
        with open(file, "rb") as f:
            for part, (offset, size) in parts.items():
                f.seek(offset)
                content = f.read(size)
                # "source.jpg" is a picture with the role "source", "jpg" one with the role "".
                role, _, kind = part.rpartition(".")
                if part == "txt":
                    text = content
                else:
                    pictures[role if kind in KINDS else part] = io.BytesIO(content)
        # By length first, so that source10 comes after source9.
        roles = sorted(pictures, key=lambda role: (len(role), role))
        sources = [pictures[role] for role in roles if role.startswith("source")]
        target = pictures.get("target", pictures.get(""))
        return self.example(f"{file}: {key}", text, sources, target)


class Folder(Pictures):
    """A folder with metadata.jsonl, like Hugging Face's imagefolder: `text` and `file_name`; for
    editing `text`, `source` (one name or a list) and `target`."""

    def __init__(self, folder: pathlib.Path, size, latents=None):
        super().__init__(size, latents)
        self.folder = folder

    def locations(self, rng):
        """The byte at which each line begins."""
        start = 0
        with open(self.folder / "metadata.jsonl", "rb") as f:
            for line in f:
                if line.strip():
                    yield start
                start += len(line)

    def read(self, start: int) -> Example:
        file = self.folder / "metadata.jsonl"
        with open(file, "rb") as f:
            f.seek(start)
            line = f.readline()
        try:
            row = dict(json.loads(line))
            target = row.get("target", row.get("file_name"))
            sources = row.get("source", [])
            if isinstance(sources, str):
                sources = [sources]
            if not all(isinstance(name, str) for name in (target, *sources)):
                raise ValueError("source, and target or file_name, must be names of files")
        except (ValueError, TypeError) as e:
            raise ValueError(f"{file}, byte {start}: {e}") from None
        target = self.folder / target
        sources = [self.folder / name for name in sources]
        return self.example(str(target), row.get("text"), sources, target)


def source(spec: str, makers: dict, seed: int, size: int, latents=None):
    """What --data names: one of `makers` ({word: make(rng, i) -> Example}), a folder with
    metadata.jsonl, a folder of tars, a tar, 'shards-{000..123}.tar' or 'a*.tar'. ValueError if no
    record in it can be read."""
    if spec in makers:
        return Generated(makers[spec], seed)
    if (pathlib.Path(spec) / "metadata.jsonl").is_file():
        found = Folder(pathlib.Path(spec), size, latents)
    else:
        found = Tars(tar_files(spec, makers), size, latents)
    check_readable(found, spec)
    return found


def tar_files(spec: str, makers: dict) -> list[str]:
    """The tars that `spec` names, see `source`. ValueError where there are none."""
    patterns = [spec]
    if pathlib.Path(spec).is_dir():
        patterns = [glob.escape(spec) + "/*.tar"]
    # "{000..123}" counts, with as many digits as its first number has.
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", spec):
        first, last = span.groups()
        numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        patterns = [spec[:span.start()] + number + spec[span.end():] for number in numbers]
    files = []
    missing = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        files += found
        if not found:
            missing.append(pattern)
    if missing:
        raise ValueError(f"--data {spec}: no such files: {missing[:3]}; expected tars, "
                         f"a folder with metadata.jsonl, or one of {list(makers)}")
    return files


def check_readable(found, spec: str):
    """ValueError with the first ten reasons if a source holds no record that can be read."""
    reasons = []
    for location in found.locations(random.Random(0)):
        try:
            found.read(location)
            return
        except ValueError as e:
            reasons.append(str(e))
    message = f"--data {spec}: not one record in it can be read"
    raise ValueError("\n".join([message, *reasons[:10]]))


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
                # The name of a file may hold bytes that are no text; they could not be printed.
                message = str(e).encode(errors="backslashreplace").decode()
                yield position, number, message


def ignore_signals(worker):
    """For worker processes. A signal to all processes at once (Ctrl-C) is for the main one to
    answer: it needs its workers until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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
        loader = torch.utils.data.DataLoader(self.share, batch_size=None, num_workers=self.workers,
                                             worker_init_fn=ignore_signals)
        bad_in_a_row = 0
        for position, number, example in loader:
            self.seen += 1
            self.offset = position + 1
            if isinstance(example, str):
                self.bad.append(example)
                bad_in_a_row += 1
                if bad_in_a_row == 1000 or self.too_many_bad():
                    message = (f"{len(self.bad)} of {self.seen} records are broken, "
                               "more than --max-bad allows:")
                    raise ValueError("\n".join([message, *self.bad]))
            else:
                bad_in_a_row = 0
                yield number, example

    def too_many_bad(self) -> bool:
        """More than chance explains if the fraction `max_bad` of all records were broken: beyond
        three standard deviations above the mean, and two more for the beginning."""
        mean = self.max_bad * self.seen
        return len(self.bad) > mean + 3 * mean ** 0.5 + 2


# --------------------------------------------------------------------------- noise and latents

def noise(rngs, shape, device) -> tuple[Tensor, Tensor]:
    """Times (B,), uniform in (0, 1], and standard normal noise (B, *shape), each row from its own
    random.Random."""
    t = torch.tensor([1 - rng.random() for rng in rngs])
    rows = []
    for rng in rngs:
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        rows.append(torch.randn(shape, generator=generator))
    return t.to(device), torch.stack(rows).to(device)


class Latents(nn.Module):
    """Pictures -> latents by the autoencoder. With --cache-latents it runs once per picture, and
    the result is kept in --out/latents, in a folder named after size, dtype, autoencoder and its
    weights: where one of them changes, the old folder no longer fits and is deleted."""

    def __init__(self, model, args):
        super().__init__()
        self.device = args.device
        self.dtype = getattr(torch, args.dtype)
        self.folder = None
        if args.cache_latents:
            digest = hashlib.sha256(f"{args.size} {args.dtype} {model.config.dcae}".encode())
            for weight in model.dcae.state_dict().values():
                digest.update(weight.float().cpu().numpy().tobytes())
            self.folder = args.out / "latents" / digest.hexdigest()[:16]
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.parent.iterdir():
                if old != self.folder:
                    shutil.rmtree(old, ignore_errors=True)

    def file(self, name: str) -> pathlib.Path:
        digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"

    def known(self, name: str) -> Tensor | None:
        """The latents of a record's picture, if they are cached."""
        if not self.folder:
            return None
        try:
            return load_file(self.file(name))["x0"]
        # The file does not exist, or a crash cut it short.
        except (OSError, SafetensorError):
            return None

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
