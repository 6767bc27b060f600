"""Where examples come from: generated ones, or pictures with texts in tars or in a folder.

A source has `locations(rng)`, which yields where its records are (in order where rng is None), and
`read(location)`, which turns one into an Example. A record that cannot be used raises Unusable, a
ValueError that says which one and why: engine/data.py skips it and reports it. Nothing is extracted
from a tar, and at most one record at a time is in memory. docs/data.md describes the layouts.
"""
import csv
import glob
import io
import itertools
import os
import pathlib
import random
import re
import tarfile
from dataclasses import dataclass

from PIL import Image, ImageOps
from torch import Tensor

from engine.checks import printable
from engine.files import parse_json
from engine.limits import (
    MAX_CAPTION_BYTES,
    MAX_LINE_BYTES,
    MAX_PICTURE_BYTES,
    MAX_PIXELS,
    MAX_RECORD_MEMBERS,
    MAX_SHARDS,
    MAX_SOURCES,
    MAX_TAR_HEADER_BYTES,
    MIN_TARGET_SIDE,
)
from engine.pictures import Unusable, open_image
from vit import smart_size

# Suffixes of pictures in tars.
KINDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
# Each stands for a piece of a picture: the MLLM puts what it sees in their place.
IMAGE_TOKEN = "<|image_pad|>"
# The roles of pictures to start from, in tars and in the columns of a folder's metadata.
SOURCE = re.compile(r"source\d*")


@dataclass(frozen=True)
class Example:
    """prompt: the text. images: the pictures it refers to (none: text to image). target: the
    picture to draw, or its latents. name: the record's, for logs and caches; generated examples
    have none."""

    prompt: str
    images: tuple
    target: Image.Image | Tensor
    name: str = ""


def check_text(text: str, where: str) -> None:
    """Other control tokens pass as such, as in the released code (docs/data.md)."""
    if IMAGE_TOKEN in text:
        raise Unusable(where, f"the text holds {IMAGE_TOKEN}, which stands for a picture")


def check_count(sources, where: str) -> None:
    if len(sources) > MAX_SOURCES:
        raise Unusable(where, f"the record has more than {MAX_SOURCES} pictures to start from",
                       f": {len(sources)}")


def check_shape(size: tuple[int, int], where: str) -> None:
    """Unusable for a picture whose aspect ratio the ViT does not read."""
    try:
        smart_size(*size, factor=1, area=1)
    except ValueError as e:
        raise Unusable(where, "a picture is too thin", f": {e}") from None


class Generated:
    """An endless source: example i is make(rng, i). Its rng depends on (seed, i) alone, so there is
    nothing to shuffle."""

    pool = 0

    def __init__(self, make, seed):
        self.make = make
        self.seed = seed

    def locations(self, rng=None):
        return itertools.count()

    def read(self, i: int) -> Example:
        example = self.make(random.Random(f"{self.seed} {i}"), i)
        # lab/pretrain.py learns from scenes and conversations, too.
        if isinstance(example, Example):
            where = example.name or printable(example.prompt)
            check_text(example.prompt, where)
            for image in example.images:
                check_shape(image.size, where)
        return example


