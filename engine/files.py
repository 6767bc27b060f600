"""Safe reading and writing of model folders: safetensors only, never a pickle; whole or not at all.

What is read is checked (shape, finite values, each name once), what is written appears under its
name only when it is complete and on the disk.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.checks import shown
from engine.limits import MAX_HEADER_BYTES, MAX_JSON_BYTES, MAX_JSON_DEPTH

# ---------------------------------------------------------------------------- any file, and JSON

def regular_file(file, limit=None):
    """ValueError for what is not a regular file of at most `limit` bytes: a FIFO would wait for
    ever, a device has no end."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file} is not a regular file")
    if limit is not None and found.st_size > limit:
        raise ValueError(f"{file} has {found.st_size} bytes, expected at most {limit}")


def open_to_read(file, limit=None):
    """A regular file of at most `limit` bytes, opened. ValueError where it cannot be read."""
    regular_file(file, limit)
    try:
        return open(file, "rb")
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror}") from None


def check_readable(file, limit=None):
    open_to_read(file, limit).close()


def read_text(file, limit):
    """The text of a UTF-8 file of at most `limit` bytes. ValueError as above."""
    with open_to_read(file, limit) as f:
        try:
            return f.read().decode()
        except UnicodeDecodeError as e:
            raise ValueError(f"{file} is not UTF-8: {e}") from None


def json_depth(text):
    """How many brackets of a JSON text are open at once, at most. Brackets inside of a string are
    text."""
    depth = deepest = 0
    inside = False
    # What a backslash stands before is one with it: \" does not end a string.
    for token in re.finditer(r'\\.|[]["{}]', text, re.DOTALL):
        if token[0] == '"':
            inside = not inside
        elif not inside:
            depth += (token[0] in "[{") - (token[0] in "]}")
            deepest = max(deepest, depth)
    return deepest


