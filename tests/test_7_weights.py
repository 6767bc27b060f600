"""Weights, tokenizers and the files that hold them: what is no weight is refused, what is damaged
is named, and nothing waits for ever."""
import builtins
import json
import os
import pathlib
import shutil
import struct
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.files import (
    digest,
    read_json,
    read_tensors,
    stored_tensors,
    weight_files,
)
from engine.limits import MAX_HEADER_BYTES
from mllm import Tokenizer
from sample import TOY_FOLDER
from tbac import TBAC
from tests.conftest import TINY, run
from weights_convert import convert, export

needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def change(folder, edit):
    file = weight_files(folder)[-1]
    found = load_file(file)
    edit(found)
    save_file(found, file)


# ----------------------------------------------------------------------------- what is no weight

NOT_WEIGHTS = {
    torch.int8: "I8", torch.int16: "I16", torch.int64: "I64", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}


@pytest.mark.parametrize("dtype", NOT_WEIGHTS)
def test_only_floats_are_weights(copy, dtype):
    change(copy, lambda t: t.update({"ladder.queries": torch.ones(8, 64).to(dtype)}))
    with pytest.raises(ValueError, match="ladder.queries is stored as .*, expected F32 or F16"):
        TBAC.load(copy)


@pytest.mark.parametrize("value, stored, used", [
    (1e6, torch.float32, torch.float16),
    (torch.finfo(torch.float32).max, torch.float32, torch.bfloat16),
    (torch.inf, torch.bfloat16, torch.float32),
    (torch.nan, torch.float16, None),
])
def test_weights_are_finite_in_the_dtype_of_use(copy, value, stored, used):
    """1e6 is a number, but not one of float16's."""
    name = "ladder.connector.0.weight"
    change(copy, lambda t: t.update({name: torch.full_like(t[name], value, dtype=stored)}))
    with pytest.raises(ValueError, match=f"{name} has values that are not finite"):
        TBAC.load(copy, dtype=used)
    if torch.tensor(value).isfinite():
        assert (TBAC.load(copy).ladder.connector[0].weight == value).all()


# --------------------------------------------------------------------------------------- headers

def header_and_data(file):
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end], content[end:]


def write_header(file, header: bytes, data: bytes = b""):
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_a_name_that_stands_twice_in_one_header(copy):
    """The library alone takes one of the two."""
    file = copy / "model.safetensors"
    header, data = header_and_data(file)
    entry = json.dumps(json.loads(header)["ladder.queries"])
    write_header(file, b'{"ladder.queries":' + entry.encode() + b"," + header.lstrip()[1:], data)
    with pytest.raises(ValueError, match=f"{file}.*'ladder.queries' stands there twice"):
        TBAC.load(copy)


def test_a_name_that_stands_in_two_files(copy):
    """Shards of two saves. A copy under a name of one's own is left alone."""
    save_file({"ladder.queries": torch.zeros(8, 64)}, copy / "model-best.safetensors")
    TBAC.load(copy)
    shard = copy / "model-00001-of-00002.safetensors"
    shutil.copyfile(copy / "model-best.safetensors", shard)
    with pytest.raises(ValueError, match="ladder.queries.*not part.*or stands there twice"):
        TBAC.load(copy)


@pytest.mark.parametrize("header", [
    b"", b"{", b"[]", b"null", b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b"[" * 200_000,
    b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1125899906842624]}}',
    b'{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}',
    b'{"\xff": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
])
def test_a_damaged_header_is_named(copy, header):
    file = copy / "model.safetensors"
    write_header(file, header, b"x" * 16)
    with pytest.raises(ValueError, match=f"{file} cannot be read as safetensors"):
        TBAC.load(copy)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 8, b"\x00" * 100])
def test_a_file_that_holds_something_else(copy, content):
    file = copy / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} cannot be read as safetensors"):
        TBAC.load(copy)


def test_a_header_that_is_too_large_is_not_read(copy):
    """It takes no room on the disk: all but 8 bytes are a hole."""
    file = copy / "model.safetensors"
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", 1 << 40))
        f.truncate((1 << 40) + 8)
    with pytest.raises(ValueError, match=f"has {1 << 40} bytes, expected at most "
                                         f"{MAX_HEADER_BYTES}"):
        TBAC.load(copy)


def test_a_shape_is_refused_before_its_numbers_are_read(copy):
    """A terabyte that is a hole."""
    file = copy / "model.safetensors"
    header, data = header_and_data(file)
    end = len(data)
    tensors = json.loads(header)
    big = dict(dtype="F32", shape=[1 << 38], data_offsets=[end, end + (1 << 40)])
    write_header(file, json.dumps(tensors | dict(extra=big)).encode(), data)
    with open(file, "r+b") as f:
        f.truncate(file.stat().st_size + (1 << 40))
    # Or it cannot even be mapped, where the system promises no more memory than it has.
    with pytest.raises(ValueError, match="tensor 'extra' is not part of this model|mmap"):
        TBAC.load(copy)


# ------------------------------------------------------------------------------ a checksum of all