def square(image: Image.Image, size: int) -> Image.Image:
    """Resized to its shorter side and cropped at the centre."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def clean_text(text: str | bytes, where: str) -> str:
    """A text without byte-order mark and surrounding space (a file of text ends a line)."""
    if not isinstance(text, str | bytes):
        raise Unusable(where, "the record has no text")
    try:
        # A str, too, is checked: JSON can hold what UTF-8 cannot, such as "\ud800".
        encoded = text.encode() if isinstance(text, str) else text
        text = encoded.decode("utf-8-sig").strip()
    except UnicodeError:
        raise Unusable(where, "the text is not UTF-8") from None
    if len(encoded) > MAX_CAPTION_BYTES:
        raise Unusable(where, f"the text has more than {MAX_CAPTION_BYTES} bytes")
    if not text:
        raise Unusable(where, "the text is empty")
    check_text(text, where)
    return text


class Pictures:
    """What the two sources of real data share: records refer to files. The picture to draw becomes
    a square. Pictures to start from stay as they are, as in the released code and as in drawing:
    the MLLM resizes them once, uncropped (vit.patchify).

    size: side of the square, None for no change. latents: a function from a record's name to the
    latents of its target, or to None; what it returns takes the target's place."""

    # Locations to shuffle among, see `shuffled`.
    pool = 10_000

    def __init__(self, size=None, latents=None):
        self.size = size
        self.latents = latents

    def example(self, name: str, text: str, sources, target, where: str | None = None) -> Example:
        """name: the record's. sources: files of the pictures to start from; target: file of the
        picture to draw; where: how messages call the record. Unusable where one is missing or
        broken."""
        where = where or name
        known = self.latents(name) if self.latents else None
        images = self.source_images(sources, where)
        if known is not None:
            return Example(text, images, known, name)
        picture = open_image(target, f"{where}, target")
        check_shape(picture.size, f"{where}, target")
        if min(picture.size) < MIN_TARGET_SIDE:
            sides = "{} x {}".format(*picture.size)
            raise Unusable(f"{where}, target", "a picture to draw has a side of less than "
                           f"{MIN_TARGET_SIDE} pixels", f": {sides}")
        return Example(text, images, square(picture, self.size) if self.size else picture, name)

    def source_images(self, sources, where: str) -> tuple:
        """Opens the pictures to start from."""
        images = []
        left = MAX_PIXELS
        for file in sources:
            image = open_image(file, f"{where}, source", left)
            check_shape(image.size, f"{where}, source")
            left -= image.width * image.height
            images.append(image)
        return tuple(images)


# ---------------------------------------------------------------------------------------- tars

# How a file that is compressed begins, and what decompresses it.
COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip, then tar",
}
# Names that such a file has.
COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
# What Windows leaves in a folder. (What a Mac leaves begins with a dot, or lies in __MACOSX.)
LITTER = ("thumbs.db", "desktop.ini")


def key_suffix(name: str) -> tuple[str, str]:
    """'train/0001.source.jpg' -> ('train/0001', 'source.jpg'): a record's key, and which part of
    the record this is."""
    folder, slash, file = name.rpartition("/")
    key, _, suffix = file.partition(".")
    return folder + slash + key, suffix.lower()


def in_a_record(name: str) -> bool:
    """Is this the name of a part of a record? webdataset, too, leaves out what has no suffix or
    begins with a dot."""
    *folders, file = name.split("/")
    hidden = file.startswith(".") or "__MACOSX" in folders
    return "." in file and not hidden and file.lower() not in LITTER


class Headers:
    """A tar as tarfile reads it, header by header. What claims more than a header can have is
    refused, before it takes as much memory as it claims."""

    def __init__(self, file):
        self.file = file
        self.seek = file.seek
        self.tell = file.tell
        self.left = MAX_TAR_HEADER_BYTES

    def read(self, n: int) -> bytes:
        self.left -= n
        if n < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header of more than {MAX_TAR_HEADER_BYTES} bytes")
        return self.file.read(n)


def placed(member: tarfile.TarInfo) -> tuple[int, int] | str:
    """Where a member's bytes are: (offset, bytes); or why they are not read."""
    if member.issym() or member.islnk():
        return "a link"
    if member.issparse():
        return "a sparse file, stored in pieces"
    return member.offset_data, member.size


def divide(parts: list, where: str) -> list[dict]:
    """[(suffix, place)] of neighbours with one key -> [{suffix: place}], usually one. The key may
    come again at once: each time it must have the same parts, or it is not clear what belongs
    together."""
    records = [{}]
    for suffix, place in parts:
        if suffix in records[-1]:
            records.append({})
        records[-1][suffix] = place
    if len(parts) > MAX_RECORD_MEMBERS:
        raise Unusable(where, f"more than {MAX_RECORD_MEMBERS} members in a row have one key",
                       told(parts))
    if any(record.keys() != records[0].keys() for record in records):
        raise Unusable(where, "parts of several records with one key are mixed", told(parts))
    return records