def once(pairs):
    """The members of a JSON object as a dict. ValueError for a key that stands there twice, of
    which Python would take the last one."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} stands there twice")
        found[key] = value
    return found


def parse_json(text, where):
    """The content of a JSON text. ValueError that begins with `where`."""
    try:
        if json_depth(text) > MAX_JSON_DEPTH:
            raise ValueError(f"more than {MAX_JSON_DEPTH} brackets within brackets")
        return json.loads(text, object_pairs_hook=once)
    except ValueError as e:
        raise ValueError(f"{where} is not JSON: {e}") from None


def as_json(content, indent: int | None = None) -> str:
    """The JSON text of something. It has no NaN and no infinity: null."""
    known = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(known, indent=indent)


def read_json(file):
    """The content of a JSON file. ValueError that names it where it is missing or damaged."""
    return parse_json(read_text(file, MAX_JSON_BYTES), file)


def digest(*files):
    """The sha256 of a file, or of several one after the other, in hexadecimal. A GB takes one to
    three seconds."""
    found = hashlib.sha256()
    for file in files:
        with open_to_read(file) as f:
            while block := f.read(1 << 20):
                found.update(block)
    return found.hexdigest()


# ------------------------------------------------------------------------------ reading weights

# What weights are stored in, in the file's words. Anything else that it may hold is no weight;
# whole numbers are, where the model itself has some (engine/int8.py).
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INT8 = {"I8": torch.int8}


@dataclass(frozen=True)
class Stored:
    """What a file says of a tensor. dtype: torch's, or the file's word for one that is no
    weight."""
    dtype: torch.dtype | str
    shape: tuple


# The files of a saved model, by their full names: nothing else is ever removed.
MODEL_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def weight_files(folder):
    """A folder's *.safetensors, without hidden files and the hub's second copies
    NAME.fp16.safetensors."""
    try:
        files = sorted(pathlib.Path(folder).iterdir())
    except OSError as e:
        raise ValueError(f"folder {folder} cannot be listed: {e.strerror}") from None
    files = [f for f in files if f.suffix == ".safetensors" and not f.name.startswith(".")]
    files = [f for f in files if ".fp16" not in f.suffixes]
    # Beside a model in its own names (`MODEL_FILE`) others are somebody's copies.
    files = [f for f in files if MODEL_FILE.fullmatch(f.name)] or files
    if not files:
        raise ValueError(f"{folder} has no *.safetensors (pickled weights are not read)")
    return files


def check_header(file):
    """ValueError where what a safetensors file says of its tensors is too large, or names a tensor
    twice: the library would take one of the two."""
    where = f"{file} cannot be read as safetensors, is it whole? Its header"
    with open_to_read(file) as f:
        size = int.from_bytes(f.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"{where} has {size} bytes, expected at most {MAX_HEADER_BYTES}")
        parse_json(f.read(size).decode(errors="replace"), where)


@contextlib.contextmanager
def open_tensors(file, device="cpu"):
    """A safetensors file, opened: what safe_open gives. ValueError names one that is damaged."""
    try:
        str(file).encode()
        opened = safe_open(file, "pt", device=str(device))
    except UnicodeEncodeError:
        raise ValueError(f"{file}: this path is not UTF-8, and safetensors reads no other: "
                         "rename it") from None
    # RuntimeError: more bytes than can be mapped.
    except (SafetensorError, OSError, RuntimeError) as e:
        message = f"{file} cannot be read as safetensors, is it whole? {e}"
        raise ValueError(message) from None
    with opened as f:
        yield f


@functools.cache
def weights_digest(*folders) -> str:
    """Eight letters that stand for all weights in some folders."""
    return digest(*itertools.chain(*map(weight_files, folders)))[:8]


def stored_tensors(file):
    """{name: Stored} of all tensors in a file. Only its header is read."""
    check_header(file)
    found = {}
    with open_tensors(file) as f:
        for name in list(f.keys()):
            entry = f.get_slice(name)
            dtype = entry.get_dtype()
            found[name] = Stored((FLOATS | INT8).get(dtype, dtype), tuple(entry.get_shape()))
    return found


def read_tensors(file, device="cpu", only=None):
    """Yields (name, tensor), one at a time; only: of these names. ValueError names a file that is
    cut or damaged."""
    for name in stored_tensors(file):
        if only is None or name in only:
            # The file is mapped anew for each tensor: the mapping goes when the tensor has been
            # used.
            with open_tensors(file, device) as f:
                tensor = f.get_tensor(name)
            yield name, tensor


def check_tensor(missing, name, tensor, file, public):
    """Takes `name` out of {name: tensor} `missing`, if this tensor (or Stored) belongs there.

    ValueError, with the name that the tensor has in the file, if it does not: unknown or twice,
    another shape, not a weight.
    """
    if name not in missing:
        message = f"tensor {shown(public)} is not part of this model, or stands there twice"
        raise ValueError(f"{file}: {message}")
    found, expected = tuple(tensor.shape), tuple(missing[name].shape)
    if found != expected:
        raise ValueError(f"{file}: tensor {public} has shape {found}, expected {expected}")
    kinds = INT8 if missing[name].dtype == torch.int8 else FLOATS
    if tensor.dtype not in kinds.values():
        raise ValueError(f"{file}: tensor {public} is stored as {tensor.dtype}, expected "
                         f"{' or '.join(kinds)}")
    del missing[name]


def check_finite(tensor, file, public):
    """The tensor itself. To be asked in the dtype of use: 1e6 is finite, but not in float16."""
    if not tensor.is_floating_point():
        return tensor
    # One pass, and no copy: NaN and infinity are seen in the extremes.
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{file}: tensor {public} has values that are not finite (in {kind})")
    return tensor


def check_none_missing(missing, where):
    if missing:
        first = list(missing)[:3]
        raise ValueError(f"{where}: {len(missing)} tensors are missing, the first ones {first}")


def check_record(folder):
    """Where a folder has a record.json with the sha256 of its weights, as the toy has, ValueError
    for a file that is another one: a single flipped bit is enough. (Only there: at full size this
    takes longer than loading.)"""
    file = pathlib.Path(folder) / "record.json"
    record = read_json(file) if file.exists() else {}
    sums = record.get("sha256") if isinstance(record, dict) else None
    for weights in weight_files(folder) if isinstance(sums, dict) else ():
        expected = sums.get(weights.name)
        if expected is not None and digest(weights) != expected:
            raise ValueError(f"{weights} is not the file that {file} was written for (sha256): "
                             "damaged, or of another training. Fetch it again, or take sha256 out "
                             "of the record")


def check_stored(model, folder):
    """The weight files of a folder, when their headers name exactly the tensors of a model, in its
    shapes. ValueError otherwise: before the first number is read."""
    files = weight_files(folder)
    check_record(folder)
    check_headers(model, files, folder)
    return files


def check_headers(model, files, where):
    missing = model.state_dict()
    for file in files:
        for name, stored in stored_tensors(file).items():
            check_tensor(missing, name, stored, file, name)
    check_none_missing(missing, where)


# ------------------------------------------------------------------------------------- writing

# What a process that was killed leaves behind: the names that `replacing` draws.
SCRATCH_FOLDER = re.compile(r"\.new-[a-z0-9_]{8}")


def sync(*paths):
    """Waits until files and folders (which names are in them) are on the disk itself."""
    # Windows cannot sync what is open for reading only.
    for path in paths if os.name != "nt" else ():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def new_file_mode() -> int:
    """The mode that a new file gets: what the umask leaves of rw-rw-rw-."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def check_replaceable(file) -> None:
    """ValueError where something other than a regular file has this name: a link, a device, a pipe
    or a folder is never written to and never replaced."""
    file = pathlib.Path(file)
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise ValueError(f"{file} exists and is not a regular file: give another name")


