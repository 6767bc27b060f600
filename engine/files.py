"""Safe reading and writing of model folders: safetensors only, never a pickle; whole or not at all.

What is read is checked (shape, finite values, each name once), what is written appears under its
name only when it is complete and on the disk.
"""
import json
import os
import pathlib
import shutil
import tempfile

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# ------------------------------------------------------------------------------------- reading

def read_json(file):
    """The content of a JSON file. ValueError that names it where it is missing or damaged."""
    try:
        return json.loads(pathlib.Path(file).read_text())
    except OSError:
        raise ValueError(f"{file} is missing: not a model folder") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{file} is not JSON: {e}") from None


def weight_files(folder):
    """A folder's *.safetensors, without the hub's second copies NAME.fp16.safetensors."""
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    files = [f for f in files if ".fp16" not in f.suffixes]
    if not files:
        raise ValueError(f"{folder} has no *.safetensors (pickled weights are not read)")
    return files


def read_tensors(file, device="cpu"):
    """Yields (name, tensor), one at a time. ValueError names a file that is cut or damaged."""
    try:
        with safe_open(file, "pt") as f:
            names = list(f.keys())
        # The file is mapped anew for each tensor: the mapping goes when the tensor has been used.
        for name in names:
            with safe_open(file, "pt", device=str(device)) as f:
                tensor = f.get_tensor(name)
            yield name, tensor
    except (SafetensorError, OSError) as e:
        message = f"{file} cannot be read as safetensors, is it whole? {e}"
        raise ValueError(message) from None


def check_tensor(missing, name, tensor, file, public):
    """Takes `name` out of {name: tensor} `missing`, if this tensor belongs there.

    ValueError, with the name that the tensor has in the file, if it does not: unknown or twice,
    another shape, values that are not finite.
    """
    if name not in missing:
        message = f"tensor {public} is not part of this model, or stands there twice"
        raise ValueError(f"{file}: {message}")
    found, expected = tuple(tensor.shape), tuple(missing[name].shape)
    if found != expected:
        raise ValueError(f"{file}: tensor {public} has shape {found}, expected {expected}")
    if not tensor.isfinite().all():
        raise ValueError(f"{file}: tensor {public} has values that are not finite")
    del missing[name]


def load_weights(model, folder, dtype_of, device="cpu"):
    """Fills a model on the meta device, file by file: each tensor straight to `device`, in
    dtype_of(name). ValueError names whatever is missing, left over, mis-shaped or damaged."""
    missing = model.state_dict()
    for file in weight_files(folder):
        found = {}
        for name, tensor in read_tensors(file, device):
            check_tensor(missing, name, tensor, file, name)
            # On a CPU the tensor is a view of the mapped file; the copy lets go of it.
            found[name] = tensor.to(dtype_of(name), copy=tensor.device.type == "cpu")
        model.load_state_dict(found, strict=False, assign=True)
    if missing:
        first = list(missing)[:3]
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first ones {first}")


# ------------------------------------------------------------------------------------- writing

def sync(folder):
    """Waits until a folder and its files are on the disk itself."""
    # Windows cannot sync what is open for reading only.
    paths = [] if os.name == "nt" else [*folder.iterdir(), folder]
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class replacing:
    """A scratch folder whose files move into `folder` only when the block ends well.

    So a half-written model is never seen. Other model*.safetensors*, of an older save with other
    shards, go away then. ValueError if `folder` is a file.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} exists and is not a folder")

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        # What a process that was killed has left behind.
        for left in self.folder.glob(".new-*"):
            shutil.rmtree(left, ignore_errors=True)
        self.new = pathlib.Path(tempfile.mkdtemp(dir=self.folder, prefix=".new-"))
        return self.new

    def __exit__(self, kind, *_):
        if kind is None:
            sync(self.new)
            names = {file.name for file in self.new.iterdir()}
            for name in names:
                os.replace(self.new / name, self.folder / name)
            for old in self.folder.glob("model*.safetensors*"):
                if old.name not in names:
                    old.unlink()
        shutil.rmtree(self.new)


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
        (folder / file).chmod(0o644)
        where |= dict.fromkeys(names, file)
    return where