def test_the_shipped_weights_are_those_in_the_record():
    sums = read_json(TOY_FOLDER / "record.json")["sha256"]
    assert sums == {file.name: digest(file) for file in weight_files(TOY_FOLDER)}


def test_a_flipped_bit_is_seen(tmp_path):
    folder = shutil.copytree(TOY_FOLDER, tmp_path / "toy")
    TBAC.load(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    # The lowest bit of a number in the middle.
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is not the file that .*record.json"):
        TBAC.load(folder)
    (folder / "record.json").unlink()
    TBAC.load(folder)


@pytest.mark.parametrize("record", [[], {}, {"sha256": 3}, {"sha256": {"other": "x"}}])
def test_a_record_without_sums_says_nothing(copy, record):
    (copy / "record.json").write_text(json.dumps(record))
    TBAC.load(copy)


# -------------------------------------------------------------------------------------- tokenizer

def edit_tokenizer(folder, edit):
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    edit(found)
    file.write_text(json.dumps(found))
    return file


def drop_image_pad(t):
    t["added_tokens"] = [a for a in t["added_tokens"] if a["content"] != "<|image_pad|>"]
    t["model"]["vocab"].pop("<|image_pad|>", None)


def image_pad_as_text(t):
    """It has an id, but text is never read as it."""
    drop_image_pad(t)
    t["model"]["vocab"]["<|image_pad|>"] = 500


def an_id_beyond(t):
    t["model"]["vocab"]["late"] = 512


def lose_the_bytes(t):
    t["pre_tokenizer"] = None


@pytest.mark.parametrize("edit, message", [
    (drop_image_pad, r"special tokens missing: \['image_pad'\]"),
    (image_pad_as_text, r"special tokens missing: \['image_pad'\]"),
    (an_id_beyond, "ids up to 512, the embedding table has 512 rows"),
    (lose_the_bytes, "not byte-level"),
    (lambda t: t.pop("model"), "is not a tokenizer"),
    (lambda t: t.update(model=3), "is not a tokenizer"),
])
def test_another_tokenizer_is_named(copy, edit, message):
    file = edit_tokenizer(copy, edit)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        TBAC.load(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000])
def test_a_tokenizer_that_is_damaged(copy, content):
    file = copy / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is not a tokenizer"):
        TBAC.load(copy)


def test_truncation_and_padding_of_other_programs_are_left_out(copy):
    text = "a red circle left of a blue square"
    expected = Tokenizer(copy / "tokenizer.json").encode(text)
    pad = dict(strategy=dict(Fixed=64), direction="Right", pad_to_multiple_of=None, pad_id=0,
               pad_type_id=0, pad_token="<|endoftext|>")
    cut = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
    file = edit_tokenizer(copy, lambda t: t.update(truncation=cut, padding=pad))
    assert Tokenizer(file).encode(text) == expected
    assert len(expected) > 3


def test_the_conversion_checks_the_tokenizer_too(tmp_path):
    qwen = shutil.copytree(TINY / "qwen", tmp_path / "qwen")
    edit_tokenizer(qwen, an_id_beyond)
    with pytest.raises(ValueError, match="ids up to 512"):
        convert(qwen, TINY / "sana", TINY / "tbac", tmp_path / "out")


# ------------------------------------------------------------------------- files and their paths

def in_time(function, *args):
    """The ValueError that a function raises within 20 seconds."""
    caught = []

    def call():
        try:
            function(*args)
        except ValueError as e:
            caught.append(e)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "still waiting"
    return caught[0]


@needs_fifo
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors",
                                  "record.json"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(copy, name):
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    assert f"{copy / name} is not a regular file" in str(in_time(TBAC.load, copy))


@needs_fifo
@pytest.mark.parametrize("name", [
    "qwen/config.json", "qwen/tokenizer.json", "sana/vae/config.json", "tbac/config.json",
    "tbac/model-00001-of-00002.safetensors"])
def test_the_conversion_does_not_wait_for_a_pipe(tmp_path, name):
    for part in ("qwen", "sana", "tbac"):
        shutil.copytree(TINY / part, tmp_path / part)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    folders = [tmp_path / part for part in ("qwen", "sana", "tbac", "out")]
    assert f"{tmp_path / name} is not a regular file" in str(in_time(convert, *folders))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_or_a_broken_link_in_place_of_a_file(copy, name):
    (copy / name).unlink()
    (copy / name).symlink_to(copy / "nowhere")
    with pytest.raises(ValueError, match=f"{copy / name} is missing"):
        TBAC.load(copy)
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(ValueError, match=f"{copy / name} is not a regular file"):
        TBAC.load(copy)


def deny(*_, **__):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_not_called_missing(copy, name, monkeypatch):
    plain_open = builtins.open

    def open_all_but_one(file, *args, **kwargs):
        return deny() if str(file).endswith(name) else plain_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_all_but_one)
    with pytest.raises(ValueError, match=f"{copy / name} cannot be read: Permission denied"):
        TBAC.load(copy)


