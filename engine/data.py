"""Examples to learn from: of the toy world, or pictures with texts in tars or in a folder. One order of them for all processes. At the end,
pictures as numbers: pixels, latents that are kept; and sheets to look at.

Every reader skips what is broken and says so. Nothing is extracted from a tar, and no more than a record at a time is held.
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
import textwrap
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

KINDS = ("jpg", "jpeg", "png", "webp")                                          # of pictures in real data


@dataclass(frozen=True)
class Example:
    """A prompt, the pictures it speaks of (none: text to image), the picture to draw (or its latents), the record's name for logs and caches."""
    prompt: str
    images: tuple
    target: Image.Image
    name: str = ""


class Toy:
    """An endless source: example i is make(rng, i), with an rng from (seed, i) alone, so there is nothing to shuffle."""
    pool = 0

    def __init__(self, make, seed):
        self.make, self.seed = make, seed

    def locations(self, rng):
        return itertools.count()

    def read(self, i):
        return self.make(random.Random(f"{self.seed} {i}"), i)


def flat(image):
    """RGB. What is transparent becomes white (its hidden colour is often black), 16 bits become 8."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its values are floats, of which nobody says what is white")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def open_image(file, name=None):
    """An upright RGB picture from a path or an open file. ValueError if it cannot be read, or is so large that it may be an attack."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return flat(ImageOps.exif_transpose(Image.open(file)))              # upright, as a viewer shows it
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"{name or file}: picture has more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Exception as e:                                                      # decoders raise all sorts of things on damaged bytes
        raise ValueError(f"{name or file} is not a readable picture: {e}") from None


class Pictures:
    """What the two real sources share: records hold files, and every picture becomes a square, shorter side first, cut at the centre."""
    pool = 10_000                                                               # records among which the next one is drawn

    def __init__(self, size, latents=None):
        self.size, self.latents = size, latents                                 # latents(name) -> what to use instead of the target

    def square(self, file, name):
        return ImageOps.fit(open_image(file, name), (self.size, self.size), Image.Resampling.BICUBIC)

    def example(self, name, text, sources, target):
        """text: str or UTF-8; sources: list of files; target: a file. ValueError where one of them is missing or broken."""
        if not isinstance(text, str | bytes) or target is None:
            raise ValueError(f"{name}: the record has no {'picture to draw' if isinstance(text, str | bytes) else 'text'}")
        try:
            text = (text.encode() if isinstance(text, str) else text).decode()  # JSON can hold what UTF-8 cannot: "\ud800"
        except UnicodeError:
            raise ValueError(f"{name}: the text is not UTF-8") from None
        known = self.latents(name) if self.latents else None
        sources = tuple(self.square(f, f"{name}, source") for f in sources)
        return Example(text, sources, self.square(target, f"{name}, target") if known is None else known, name)


