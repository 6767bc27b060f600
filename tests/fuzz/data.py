"""Hostile data: records in folders and in tars, each beside a good one. `engine.data --check` reads
them as training does; some are trained on."""
import io
import json
import os
import tarfile

from PIL import Image

from engine import data
from tests.fuzz.commands import PICTURES, PLACES, model, run
from tests.fuzz.harness import Case, command

CHECK = command(data.main, "{}/data", "--check")


def picture(kind: str = "png") -> bytes:
    f = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(f, kind)
    return f.getvalue()


# ------------------------------------------------------------------------------------------ folders

def folder_with(line: bytes, name: str = "metadata.jsonl", make=None):
    """arrange: a folder with a good record, then this line"""
    def arrange(folder):
        (folder / "secret.png").write_bytes(picture())
        (folder / "data").mkdir()
        (folder / "data" / "good.png").write_bytes(picture())
        good = b'{"file_name": "good.png", "text": "x"}\n'
        if name.endswith("csv"):
            good = b"file_name,text\ngood.png,x\n"
        (folder / "data" / name).write_bytes(good + line + b"\n")
        if make:
            make(folder / "data")
    return arrange


def row(**entries) -> bytes:
    return json.dumps(dict(file_name="good.png", text="x") | entries).encode()


LINES = {
    "out of the folder": row(file_name="../secret.png"), "absolute": row(file_name="/etc/hostname"),
    "a device": row(file_name="/dev/zero"), "no such file": row(file_name="none.png"),
    "a name of NUL": row(file_name="a\0b.png"), "a name of escapes": row(file_name="\x1b[2J.png"),
    "half a letter": row(file_name="\ud800.png"), "a long name": row(file_name="x" * 10_000),
    "the folder itself": row(file_name="."), "no name": row(file_name=""),
    "a name that is a number": row(file_name=3), "no text": row(text=None),
    "a text that is a list": row(text=["x"]), "half a letter in the text": row(text="\ud800"),
    "an empty text": row(text=""), "a text of 100 kB": row(text="x" * 100_000),
    "an image token": row(text="<|image_pad|>"), "sources of numbers": row(source=[1]),
    "a source out of the folder": row(source="../secret.png"),
    "100 sources": row(source=["good.png"] * 100), "a source that is none": row(source=["none"]),
    "nested": b"[" * 200_000, "nested objects": b'{"a":' * 100_000, "a list": b"[1]",
    "a number": b"3", "cut": b'{"file_name": "go', "bytes": b"\xff\xfe", "NUL": b"\0",
    "a line of 3 MB": row(more="x" * 3_000_000), "a long number": b"9" * 1_000_000,
    "a key twice": b'{"file_name": "good.png", "file_name": "../secret.png", "text": "x"}',
}
CSV = {
    "out of the folder": b"../secret.png,x", "three fields": b"good.png,x,y",
    "one field": b"good.png",
    "an open quote": b'"good.png,x' + b"\ny" * 100, "bytes": b"\xff,x", "NUL": b"\0,x",
    "a field of 3 MB": b"good.png," + b"x" * 3_000_000,
}


def folder_cases():
    for what, line in LINES.items():
        yield Case(f"metadata.jsonl: {what}", CHECK, folder_with(line), "any",
                   "metadata|data|error")
    for what, line in CSV.items():
        yield Case(f"metadata.csv: {what}", CHECK, folder_with(line, "metadata.csv"), "any",
                   "metadata|data|error")
    for what, make in PLACES.items():
        if what not in ("a folder", "a text", "a JPEG"):
            yield Case(f"a picture is {what}", CHECK, folder_with(
                row(file_name="in.png"), make=lambda folder, make=make: make(folder / "in.png")),
                names="metadata.jsonl, line 2")
    for what, content in PICTURES.items():
        yield Case(f"a picture is {what}", CHECK, folder_with(
            row(file_name="in.jpg"),
            make=lambda folder, content=content: (folder / "in.jpg").write_bytes(content)),
            names="metadata.jsonl, line 2")
    for name in ("metadata.jsonl", "metadata.csv"):
        for what in ("a FIFO", "a link to a device", "a folder", "an empty file"):
            def arrange(folder, name=name, what=what):
                (folder / "data").mkdir()
                PLACES[what](folder / "data" / name)
            yield Case(f"{name} is {what}", CHECK, arrange)


# --------------------------------------------------------------------------------------------- tars