def told(parts) -> str:
    """The members of a record, for a message."""
    suffixes = [part[0] if isinstance(part, tuple) else part for part in parts]
    return f": it has {printable(', '.join(f'.{suffix}' for suffix in suffixes))}"


def hint(parts) -> str:
    """Why parts may be missing, for a message."""
    if any(" " in part for part in parts):
        return "; a name's first dot ends the key, and what follows it says which part this is"
    return "; parts of a record must be neighbours in the tar (tar --sort=name)"


class Tars(Pictures):
    """webdataset tars: the members of a record share their name up to the first dot. `txt` and
    `jpg` (or another of KINDS); for editing `txt`, `source.jpg` (or source0.jpg, source1.jpg, ...)
    and `target.jpg`. Read in place, nothing is ever extracted."""

    def __init__(self, files: list[str], size=None, latents=None):
        super().__init__(size, latents)
        self.files = files

    def locations(self, rng=None):
        """(file, name, {suffix: place}) of every record, tar by tar in random order; only headers
        are read. Unusable, instead of the parts, for a record that `read` will refuse."""
        files = self.files if rng is None else rng.sample(self.files, len(self.files))
        for file in files:
            with open(file, "rb") as f:
                try:
                    check_not_compressed(f, file)
                    yield from self.records(f, file)
                except OSError:
                    raise
                except Unusable as e:
                    yield file, "", e
                # tarfile raises all sorts of errors on damaged headers.
                except Exception as e:
                    why = f": {e or type(e).__name__}"
                    yield file, "", Unusable(file, "damaged tar, the rest of it is lost", why)

    def records(self, f, file: str):
        """The locations in one tar: neighbours with the same key."""
        for key, members in itertools.groupby(self.members(f), lambda m: key_suffix(m.name)[0]):
            first = next(members)
            parts = [(key_suffix(m.name)[1], placed(m)) for m in
                     itertools.islice(itertools.chain([first], members), MAX_RECORD_MEMBERS + 1)]
            where = f"{file}: {printable(key)}, byte {first.offset_data}"
            try:
                for record in divide(parts, where):
                    # A key may occur twice, so the name says where the record begins.
                    place = next(iter(record.values()))
                    start = first.offset_data if isinstance(place, str) else place[0]
                    yield file, f"{file}: {printable(key)}, byte {start}", record
            except Unusable as e:
                yield file, where, e
        # tarfile does not look beyond the end mark, where `cat a.tar b.tar` puts a second tar.
        if any(f.read(MAX_TAR_HEADER_BYTES)):
            raise tarfile.ReadError(f"more follows its end mark, before byte {f.tell()}; to join "
                                    "tars, use tar --concatenate, not cat")

    @staticmethod
    def members(f):
        """The members of a tar that are parts of records. tarfile.TarError, and others, where it is
        damaged."""
        headers = Headers(f)
        length = f.seek(0, os.SEEK_END)
        f.seek(0)
        tar = tarfile.TarFile(fileobj=headers)
        while True:
            begin = 0 if tar.firstmember else tar.offset
            headers.left = MAX_TAR_HEADER_BYTES
            member = tar.next()
            # tarfile remembers all members, which are too many in a long stream.
            tar.members.clear()
            if member is None:
                break
            # Each is further on than the last one, and within the file: no size can be negative.
            if tar.offset <= begin or not 0 <= member.size <= length and not member.issparse():
                raise tarfile.ReadError(f"a member of {member.size} bytes at byte {begin}")
            if not member.isdir() and in_a_record(member.name):
                yield member
        f.seek(tar.offset)
        # tarfile takes a broken header for the end, but the end is a block of zeros.
        if f.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"byte {tar.offset} begins neither a header nor the end mark")

    def read(self, location) -> Example:
        file, name, parts = location
        if isinstance(parts, Unusable):
            raise parts
        pictures = by_role(parts, name)
        for part, what in (("txt", "text"), (pictures.get("target"), "picture to draw")):
            if part not in parts:
                raise Unusable(name, f"the record has no {what}", told(parts) + hint(parts))
        target = pictures.pop("target")
        check_count(pictures, name)
        # By length first, so that source10 comes after source9.
        roles = sorted(pictures, key=lambda role: (len(role), role))
        with open(file, "rb") as f:
            text = content(f, parts, "txt", MAX_CAPTION_BYTES, name)
            sources = [content(f, parts, pictures[role], MAX_PICTURE_BYTES, name)
                       for role in roles]
            target = content(f, parts, target, MAX_PICTURE_BYTES, name)
        return self.example(name, clean_text(text, name), [*map(io.BytesIO, sources)],
                            io.BytesIO(target))