def key_suffix(name):
    """'train/0001.source.jpg' -> ('train/0001', 'source.jpg'): a record's key, and which part of it this is."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return folder + slash + key, suffix.lower()


class Tars(Pictures):
    """webdataset tars: the members of a record share their name up to the first dot. `txt` and `jpg` (jpeg, png, webp); for editing `txt`,
    `source.jpg` (or source0.jpg, source1.jpg, ...) and `target.jpg`. Read where they lie, nothing is ever extracted."""

    def __init__(self, files, size, latents=None):
        super().__init__(size, latents)
        self.files = files

    def locations(self, rng):
        """(file, key, {suffix: (offset, bytes)}) of every record, tar by tar in random order; only headers are read."""
        for file in rng.sample(self.files, len(self.files)):
            try:
                with tarfile.open(file, "r:") as tar:
                    for key, members in itertools.groupby(self.members(tar), lambda m: key_suffix(m.name)[0]):
                        parts = {key_suffix(m.name)[1]: (m.offset_data, m.size) for m in members}
                        yield file, f"{key}, byte {next(iter(parts.values()))[0]}", parts       # a key may come again
            except tarfile.TarError as e:
                yield file, f"damaged tar, the rest of it is lost: {e}", {}

    @staticmethod
    def members(tar):
        while member := tar.next():
            tar.members.clear()                                                 # tarfile remembers all of them, in a stream too many
            if member.isfile():
                yield member
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):     # tarfile takes a broken header for the end
            raise tarfile.ReadError(f"at byte {tar.offset} is neither a header nor the mark of the end")

    def read(self, location):
        file, key, parts = location
        name, found = f"{file}: {key}", {}
        with open(file, "rb") as f:
            for part, (offset, size) in parts.items():
                f.seek(offset)
                role, _, kind = part.rpartition(".")
                found[role if kind in KINDS else part] = f.read(size)
        pictures = {role: io.BytesIO(content) for role, content in found.items() if role != "txt"}
        sources = [pictures[role] for role in sorted(pictures, key=lambda r: (len(r), r)) if role.startswith("source")]      # source10 after source9
        return self.example(name, found.get("txt"), sources, pictures.get("target", pictures.get("")))


class Folder(Pictures):
    """A folder with metadata.jsonl, as Hugging Face's imagefolder has it: `text` and `file_name`; for editing `text`, `source` (one or a list)
    and `target`."""

    def __init__(self, folder, size, latents=None):
        super().__init__(size, latents)
        self.folder = folder

    def locations(self, rng):
        """The offset of every line."""
        offset = 0
        with open(self.folder / "metadata.jsonl", "rb") as f:
            for line in f:
                if line.strip():
                    yield offset
                offset += len(line)

    def read(self, offset):
        file = self.folder / "metadata.jsonl"
        with open(file, "rb") as f:
            f.seek(offset)
            try:
                row = dict(json.loads(f.readline()))
                target, sources = row.get("target", row.get("file_name")), row.get("source", [])
                sources = [sources] if isinstance(sources, str) else sources
                if not all(isinstance(x, str) for x in (target, *sources)):
                    raise ValueError("source, and target or file_name, must be names of files")
            except (ValueError, TypeError) as e:
                raise ValueError(f"{file}, byte {offset}: {e}") from None
        return self.example(str(self.folder / target), row.get("text"), [self.folder / s for s in sources], self.folder / target)


def source(spec, toys, seed, size, latents=None):
    """What --data names: one of `toys`, a folder with metadata.jsonl, a folder of tars, a tar, 'shards-{000..123}.tar' or 'a*.tar'.
    ValueError if it holds nothing that can be read."""
    if spec in toys:
        return Toy(toys[spec], seed)
    path = pathlib.Path(spec)
    if (path / "metadata.jsonl").is_file():
        found = Folder(path, size, latents)
    else:
        files = [glob.escape(spec) + "/*.tar"] if path.is_dir() else [spec]
        if span := re.search(r"\{(\d+)\.\.(\d+)\}", spec):
            first, last = span.groups()
            files = [spec[:span.start()] + f"{i:0{len(first)}d}" + spec[span.end():] for i in range(int(first), int(last) + 1)]
        every = {f: [f] if os.path.isfile(f) else sorted(glob.glob(f)) for f in files}
        if missing := [f for f, there in every.items() if not there]:
            raise ValueError(f"--data {spec}: no such files: {missing[:3]}; expected tars, a folder with metadata.jsonl, or one of {list(toys)}")
        found = Tars(sum(every.values(), []), size, latents)
    wrong = []
    for location in found.locations(random.Random(0)):
        try:
            found.read(location)
            return found
        except ValueError as e:
            wrong.append(str(e))
    raise ValueError("\n".join([f"--data {spec}: there is not one record in it that can be read", *wrong[:10]]))


# ---------------------------------------------------------------- one order of examples for all processes, and each one's share of it

def shuffled(source, seed):
    """A source's locations without end, epoch after epoch, each through a pool that gives out one at random for one that enters. The pool
    holds places, not pictures, so it can be deep, and to pass over a million examples only headers are read."""
    for epoch in itertools.count():
        rng, pool = random.Random(f"{seed} epoch {epoch}"), []
        for location in source.locations(rng):
            pool.append(location)
            if len(pool) > source.pool:
                i = rng.randrange(len(pool))
                pool[i], pool[-1] = pool[-1], pool[i]
                yield pool.pop()
        rng.shuffle(pool)
        yield from pool


def mixed(sources, weights, seed):
    """(source, location) without end: each time one of the sources, as often as its weight says."""
    rng, streams = random.Random(f"{seed} mixture"), [shuffled(s, f"{seed} {i}") for i, s in enumerate(sources)]
    while True:
        i, = rng.choices(range(len(sources)), weights)
        yield sources[i], next(streams[i])


def unread(stream, world, reached):
    """What `world` processes left of a stream when each had come as far as `reached` says."""
    return (x for i, x in enumerate(stream) if i >= reached[i % world])


class Share(torch.utils.data.IterableDataset):
    """One process's part of the one order of all examples: every `world`-th. Yields (place, number, example or what is wrong with it).

    past: [(world, [how far each process came]), ...], one entry for each number of processes so far, the last one for now: what was read
    is left out, so nobody sees an example twice in an epoch, even if a run goes on with more or fewer processes. `number` is the
    example's in the whole order, whoever reads it; `place` is its place in what was left when this number of processes began.
    """

    def __init__(self, sources, weights, seed, rank, past):
        self.sources, self.weights, self.seed, self.rank, self.past = sources, weights, seed, rank, past

    def __iter__(self):
        stream = enumerate(mixed(self.sources, self.weights, self.seed))
        for world, reached in self.past[:-1]:
            stream = unread(stream, world, reached)
        world, reached = self.past[-1]
        mine = itertools.islice(enumerate(stream), self.rank, None, world)
        mine = itertools.dropwhile(lambda x: x[0] < reached[self.rank], mine)
        worker = torch.utils.data.get_worker_info()                             # helpers of a process take turns
        for place, (number, (source, location)) in itertools.islice(mine, worker.id if worker else 0, None, worker.num_workers if worker else 1):
            try:
                yield place, number, source.read(location)
            except (ValueError, OSError) as e:
                yield place, number, str(e).encode(errors="backslashreplace").decode()          # names of files may be no text


def deaf(worker):
    """A signal to all processes at once is for the first one to answer: it needs its helpers until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Reader:
    """Yields (number, example), good ones only. A broken record is counted and named in `bad`. ValueError with the list after a thousand in a row,
    or more than would come by chance if the part `max_bad` of all records were broken: three standard deviations above the mean, and two to
    begin with. `reached` is the place to go on from."""

    def __init__(self, share, workers=0, max_bad=0.01):
        self.share, self.workers, self.max_bad, self.bad, self.seen = share, workers, max_bad, [], 0
        self.reached = share.past[-1][1][share.rank]

    def __iter__(self):
        loader, in_a_row = torch.utils.data.DataLoader(self.share, batch_size=None, num_workers=self.workers, worker_init_fn=deaf), 0
        for place, number, example in loader:
            self.seen, self.reached = self.seen + 1, place + 1
            if not isinstance(example, str):
                in_a_row = 0
                yield number, example
                continue
            self.bad.append(example)
            in_a_row, mean = in_a_row + 1, self.max_bad * self.seen
            if len(self.bad) > mean + 3 * mean ** 0.5 + 2 or in_a_row == 1000:
                raise ValueError("\n".join([f"{len(self.bad)} of {self.seen} records are broken, more than --max-bad allows:", *self.bad]))