def add(tar, name: str, content: bytes = b"", **header) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in header.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def tar_with(*members, change=None, format=tarfile.PAX_FORMAT):
    """arrange: a tar with a good record, then these (name, bytes, header); change(file content)"""
    def arrange(folder):
        f = io.BytesIO()
        with tarfile.open(fileobj=f, mode="w", format=format) as tar:
            add(tar, "ok.png", picture())
            add(tar, "ok.txt", b"fine")
            for name, content, header in members:
                add(tar, name, content, **header)
        content = f.getvalue()
        (folder / "data").mkdir()
        (folder / "data" / "a.tar").write_bytes(change(content) if change else content)
    return arrange


def pax(**headers):
    return dict(pax_headers=headers)


PNG, TEXT = ("1.png", picture(), {}), ("1.txt", b"x", {})
MEMBERS = {
    "a link": [("1.png", b"", dict(type=tarfile.SYMTYPE, linkname="/etc/passwd")), TEXT],
    "a hard link": [("1.png", b"", dict(type=tarfile.LNKTYPE, linkname="ok.png")), TEXT],
    "a device": [("1.png", b"", dict(type=tarfile.CHRTYPE)), TEXT],
    "a FIFO": [("1.png", b"", dict(type=tarfile.FIFOTYPE)), TEXT],
    "a folder": [("1.png", b"", dict(type=tarfile.DIRTYPE)), TEXT],
    "no text": [PNG], "no picture": [TEXT], "two texts": [PNG, TEXT, TEXT],
    "a text of 1 MB": [PNG, ("1.txt", b"x" * 1_000_000, {})],
    "a text of bytes": [PNG, ("1.txt", b"\xff\xfe\xfd", {})],
    "an empty text": [PNG, ("1.txt", b"", {})], "an empty picture": [("1.png", b"", {}), TEXT],
    "a path upwards": [("../../1.png", picture(), {}), ("../../1.txt", b"x", {})],
    "a name of escapes": [("\x1b[2J.png", b"x", {}), ("\x1b[2J.txt", b"x", {})],
    "a name of bytes": [("\udcff.png", b"x", {}), ("\udcff.txt", b"x", {})],
    "a pax size": [("1.png", picture(), pax(size="9" * 15)), TEXT],
    "a pax size of text": [("1.png", picture(), pax(size="x")), TEXT],
    "a pax size below 0": [("1.png", picture(), pax(size="-5")), TEXT],
    "pax sparse": [("1.png", picture(), pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                                               "GNU.sparse.realsize": "1125899906842624"})), TEXT],
    "a pax header of 3 MB": [("1.png", picture(), pax(comment="x" * 3_000_000)), TEXT],
    "100 sources": [*((f"1.source{i}.png", picture(), {}) for i in range(100)), PNG, TEXT],
    "1000 parts": [*((f"1.{i}", b"", {}) for i in range(1000)), PNG, TEXT],
}
BYTES = {
    "cut in a header": lambda tar: tar[:700], "cut in a member": lambda tar: tar[:-11_000],
    "no end": lambda tar: tar.rstrip(b"\0"), "zeros in it": lambda tar: tar[:512] + bytes(2000),
    "noise behind": lambda tar: tar + os.urandom(1000),
    "a broken header": lambda tar: tar[:1024] + b"x" * 512 + tar[1536:],
    "empty": lambda tar: b"", "zeros": lambda tar: bytes(10_240), "text": lambda tar: b"x" * 5000,
}


def tar_cases():
    for what, members in MEMBERS.items():
        yield Case(f"tar: {what}", CHECK, tar_with(*members), "any", "1|2J|error|record")
    for what, members in MEMBERS.items():
        yield Case(f"tar, GNU: {what}", CHECK, tar_with(*members, format=tarfile.GNU_FORMAT), "any",
                   "1|2J|error|record")
    for what, content in PICTURES.items():
        yield Case(f"tar: a picture is {what}", CHECK, tar_with(("1.png", content, {}), TEXT),
                   names="1")
    for what, change in BYTES.items():
        yield Case(f"tar: {what}", CHECK, tar_with(PNG, TEXT, change=change), "any", "")


# --------------------------------------------------------------------------------------- training

def training_cases():
    def arrange(folder, line):
        model(folder)
        folder_with(line)(folder)

    for what in ("out of the folder", "nested", "bytes", "a text of 100 kB", "an image token",
                 "100 sources"):
        yield Case(f"training on metadata.jsonl: {what}", run("--data", "{}/data", "--max-bad", 0),
                   lambda folder, line=LINES[what]: arrange(folder, line), "any", "",
                   writes=("run/*",))


def data_cases():
    yield from folder_cases()
    yield from tar_cases()
    yield from training_cases()