def by_role(parts, where: str) -> dict:
    """The members that are pictures: {"target", "source", "source0", ...: suffix}. "source.jpg" is
    a source; "jpg", like "target.jpg", the target."""
    pictures = {}
    for part in parts:
        role, _, kind = part.rpartition(".")
        role = role or "target"
        if kind in KINDS and (role == "target" or SOURCE.fullmatch(role)):
            if role in pictures:
                raise Unusable(where, f"the record has several pictures for one role, {role}",
                               told(parts))
            pictures[role] = part
    return pictures


def content(f, parts, part: str, most: int, where: str) -> bytes:
    """The bytes of a member."""
    place = parts[part]
    if isinstance(place, str):
        raise Unusable(where, f"a member is {place}, and nothing is extracted", f": .{part}")
    offset, size = place
    if size > most:
        raise Unusable(where, f"a member has more than {most} bytes", f": .{part} has {size}")
    f.seek(offset)
    found = f.read(size)
    if len(found) < size:
        raise Unusable(where, "the tar ends before this record")
    return found


def check_not_compressed(f, file: str) -> None:
    begin = f.read(8)
    for magic, program in COMPRESSED.items():
        if begin.startswith(magic):
            raise Unusable(file, "compressed, all of it is lost", ": records are read in place, so "
                           f"decompress it first ({program})")


# ------------------------------------------------------------------------------------- folders

class Lines:
    """The lines of an open file, as bytes, none of them longer than MAX_LINE_BYTES: the rest of a
    longer one is passed over. `end` is where the next one begins, `number` its number."""

    def __init__(self, f):
        self.f = f
        self.end = f.tell()
        self.number = 1

    def __iter__(self):
        while line := self.f.readline(MAX_LINE_BYTES + 1):
            rest = line
            self.end += len(line)
            while not rest.endswith(b"\n") and (rest := self.f.readline(MAX_LINE_BYTES)):
                self.end += len(rest)
            self.number += 1
            yield line


def json_records(lines: Lines):
    """Yields after each record: one a line."""
    yield from lines


def csv_records(lines: Lines):
    """Yields after each record: in quotes, a field may hold line ends. A quote that is never closed
    ends at the longest field that the csv module allows."""
    # Quotes, commas and line ends are the same in any extension of ASCII.
    reader = csv.reader(line.decode("latin-1") for line in lines)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        # `read` meets the same error, and names it.
        except csv.Error:
            yield None


METADATA = {"metadata.jsonl": json_records, "metadata.csv": csv_records}