def test_a_folder_that_may_not_be_listed_is_not_called_empty(copy, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "iterdir", deny)
    with pytest.raises(ValueError, match=f"{copy} cannot be listed: Permission denied"):
        TBAC.load(copy)


def test_hidden_files_and_second_copies_are_no_weights(copy):
    """What macOS leaves beside each file on some disks, and the hub's halves."""
    (copy / "._model.safetensors").write_bytes(b"x")
    shutil.copyfile(copy / "model.safetensors", copy / "model.fp16.safetensors")
    assert weight_files(copy) == [copy / "model.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="paths are bytes elsewhere")
def test_a_path_that_is_not_utf8_is_called_so(tiny_folder, tmp_path):
    """Latin-1, as on an old disk. The tokenizer in it is one all the same."""
    folder = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le"))
    shutil.copytree(tiny_folder, folder)
    assert Tokenizer(folder / "tokenizer.json").n_id <= 512
    with pytest.raises(ValueError, match="model.safetensors: this path is not UTF-8.*rename it"):
        TBAC.load(folder)
    done = run("sample.py", "a dog", "--model", folder)
    assert "not UTF-8" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------- conversion

def released(tmp_path, edit):
    """A copy of the released layout, changed."""
    folder = shutil.copytree(TINY / "tbac", tmp_path / "tbac")
    change(folder, edit)
    return folder


BIAS = "vae.decoder.conv_out.bias"


@pytest.mark.parametrize("value, dtype, message", [
    (torch.zeros(3, dtype=torch.int8), None, "is stored as torch.int8, expected F32 or F16"),
    (torch.zeros(3, dtype=torch.float64), None, "is stored as torch.float64, expected"),
    (torch.zeros(3, dtype=torch.float64), torch.bfloat16, "is stored as torch.float64, expected"),
    (torch.full((3,), 3.4e38), torch.bfloat16, "not finite"),
])
def test_nothing_is_converted_that_could_not_be_loaded(tmp_path, value, dtype, message):
    folder = released(tmp_path, lambda t: t.update({BIAS: value}))
    with pytest.raises(ValueError, match=f"{BIAS}.*{message}"):
        convert(TINY / "qwen", TINY / "sana", folder, tmp_path / "out", dtype)
    assert not (tmp_path / "out" / "config.json").exists()


TABLE = "model.mllm_backbone.model.embed_tokens.weight"
PATCHES = "model.mllm_backbone.visual.patch_embed.proj.weight"


@pytest.mark.parametrize("name, reshape, found, expected", [
    # The released one: vocabulary, queries, two rows. Others would be cut at the wrong place.
    (TABLE, lambda t: torch.cat([t, t]), r"\(1044, 64\)", r"\(512, 64\)"),
    (TABLE, lambda t: t[0, 0].clone(), r"\(\)", r"\(512, 64\)"),
    # As many numbers, in another order.
    (PATCHES, lambda t: t.movedim(1, -1).contiguous(), r"\(32, 2, 14, 14, 3\)", r"\(32, 1176\)"),
    (PATCHES, lambda t: t.flatten(), r"\(37632,\)", r"\(32, 1176\)"),
])
def test_what_is_cut_or_flattened_has_its_shape_first(tmp_path, name, reshape, found, expected):
    folder = shutil.copytree(TINY / "tbac", tmp_path / "tbac")
    file = next(f for f in weight_files(folder) if name in stored_tensors(f))
    tensors = load_file(file)
    save_file(tensors | {name: reshape(tensors[name])}, file)
    with pytest.raises(ValueError, match=f"{name} has shape {found}, expected {expected}"):
        convert(TINY / "qwen", TINY / "sana", folder, tmp_path / "out")


@pytest.mark.parametrize("edit, message", [
    (lambda t: t["ladder.queries"].fill_(torch.nan), "ladder.queries has .* not finite"),
    (lambda t: t.update({"ladder.queries": torch.zeros(9, 64)}), "ladder.queries has shape"),
    (lambda t: t.update({"ladder.queries": torch.zeros(8, 64).long()}), "ladder.queries is stored"),
    (lambda t: t.pop("ladder.queries"), "1 tensors are missing.*ladder.queries"),
    (lambda t: t["dcae.decoder.conv_out.bias"].fill_(torch.inf), "conv_out.bias has .* not finite"),
    (lambda t: t.update({"dcae.decoder.conv_out.bias": torch.zeros(4)}), "conv_out.bias has shape"),
    (lambda t: t.update(extra=torch.zeros(4)), "tensor 'extra' is not part"),
])
def test_an_export_checks_what_it_reads(copy, tmp_path, edit, message):
    change(copy, edit)
    with pytest.raises(ValueError, match=message):
        export(copy, tmp_path / "public")
    assert not (tmp_path / "public" / "config.json").exists()


def test_a_tensor_is_read_by_its_name(tiny_folder):
    (name, tensor), = read_tensors(tiny_folder / "model.safetensors", only=["ladder.queries"])
    assert name == "ladder.queries"
    assert tensor.shape == stored_tensors(tiny_folder / "model.safetensors")[name].shape
