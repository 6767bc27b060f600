"""Hostile model folders: config.json key by key, weights, tokenizer; and the public configs that
the conversion reads."""
import atexit
import functools
import json
import os
import pathlib
import shutil
import struct
import tempfile

import torch
from safetensors.torch import load_file, save_file

import weights_convert
from engine.checks import CONFIG
from tbac import TBAC
from tests.conftest import TINY
from tests.fuzz.harness import Case, command, damaged_copy


@functools.cache
def tiny() -> pathlib.Path:
    """The tiny checkpoint, converted once, before any case is run."""
    out = pathlib.Path(tempfile.mkdtemp()) / "model"
    atexit.register(shutil.rmtree, out.parent, ignore_errors=True)
    weights_convert.convert(TINY / "qwen", TINY / "sana", TINY / "tbac", out)
    return out


def load(folder) -> TBAC:
    model = TBAC.load(folder / "model")
    # What loads must also work.
    assert model.encode(["a dog"]).isfinite().all()
    assert 6 <= len(model.mllm.tokenizer.encode("a b c d e f")) < 9
    return model


def edit_model(edit):
    return damaged_copy(tiny, "model", edit)


def edit_json(name: str, key: str, value):
    """value: a JSON text, or None to take the key away"""
    def edit(folder):
        file = folder / name
        found = json.loads(file.read_text())
        *path, last = key.split(".")
        inner = functools.reduce(dict.__getitem__, path, found)
        if value is None:
            del inner[last]
        else:
            inner[last] = "@@"
        file.write_text(json.dumps(found).replace('"@@"', str(value)))
    return edit


# ---------------------------------------------------------------------------------------- config

# As JSON: not one of them is what any key means, but where WORKS says so.
VALUES = ("null", "true", '"x"', "-1", "0", "1.5", "NaN", "Infinity", "1e400", "1000000000", "[]",
          "{}", "[0]", '["full"]', None)
WORKS = {
    ("mllm.rope_theta", "1.5"), ("mllm.rope_theta", "1000000000"), ("image_guidance", "0"),
    ("guidance", "0"), ("guidance", "1.5"),
    ("image_guidance", "1.5"), ("dcae.scaling_factor", "1.5"),
    ("mllm.vision.full_attention", "[]"), ("mllm.vision.full_attention", "[0]"),
}


def leaves(kinds: dict, path: str = ""):
    for key, kind in kinds.items():
        yield from leaves(kind, f"{path}{key}.") if isinstance(kind, dict) else [path + key]