class Folder(Pictures):
    """A folder with metadata.jsonl or metadata.csv, like Hugging Face's imagefolder: `text` and
    `file_name`; for editing `text`, `source` (one name, in JSON also a list; or source0, source1,
    ...) and `target`. Names are relative to the metadata's folder, and stay within `root`."""

    def __init__(self, metadata: pathlib.Path, root: pathlib.Path, size=None, latents=None):
        super().__init__(size, latents)
        self.metadata = metadata
        self.root = root.resolve()
        self.columns = self.header() if metadata.suffix == ".csv" else None

    def header(self) -> list[str]:
        with open(self.metadata, "rb") as f:
            line = f.readline(MAX_LINE_BYTES)
        try:
            columns = next(csv.reader([line.decode("utf-8-sig")]), [])
        except (UnicodeError, csv.Error) as e:
            raise ValueError(f"{self.metadata} does not begin with names of columns: {e}") from None
        if "text" not in columns or not {"file_name", "target"} & {*columns}:
            raise ValueError(f"{self.metadata}: its columns are {printable(', '.join(columns))}; "
                             "expected text, and file_name or target, separated by commas")
        return columns

    def locations(self, rng=None):
        """(first byte, number of bytes, line) of each record, in order."""
        with open(self.metadata, "rb") as f:
            lines = Lines(f)
            start, line = 0, 1
            for record in METADATA[self.metadata.name](lines):
                header = self.columns is not None and start == 0
                blank = record == [] or isinstance(record, bytes) and not record.strip()
                if not header and not blank:
                    yield start, lines.end - start, line
                start, line = lines.end, lines.number

    def read(self, location) -> Example:
        start, size, line = location
        where = f"{self.metadata}, line {line}"
        if size > MAX_LINE_BYTES:
            raise Unusable(where, f"has more than {MAX_LINE_BYTES} bytes")
        with open(self.metadata, "rb") as f:
            f.seek(start)
            record = f.read(size)
        row = self.row(record, where)
        target = row.get("target", row.get("file_name"))
        if target is None:
            raise Unusable(where, "the record has no picture to draw", f": it has {told_row(row)}")
        sources = sources_of(row)
        if not all(isinstance(name, str) for name in (target, *sources)):
            raise Unusable(where, "source, and target or file_name, must be names of files")
        if "text" not in row:
            raise Unusable(where, "the record has no text", f": it has {told_row(row)}")
        check_count(sources, where)
        text = clean_text(row["text"], where)
        target = self.inside(target, where)
        sources = [self.inside(name, where) for name in sources]
        return self.example(str(target), text, sources, target, where)

    def row(self, record: bytes, where: str) -> dict:
        """{column: value} of a record."""
        try:
            text = record.decode("utf-8-sig")
            if self.columns is None:
                row = parse_json(text, "the line")
                if not isinstance(row, dict):
                    raise ValueError("not an object, {...}")
                # null says that there is nothing, as an empty field of CSV does.
                return {name: value for name, value in row.items() if value is not None}
            # strict: a quote that is never closed is an error, not a text of many lines.
            values, = csv.reader(io.StringIO(text, newline=""), strict=True)
            if len(values) != len(self.columns):
                raise ValueError(f"{len(values)} fields, expected {len(self.columns)}")
            # CSV has no other way to say that there is nothing.
            return {column: value for column, value in zip(self.columns, values) if value}
        except csv.Error as e:
            raise Unusable(where, "not a record", f": {e}; is a quote never closed?") from None
        except ValueError as e:
            raise Unusable(where, "not a record", f": {e}") from None

    def inside(self, name: str, where: str) -> pathlib.Path:
        """The path of a file that a record names."""
        path = self.metadata.parent / name
        try:
            found = path.resolve()
        # A name that no file can have, or links in a circle.
        except (ValueError, OSError, RuntimeError) as e:
            raise Unusable(where, "not the name of a file", f": {printable(name)}, {e}") from None
        if not found.is_relative_to(self.root):
            raise Unusable(where, "a file's path leads out of the folder",
                           f": {printable(name)}; files and what links point at must lie in "
                           f"{self.root}")
        return path


def told_row(row: dict) -> str:
    return printable(", ".join(row)) or "nothing"


def sources_of(row: dict) -> list:
    """What a record names as pictures to start from."""
    names = []
    for column in sorted(filter(SOURCE.fullmatch, row), key=lambda name: (len(name), name)):
        value = row[column]
        names += value if isinstance(value, list) else [value]
    return names