def noise(rngs, shape, device):
    """Times (B,), uniform in (0, 1], and standard normal noise (B, *shape), each row from its own random.Random."""
    t = torch.tensor([1 - r.random() for r in rngs])
    eps = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.getrandbits(63))) for r in rngs])
    return t.to(device), eps.to(device)


# ---------------------------------------------------------------- pictures as numbers

def to_pixels(images, device, dtype=torch.float32):
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    x = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(0, 3, 1, 2)
    return (x.to(device) / 127.5 - 1).to(dtype)


def to_images(pixels):
    """(B, 3, H, W) in [-1, 1], or a little outside -> list of PIL images."""
    pixels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


class Latents(nn.Module):
    """Pictures -> latents by the autoencoder; with --cache-latents once per picture, then from a file in --out/latents. The folder there is named
    after size, dtype, autoencoder and its weights: where one of them changes, nothing old is found, and it is thrown away."""

    def __init__(self, model, a):
        super().__init__()
        self.folder, self.device, self.dtype = None, a.device, getattr(torch, a.dtype)
        if a.cache_latents:
            digest = hashlib.sha256(f"{a.size} {a.dtype} {model.config.dcae}".encode())
            for t in model.dcae.state_dict().values():
                digest.update(t.float().cpu().numpy().tobytes())
            self.folder = a.out / "latents" / digest.hexdigest()[:16]
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.parent.iterdir():
                if old != self.folder:
                    shutil.rmtree(old, ignore_errors=True)

    def file(self, name):
        return self.folder / f"{hashlib.sha256(name.encode(errors='backslashreplace')).hexdigest()[:32]}.safetensors"

    def known(self, name):
        """The latents of a record's picture, or None."""
        try:
            return load_file(self.file(name))["x0"] if self.folder else None
        except (OSError, SafetensorError):                                      # not there, or cut short by a crash
            return None

    @torch.no_grad()
    def forward(self, model, examples):
        """-> (B, C, h, w)"""
        x0 = {i: e.target.to(self.device) for i, e in enumerate(examples) if isinstance(e.target, torch.Tensor)}
        if new := [i for i in range(len(examples)) if i not in x0]:
            fresh = model.dcae.encode(to_pixels([examples[i].target for i in new], self.device, self.dtype))
            x0 |= dict(zip(new, fresh))
            for i in (i for i in new if self.folder and examples[i].name):      # a toy example has no name: it never comes again
                file = self.file(examples[i].name)
                save_file({"x0": x0[i].contiguous()}, file.with_suffix(f".{os.getpid()}"))
                os.replace(file.with_suffix(f".{os.getpid()}"), file)
        return torch.stack([x0[i] for i in range(len(examples))])


# ---------------------------------------------------------------- for the eye

def sheet(images, labels=None, scale=1, columns=None):
    """Pictures of one size in a grid, a small text under each; scale enlarges them without smoothing."""
    width, height = (scale * s for s in images[0].size)
    columns = columns or min(len(images), max(1, 1080 // (width + 8)))
    font = ImageFont.load_default(10)
    letters = max(1, int(width / font.getlength("n")))
    texts = [textwrap.wrap(str(label), letters, max_lines=6, placeholder="...") for label in labels or [""] * len(images)]
    tall = height + 8 + 12 * max(map(len, texts))
    page = Image.new("RGB", (columns * (width + 8) + 8, -(-len(images) // columns) * tall + 8), "white")
    draw = ImageDraw.Draw(page)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = 8 + i % columns * (width + 8), 8 + i // columns * tall
        page.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline="lightgrey")  # many of the pictures are white, as the page is
        draw.multiline_text((x, y + height), "\n".join(text), "black", font, spacing=1)
    return page