def config_cases():
    for key in leaves(CONFIG):
        for value in VALUES:
            expected = "any" if (key, value) in WORKS else "error"
            yield Case(f"config.json: {key} = {value}", load,
                       edit_model(edit_json("config.json", key, value)), expected,
                       "config.json|safetensors|missing")
    for part in ("mllm", "dit", "dcae", "mllm.vision"):
        for value in ("null", "1", "[]", "{}", '"x"', None):
            yield Case(f"config.json: {part} = {value}", load,
                       edit_model(edit_json("config.json", part, value)), "error", "config.json")


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def into_fifo(name: str):
    def edit(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    return edit


def into_folder(name: str):
    def edit(folder):
        (folder / name).unlink()
        (folder / name).mkdir()
    return edit


def into_device(name: str):
    def edit(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
    return edit


def file_cases():
    contents = {
        "empty": b"", "cut": b'{"mllm": {', "bytes": b"\xff\xfe\x00", "a list": b"[]",
        "null": b"null", "deep": b"[" * 200_000, "deep objects": b'{"a":' * 100_000,
        "a key twice": b'{"mllm": 1, "mllm": 2}', "large": b'"' + b"x" * 20_000_000 + b'"',
        "spaces": b" " * 1_000_000, "a long number": b"9" * 1_000_000,
    }
    for name in ("config.json", "tokenizer.json"):
        for what, content in contents.items():
            yield Case(f"{name}: {what}", load, edit_model(write(name, content)), "error", name)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        for make in (into_fifo, into_folder, into_device):
            yield Case(f"{name}: {make.__name__}", load, edit_model(make(name)), "error", name)
        yield Case(f"{name}: gone", load, edit_model(lambda folder, name=name:
                                                     (folder / name).unlink()), "error", "")
    for what in ("model", "folder"):
        yield Case(f"no {what}", lambda folder: TBAC.load(folder / "none"), names="none")


# ---------------------------------------------------------------------------------------- weights

def edit_tensors(change):
    def edit(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")
    return edit


def cast(dtype):
    def change(found):
        found["ladder.queries"] = found["ladder.queries"].to(dtype)
    return change


def fill(value, dtype=torch.float32):
    def change(found):
        found["ladder.queries"] = torch.full_like(found["ladder.queries"], value, dtype=dtype)
    return change


def with_header(change):
    """change: header dict -> header dict or text"""
    def edit(folder):
        file = folder / "model.safetensors"
        content = file.read_bytes()
        n, = struct.unpack("<Q", content[:8])
        header = change(json.loads(content[8:8 + n]))
        text = header if isinstance(header, str) else json.dumps(header)
        file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + content[8 + n:])
    return edit


def twice(header):
    text = json.dumps(header)
    return '{"ladder.queries": ' + json.dumps(header["ladder.queries"]) + ", " + text[1:]


def set_entry(key, value):
    def change(header):
        header["ladder.queries"][key] = value
        return header
    return change


def truncated(n: int):
    def edit(folder):
        file = folder / "model.safetensors"
        os.truncate(file, n if n >= 0 else file.stat().st_size + n)
    return edit


def weight_cases():
    changes = {dtype: edit_tensors(cast(getattr(torch, dtype))) for dtype in (
        "int8", "int16", "int32", "int64", "uint8", "bool", "complex64", "float8_e4m3fn",
        "float8_e5m2", "float64")}
    changes |= {
        "1e300 in float64": edit_tensors(fill(1e300, torch.float64)),
        "NaN": edit_tensors(fill(float("nan"))), "inf": edit_tensors(fill(float("inf"))),
        "no queries": edit_tensors(lambda t: t.pop("ladder.queries")),
        "one more": edit_tensors(lambda t: t.update(x=torch.zeros(2))),
        "a name with escapes": edit_tensors(lambda t: t.update({"\x1b[2J\n": torch.zeros(2)})),
        "a name of 1 MB": edit_tensors(lambda t: t.update({"x" * 1_000_000: torch.zeros(2)})),
        "no values": edit_tensors(lambda t: t.update({"ladder.queries": torch.zeros(0)})),
        "another shape": edit_tensors(lambda t: t.update({"ladder.queries": torch.zeros(9, 64)})),
        "no tensors": edit_tensors(dict.clear),
        "a tensor twice": with_header(twice),
        "offsets backwards": with_header(set_entry("data_offsets", [10, 0])),
        "offsets beyond": with_header(set_entry("data_offsets", [0, 10 ** 15])),
        "offsets of text": with_header(set_entry("data_offsets", "x")),
        "a shape below 0": with_header(set_entry("shape", [-1, 64])),
        "a shape too large": with_header(set_entry("shape", [2 ** 40, 2 ** 40])),
        "a dtype unknown": with_header(set_entry("dtype", "F31")),
        "a header that is a list": with_header(lambda header: "[]"),
        "a header cut": with_header(lambda header: json.dumps(header)[:-5]),
        "a header nested": with_header(lambda header: "[" * 100_000),
        "a header too long": write("model.safetensors", struct.pack("<Q", 2 ** 63) + b"{}"),
        "a pickle": write("model.safetensors", b"\x80\x04\x95\x10\x00"),
        "a second file of it": lambda folder: shutil.copyfile(
            folder / "model.safetensors", folder / "model-00001-of-00001.safetensors"),
    }
    for what, edit in changes.items():
        yield Case(f"weights: {what}", load, edit_model(edit), "error", "safetensors|missing")
    for n in (0, 1, 7, 8, 9, 100, 5000, -1, -1000):
        yield Case(f"weights: cut at {n}", load, edit_model(truncated(n)), "error", "safetensors")
    copy = lambda folder: shutil.copyfile(folder / "model.safetensors",      # noqa: E731
                                          folder / "model-best.safetensors")
    yield Case("weights: somebody's copy", load, edit_model(copy), "works")


# -------------------------------------------------------------------------------------- tokenizer

def tokenizer_cases():
    values = {
        "truncation": '{"direction": "Right", "max_length": 2, "strategy": "LongestFirst", '
                      '"stride": 0}',
        "padding": '{"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": null, '
                   '"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}',
        "model": "{}", "model.vocab": "{}", "model.merges": '["x"]', "added_tokens": "[]",
        "model.type": '"Pickle"', "normalizer": "{}", "decoder": "3", "pre_tokenizer": "[]",
    }
    for key, value in values.items():
        # These two are meant for other programs, and are not followed.
        expected = "works" if key in ("truncation", "padding") else "error"
        yield Case(f"tokenizer.json: {key}", load,
                   edit_model(edit_json("tokenizer.json", key, value)), expected, "tokenizer.json")

    def beyond(folder):
        file = folder / "tokenizer.json"
        found = json.loads(file.read_text())
        found["model"]["vocab"]["qqq"] = 10 ** 6
        found["added_tokens"][0]["id"] = 10 ** 7
        file.write_text(json.dumps(found))
    yield Case("tokenizer.json: ids beyond the table", load, edit_model(beyond), "error",
               "tokenizer.json")


# ---------------------------------------------------------------------------------- public configs

PUBLIC = ("qwen/config.json", "sana/transformer/config.json", "sana/vae/config.json",
          "tbac/config.json")


def convert(folder):
    weights_convert.convert(folder / "qwen", folder / "sana", folder / "tbac", folder / "out")


def edit_public(name, edit):
    def arrange(folder):
        for part in ("qwen", "sana", "tbac"):
            shutil.copytree(TINY / part, folder / part)
        edit(folder)
    return arrange


def read_public(folder):
    weights_convert.read_config(folder / "qwen", folder / "sana", folder / "tbac")


def public_keys():
    for name in PUBLIC:
        found = json.loads((TINY / name).read_text())
        for key, value in found.items():
            if isinstance(value, dict):
                yield from ((name, f"{key}.{inner}") for inner in value)
            yield name, key


def public_cases():
    """Of what is read of them: other keys may hold anything."""
    for name, key in public_keys():
        for value in ("null", "-1", '"x"', "NaN", "1.5", "[]", None):
            yield Case(f"{name}: {key} = {value}", read_public,
                       edit_public(name, edit_json(name, key, value)), "any", "config")
    for name in PUBLIC:
        for content in (b"", b"[]", b"\xff", b"{}", b"[" * 200_000):
            yield Case(f"{name}: {content[:5]}", read_public,
                       edit_public(name, write(name, content)), "error", "config.json")


def conversion_cases():
    def halve(folder):
        for file in folder.rglob("*.safetensors"):
            found = {name: t.to(torch.int8) for name, t in load_file(file).items()}
            save_file(found, file)

    def damage(folder):
        file = next((folder / "tbac").glob("*.safetensors"))
        found = load_file(file)
        found[min(found)][...] = float("nan")
        save_file(found, file)

    yield Case("conversion: int8", convert, edit_public("", halve), "error", "safetensors")
    yield Case("conversion: NaN", convert, edit_public("", damage), "error", "not finite")
    for out in ("qwen", "sana/transformer", "sana", "tbac/new", "."):
        yield Case(f"conversion: --out {out}", command(
            weights_convert.main, "--qwen", "{}/qwen", "--sana", "{}/sana", "--tbac", "{}/tbac",
            "--out", "{}/" + out), edit_public("", lambda folder: None), "error", "--out")