# --------------------------------------------------------------------------------- what is named

def open_source(spec: str, makers: dict, seed: int, size=None, latents=None):
    """What --data names: one of `makers` ({word: make(rng, i) -> Example}), a folder with
    metadata.jsonl or metadata.csv (or such a folder with a folder train inside), a folder of tars,
    a tar, 'shards-{000..123}.tar' or 'a*.tar'. ValueError if there is no such thing."""
    if spec in makers:
        return Generated(makers[spec], seed)
    folder = pathlib.Path(spec)
    found = [folder / part / name for part in ("", "train") for name in METADATA]
    found = [file for file in found if os.path.isfile(file)]
    if len(found) > 1:
        raise ValueError(f"--data {spec} holds {' and '.join(map(str, found))}: keep one of them")
    if found:
        return Folder(found[0], folder, size, latents)
    return Tars(tar_files(spec, makers), size, latents)


def tar_files(spec: str, makers: dict) -> list[str]:
    """The tars that `spec` names, see `open_source`. ValueError where there are none."""
    patterns = numbered(spec)
    if os.path.isdir(spec):
        patterns = [glob.escape(spec) + "/*.tar"]
    files = []
    missing = []
    for pattern in patterns:
        found = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))
        files += found
        if not found:
            missing.append(pattern)
    if missing:
        layouts = ["tars", "a folder with metadata.jsonl or metadata.csv"]
        layouts += [f"one of {[*makers]}"] if makers else []
        raise ValueError(f"--data {spec}: no such files: {missing[:3]}; expected "
                         f"{' or '.join(layouts)}{hint_compressed(spec)}")
    for file in files:
        # A FIFO would wait for ever. (A folder of tars may be large: no file is opened here.)
        if not os.path.isfile(file):
            raise ValueError(f"--data {spec}: {file} is not a regular file")
        if file.endswith(COMPRESSED_NAMES):
            raise ValueError(f"--data {spec}: {file} is compressed. Records are read in place: "
                             "decompress it first, such as by gunzip")
    return files


def numbered(spec: str) -> list[str]:
    """'a-{000..123}.tar' -> 'a-000.tar', ...: as many digits as the first number has."""
    span = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if not span:
        return [spec]
    first, last = span.groups()
    # More digits than Python turns into a number are too many files in any case.
    count = int(last) - int(first) + 1 if len(first + last) < 1000 else MAX_SHARDS + 1
    if not 1 <= count <= MAX_SHARDS:
        raise ValueError(f"--data {printable(spec)}: expected a range of 1 to {MAX_SHARDS} files")
    numbers = [str(int(first) + i).zfill(len(first)) for i in range(count)]
    return [spec[:span.start()] + number + spec[span.end():] for number in numbers]


def hint_compressed(spec: str) -> str:
    """What to say where a folder holds no tars, but something near."""
    names = os.listdir(spec) if os.path.isdir(spec) else []
    if any(name.endswith(COMPRESSED_NAMES) for name in names):
        return ". Its tars are compressed: decompress them first, such as by gunzip"
    if any(name.endswith(".parquet") for name in names):
        return ". Parquet is not read: docs/data.md says how to convert it"
    return ""


def source(spec: str, makers: dict, seed: int, size: int, latents=None):
    """`open_source`. ValueError also where no record in it can be used."""
    found = open_source(spec, makers, seed, size, latents)
    check_any_usable(found, spec)
    return found


def check_any_usable(found, spec: str) -> None:
    """ValueError with the first ten reasons if a source holds no record that can be used."""
    reasons = []
    for location in itertools.islice(found.locations(random.Random(0)), 1000):
        try:
            found.read(location)
            return
        except ValueError as e:
            reasons.append(printable(e, 1000))
    message = f"--data {spec}: not one record in it can be read"
    if len(reasons) == 1000:
        message += " (of the first 1000)"
    raise ValueError("\n".join([message, *reasons[:10]]))