def check_writable(folder) -> None:
    """OSError where no file can be made in a folder: better now than after an hour's work."""
    scratch = pathlib.Path(folder) / f".{secrets.token_hex(8)}.new"
    try:
        scratch.touch(exist_ok=False)
    except OSError as e:
        raise OSError(f"no file can be made in {folder}: {e.strerror}") from None
    scratch.unlink()


def check_new_folder(out, sources) -> None:
    """ValueError where `out`, which is to be written, is one of the folders that are read, or lies
    in one, or holds anything already. sources: folders, or None."""
    out = pathlib.Path(out)
    for source in filter(None, sources):
        if pathlib.Path(source).resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"--out {out} is one of the folders to read, or lies in {source}: "
                             "give another one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} exists and is not a folder")
    held = sorted(file.name for file in out.iterdir()) if out.is_dir() else []
    held = [name for name in held if not SCRATCH_FOLDER.fullmatch(name)]
    if held:
        raise ValueError(f"--out {out} holds {held[0]} already: give a new or an empty folder")


@contextlib.contextmanager
def new_file(file):
    """A binary file to write to. It gets its name, in place of an older one, when the block ends
    well; otherwise it goes, and the older one stays as it was.

    Until then its name cannot be guessed, and it is made only where nothing has that name ("x"), so
    no link that somebody has put there is followed.
    """
    file = pathlib.Path(file)
    check_replaceable(file)
    scratch = file.with_name(f".{secrets.token_hex(8)}.new")
    try:
        with open(scratch, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(file, text: str) -> None:
    """A text file, whole or not at all."""
    with new_file(file) as f:
        f.write(text.encode())


def save_png(image, file, **settings) -> None:
    """A PIL picture as a PNG file, whole or not at all. settings: those of PIL."""
    with new_file(file) as f:
        image.save(f, "png", **settings)


class replacing:
    """A scratch folder whose files move into `folder` only when the block ends well.

    So no file is ever seen half written, though several change their names one by one
    (docs/promises.md). Files of an older save with other shards go away then: those that MODEL_FILE
    names, and no others. ValueError if `folder` is a file.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} exists and is not a folder")

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        # What a process that was killed has left behind.
        for left in self.folder.iterdir():
            if SCRATCH_FOLDER.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        self.new = pathlib.Path(tempfile.mkdtemp(dir=self.folder, prefix=".new-"))
        return self.new

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.replace()
        finally:
            shutil.rmtree(self.new)

    def replace(self):
        sync(*self.new.iterdir(), self.new)
        names = {file.name for file in self.new.iterdir()}
        # All of them before the first one moves.
        for name in names:
            check_replaceable(self.folder / name)
        for name in names:
            os.replace(self.new / name, self.folder / name)
        for old in self.folder.iterdir():
            if MODEL_FILE.fullmatch(old.name) and old.name not in names and old.is_file():
                old.unlink()
        # Not what else is in it: to close a run's .lock would be to let go of it (engine/runs.py).
        sync(self.folder)


def write_shards(folder, tensors, limit=1 << 30):
    """Writes (name, tensor) pairs to model.safetensors, or to numbered shards of about `limit`
    bytes, holding one shard at a time. -> {tensor name: file name}."""
    folder = pathlib.Path(folder)
    shards = []

    def flush(shard):
        save_file(shard, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))

    shard, size = {}, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            flush(shard)
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    flush(shard)

    # Only now is the number of shards known, which is part of their names.
    where, n = {}, len(shards)
    for i, names in enumerate(shards):
        file = "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        os.replace(folder / f"part-{i}", folder / file)
        # save_file lets nobody else read it
        (folder / file).chmod(new_file_mode())
        where |= dict.fromkeys(names, file)
    return where
