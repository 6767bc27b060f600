"""Data as people really have them: tars and folders from many machines, and records that somebody
made to do harm. Each record is an example, or is named with what is wrong with it; the others go
on."""
import csv
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import tarfile

import pytest
import torch
from PIL import Image

import train
from engine import data, limits, sources
from engine.pictures import Unusable, open_image
from mllm import Tokenizer
from tests.conftest import TINY
from vit import patchify


def picture(colour="red", size=(80, 60), kind="png"):
    f = io.BytesIO()
    Image.new("RGB", size, colour).save(f, kind)
    return f.getvalue()


def add(tar, name, content, **header):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in header.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def write_tar(file, *members):
    """members: (name, bytes)"""
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return file


def read_all(spec, size=None):
    """-> prompts of what can be used, and what is wrong with the rest"""
    source = sources.open_source(str(spec), {}, 0, size)
    good, bad = [], []
    for location in source.locations():
        try:
            good.append(source.read(location))
        except Unusable as e:
            bad.append(str(e))
    return good, bad


def prompts_of(spec):
    good, bad = read_all(spec)
    return [example.prompt for example in good], bad


GOOD = [("ok.jpg", picture()), ("ok.txt", b"fine")]


# ---------------------------------------------------------------------------------------- tars

def test_a_key_that_comes_again_at_once_is_another_record(tmp_path):
    members = [("1.png", picture("red")), ("1.txt", b"red"), ("1.png", picture("blue")),
               ("1.txt", b"blue")]
    good, bad = read_all(write_tar(tmp_path / "a.tar", *members))
    assert [(e.prompt, e.target.getpixel((0, 0))) for e in good] == \
           [("red", (255, 0, 0)), ("blue", (0, 0, 255))]
    assert not bad and good[0].name != good[1].name


@pytest.mark.parametrize("names", [
    ("1.png", "1.png", "1.txt", "1.txt"), ("1.png", "1.txt", "1.png"), ("1.png", "1.PNG", "1.txt")])
def test_parts_of_one_key_that_do_not_divide_are_one_named_record(tmp_path, names):
    members = [(name, b"x" if name.endswith("txt") else picture()) for name in names]
    prompts, bad = prompts_of(write_tar(tmp_path / "a.tar", *members, *GOOD))
    assert prompts == ["fine"]
    assert len(bad) == 1 and "a.tar: 1, byte 512: parts of several records" in bad[0]
    assert ".png, " in bad[0]


@pytest.mark.parametrize("names", [("1.jpg", "1.txt", "1.png"), ("1.jpg", "1.target.png", "1.txt"),
                                   ("1.source.jpg", "1.source.png", "1.jpg", "1.txt")])
def test_two_pictures_for_one_role_are_one_named_record(tmp_path, names):
    members = [(name, b"x" if name.endswith("txt") else picture()) for name in names]
    prompts, bad = prompts_of(write_tar(tmp_path / "a.tar", *members, *GOOD))
    assert prompts == ["fine"]
    assert len(bad) == 1 and "1, byte 512: the record has several pictures for one" in bad[0]


def test_only_source_and_a_number_is_a_source(tmp_path):
    members = [("1.source_mask.png", picture("blue")), ("1.source2.png", picture()),
               ("1.png", picture()), ("1.json", b"{}"), ("1.txt", b"x")]
    (example,), bad = read_all(write_tar(tmp_path / "a.tar", *members))
    assert not bad and len(example.images) == 1
    assert example.images[0].getpixel((0, 0)) == (255, 0, 0)


MAC = ["._1.png", "1.png", "._1.txt", "1.txt", ".DS_Store", "__MACOSX/1.png", "__MACOSX/._1.txt",
       "Thumbs.db", "desktop.ini", "README"]


@pytest.mark.parametrize("format", ["gnu", "pax", "ustar"])
@pytest.mark.skipif(not shutil.which("tar"), reason="no tar program")
def test_what_a_mac_or_windows_leaves_is_no_record(tmp_path, format):
    """In a tar by the tar program. Also a byte-order mark, and the end of the line."""
    (tmp_path / "__MACOSX").mkdir()
    for name in MAC:
        (tmp_path / name).write_bytes(b"\0\5\x16\7 junk")
    (tmp_path / "1.png").write_bytes(picture())
    (tmp_path / "1.txt").write_bytes(b"\xef\xbb\xbfred \r\n")
    for names in (MAC, [f"./{name}" for name in MAC]):
        subprocess.run(["tar", f"--format={format}", "-cf", tmp_path / "a.tar", *names],
                       cwd=tmp_path, check=True)
        assert prompts_of(tmp_path / "a.tar") == (["red"], [])


def test_the_reasons_say_what_makes_a_key_and_that_neighbours_belong_together(tmp_path):
    dotted = [("Track 2.0 x.jpg", picture()), ("Track 2.0 x.txt", b"x")]
    _, bad = prompts_of(write_tar(tmp_path / "a.tar", *dotted))
    assert len(bad) == 1 and "Track 2, byte 512" in bad[0] and ".0 x.jpg" in bad[0]
    assert "first dot ends the key" in bad[0]
    apart = [("1.jpg", picture()), ("2.jpg", picture()), ("1.txt", b"x"), ("2.txt", b"x")]
    _, bad = prompts_of(write_tar(tmp_path / "b.tar", *apart))
    assert len(bad) == 4 and all("neighbours" in message for message in bad)


def test_a_compressed_tar_is_named_with_what_to_do(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name, content in GOOD:
            add(tar, name, content)
    shutil.copy(tmp_path / "a.tar.gz", tmp_path / "hidden.tar")
    for spec in (tmp_path / "a.tar.gz", tmp_path / "*.tar.gz"):
        with pytest.raises(ValueError, match="a.tar.gz is compressed.*gunzip"):
            sources.open_source(str(spec), {}, 0)
    assert "hidden.tar: compressed, all of it is lost" in prompts_of(tmp_path / "hidden.tar")[1][0]
    (tmp_path / "hidden.tar").unlink()
    with pytest.raises(ValueError, match="no such files(.|\n)*compressed"):
        sources.open_source(str(tmp_path), {}, 0)


def test_a_second_tar_behind_the_end_mark_is_named(tmp_path):
    once = write_tar(tmp_path / "a.tar", *GOOD).read_bytes()
    (tmp_path / "a.tar").write_bytes(once + once)
    prompts, (bad,) = prompts_of(tmp_path / "a.tar")
    assert prompts == ["fine"] and "more follows its end mark" in bad


def test_links_and_pieces_are_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, kind in (("1", tarfile.SYMTYPE), ("2", tarfile.LNKTYPE)):
            add(tar, f"{key}.txt", b"x")
            add(tar, f"{key}.jpg", b"", type=kind, linkname="/etc/passwd")
        for name, content in GOOD:
            add(tar, name, content)
    prompts, bad = prompts_of(tmp_path / "a.tar")
    assert prompts == ["fine"]
    assert len(bad) == 2 and all("a member is a link" in message for message in bad)


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar program")
@pytest.mark.parametrize("how", [("--format=gnu",), *(
    ("--format=pax", f"--sparse-version={version}") for version in ("0.0", "0.1", "1.0"))])
def test_a_sparse_member_is_named(tmp_path, how):
    """Its bytes lie in pieces: what stands in one place would be another picture."""
    with open(tmp_path / "1.jpg", "wb") as f:
        f.write(picture())
        f.truncate(1 << 20)
    for name, content in (("1.txt", b"x"), *GOOD):
        (tmp_path / name).write_bytes(content)
    subprocess.run(["tar", "-S", *how, "-cf", "a.tar", "1.jpg", "1.txt", "ok.jpg", "ok.txt"],
                   cwd=tmp_path, check=True)
    prompts, (bad,) = prompts_of(tmp_path / "a.tar")
    assert prompts == ["fine"] and "1, byte" in bad and "sparse" in bad


# ------------------------------------------------------------------------- tars that do harm

def header(name, size, kind=tarfile.REGTYPE):
    """One header. A size that is negative is written as some programs read it."""
    member = tarfile.TarInfo(name)
    member.type = kind
    member.size = max(0, size)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        block[124:136] = b"\xff" + (size % 2 ** 88).to_bytes(11, "big")
        block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:512]))
    return bytes(block)


def pax(key, value):
    """A pax header with one entry."""
    entry = f" {key}={value}\n"
    length = len(entry)
    while len(f"{length}{entry}") != length:
        length = len(f"{length}{entry}")
    content = f"{length}{entry}".encode()
    blocks = -(-len(content) // 512)
    return header("pax", len(content), tarfile.XHDTYPE) + content.ljust(512 * blocks, b"\0")


HUGE = 2 ** 50
HARM = {
    "a member of 2^50 bytes": header("1.jpg", HUGE),
    "the same by pax": pax("size", HUGE) + header("1.jpg", 10),
    "a pax header of 2^50 bytes": header("x", HUGE, tarfile.XHDTYPE),
    "a name of 2^50 bytes": header("x", HUGE, tarfile.GNUTYPE_LONGNAME),
    "a negative size": header("1.jpg", -1024),
    "a negative pax header": header("x", -1024, tarfile.XHDTYPE),
    "a negative name": header("x", -1024, tarfile.GNUTYPE_LONGNAME),
    "headers of headers": header("x", 0, tarfile.XHDTYPE) * 5000,
    "a number beyond all": header("x", 512, tarfile.XHDTYPE) + b"9" * 20 + b" a=b\n" + bytes(487),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
@pytest.mark.parametrize("first", [True, False], ids=["at the start", "after a record"])
def test_a_header_that_claims_too_much_is_a_named_end(tmp_path, harm, first):
    """In no time, in little memory. (Of the record before, more might have come.)"""
    good = write_tar(tmp_path / "a.tar", *GOOD, *GOOD).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        end = tar.getmembers()[-1].offset_data + 512
    (tmp_path / "a.tar").write_bytes((b"" if first else good[:end]) + harm + bytes(10240))
    prompts, bad = prompts_of(tmp_path / "a.tar")
    assert prompts == [] and len(bad) == 1
    assert "a.tar: damaged tar, the rest of it is lost" in bad[0]


def test_a_sparse_member_that_claims_2_to_the_50_is_named(tmp_path):
    good = write_tar(tmp_path / "a.tar", ("1.txt", b"x"), *GOOD).read_bytes()
    harm = b"".join(pax(f"GNU.sparse.{key}", value) for key, value in
                    (("major", 1), ("minor", 0), ("name", "1.jpg"), ("realsize", HUGE)))
    # pax() writes a header for each entry; they all belong to one.
    entries = b"".join(harm[i + 512:i + 1024].rstrip(b"\0") for i in range(0, len(harm), 1024))
    harm = header("pax", len(entries), tarfile.XHDTYPE) + entries.ljust(512, b"\0")
    harm += header("x", 1024) + b"1\n0\n5\n".ljust(1024, b"\0")
    (tmp_path / "a.tar").write_bytes(harm + good)
    prompts, (bad,) = prompts_of(tmp_path / "a.tar")
    assert prompts == ["fine"] and "1, byte" in bad and "sparse" in bad


def test_what_is_too_large_is_named_and_not_read(tmp_path):
    many = [(f"2.source{i}.png", picture(size=(8, 8))) for i in range(limits.MAX_SOURCES + 1)]
    more = [(f"3.source{i}.png", b"") for i in range(10_000)]
    members = [("1.txt", b"x" * 60_000_000), ("1.jpg", picture()), *many, ("2.txt", b"x"),
               ("2.jpg", picture()), *more, ("3.txt", b"x"), ("3.jpg", picture()), *GOOD]
    prompts, bad = prompts_of(write_tar(tmp_path / "a.tar", *members))
    assert prompts == ["fine"]
    for message, reason in zip(bad, (
            f"1, byte 512: a member has more than {limits.MAX_CAPTION_BYTES} bytes: .txt has 60000",
            f"the record has more than {limits.MAX_SOURCES} pictures to start from: 17",
            f"more than {limits.MAX_RECORD_MEMBERS} members in a row have one key"), strict=True):
        assert reason in message and len(message) < 1000


def test_sources_have_a_limit_together(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_PIXELS", 80 * 60 * 2)
    three = [(f"1.source{i}.png", picture()) for i in range(3)]
    members = [*three, ("1.png", picture()), ("1.txt", b"x"), *GOOD]
    prompts, (bad,) = prompts_of(write_tar(tmp_path / "a.tar", *members))
    assert prompts == ["fine"] and "picture has more than 0 pixels: 80 x 60" in bad


def test_names_are_escaped_and_cut(tmp_path):
    names = ("\x1b[2J\n", "x" * 5000)
    members = [(f"{name}.jpg", picture()) for name in names]
    _, bad = prompts_of(write_tar(tmp_path / "a.tar", *members))
    assert len(bad) == 2 and r"\x1b[2J\n, byte" in bad[0]
    assert all(message.isprintable() and len(message) < 1000 for message in bad)


# ------------------------------------------------------------------------------------- folders

def imagefolder(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture())
    return folder


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_metadata_csv(tmp_path, encoding, end):
    """With train/ and sub-folders; commas, quotes and line ends in a text; a quote that opens
    nothing; empty lines."""
    folder = imagefolder(tmp_path, "train/0.png", "train/cats/é 1.png")
    rows = [("file_name", "text", "more"), ("0.png", "plain", ""),
            ("cats/é 1.png", 'a "quoted", long' + end + "text", "y")]
    with open(folder / "train" / "metadata.csv", "w", newline="", encoding=encoding) as f:
        csv.writer(f, lineterminator=end).writerows(rows)
        f.write(f'0.png,5" pipe,x{end}{end}0.png,last,x')
    prompts, bad = prompts_of(folder)
    assert prompts == ["plain", f'a "quoted", long{end}text', '5" pipe', "last"]
    assert not bad


def test_what_is_wrong_with_a_row_of_csv(tmp_path):
    """By the line that it begins at."""
    folder = imagefolder(tmp_path, "0.png")
    rows = ['file_name,text', '0.png,"two', 'lines"', '0.png', '0.png,x,y', '0.png,', ',x',
            '1.png,x', f'0.png,"{"x" * 200_000}"', '0.png,fine', '0.png,"never closed', '0.png,x']
    (folder / "metadata.csv").write_text("\n".join(rows))
    prompts, bad = prompts_of(folder)
    assert prompts == ["two\nlines", "fine"]
    reasons = {4: "1 fields, expected 2", 5: "3 fields, expected 2", 6: "no text: it has file_name",
               7: "no picture to draw: it has text", 8: "1.png is missing", 9: "a quote never",
               11: "is a quote never closed?"}
    for message, (line, reason) in zip(bad, reasons.items(), strict=True):
        assert f"metadata.csv, line {line}" in message and reason in message


@pytest.mark.parametrize("header, message", [
    ("file,caption\n", "its columns are file, caption; expected text, and file_name"),
    ("file_name;text\n", "its columns are file_name;text; expected"),
    ("", "its columns are ;"), ("\xff\xfef", "does not begin with names of columns")])
def test_a_csv_file_without_its_columns_is_an_error_at_once(tmp_path, header, message):
    (tmp_path / "metadata.csv").write_bytes(header.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        sources.open_source(str(tmp_path), {}, 0)


def test_two_files_of_metadata_are_an_error(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "metadata.jsonl").write_text("{}")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match="metadata.jsonl and .*train/metadata.csv: keep one"):
        sources.open_source(str(tmp_path), {}, 0)


def jsonl(folder, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    return folder


def test_jsonl_of_windows(tmp_path):
    folder = imagefolder(tmp_path, "0.png", "sub/1.png")
    rows = dict(file_name="0.png", text="\ufeffone\r\n"), dict(file_name="sub/1.png", text="two")
    assert prompts_of(jsonl(folder, *rows)) == (["one", "two"], [])


def test_no_path_leads_out_of_the_folder(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    folder = imagefolder(tmp_path / "data", "0.png", "sub/1.png")
    (folder / "out.png").symlink_to(secret)
    (folder / "sub" / "up").symlink_to(tmp_path)
    (folder / "in.png").symlink_to("sub/1.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "fifo.png")
    out = ["../secret.png", str(secret), "out.png", "sub/up/secret.png", "sub/../../secret.png",
           "/dev/zero", "/etc/passwd"]
    odd = ["loop.png", "a\0b", "x" * 5000, "fifo.png", "sub", ""]
    rows = [dict(file_name=name, text=name[:9]) for name in (*out, *odd, "in.png", "sub/../0.png")]
    rows += [dict(target="0.png", source=["0.png", name], text="x") for name in out]
    prompts, bad = prompts_of(jsonl(folder, *rows))
    assert prompts == ["in.png", "sub/../0."]
    assert sum("leads out of the folder" in message for message in bad) == 2 * len(out)
    assert len(bad) == 2 * len(out) + len(odd)
    # The folder itself may be reached by a link.
    (tmp_path / "link").symlink_to(folder)
    assert prompts_of(tmp_path / "link")[0] == prompts


def test_lines_that_do_harm(tmp_path):
    folder = imagefolder(tmp_path, "0.png")
    fine = b'{"file_name": "0.png", "text": %s}'
    rows = [b"[" * 200_000, fine % (b"[" * 200_000 + b"]" * 200_000), fine % (b"9" * 6000),
            fine % (b'"' + b"x" * 60_000_000 + b'"'), fine % (b'"' + b"x" * 70_000 + b'"'),
            dict(target="0.png", source=["0.png"] * 10_000, text="x"), fine % b'"\xff"',
            fine % b'"a", "text": "b"', b"null", fine % b'"fine"']
    prompts, bad = prompts_of(jsonl(folder, *rows))
    assert prompts == ["fine"] and len(bad) == 9
    assert all(len(message) < 1000 for message in bad)
    reasons = ("brackets", "brackets", "digits", "has more than 1048576 bytes",
               "the text has more than 65536", "10000", "utf-8", "twice", "not an object")
    for message, reason in zip(bad, reasons):
        assert reason in message, message


# --------------------------------------------------------------- what is decided, record by record

@pytest.mark.parametrize("text, size, reason", [
    (b"", (80, 60), "the text is empty"),
    (b" \n\t", (80, 60), "the text is empty"),
    (b"\xef\xbb\xbf\r\n", (80, 60), "the text is empty"),
    (b"\xff\xfer\0e\0d\0", (80, 60), "the text is not UTF-8"),
    (b"a <|image_pad|> b", (80, 60), "the text holds <|image_pad|>"),
    (b"x" * (limits.MAX_CAPTION_BYTES + 1), (80, 60), "bytes"),
    (b"x", (1, 1), "a picture to draw has a side of less than 8 pixels: 1 x 1"),
    (b"x", (7, 60), "a picture to draw has a side of less than 8 pixels: 7 x 60"),
    (b"x", (8, 1601), "a picture is too thin"),
    (b"x", (8, 1600), None), (b"x", (27, 29), None), (b"x", (31, 639), None),
    (b"x" * limits.MAX_CAPTION_BYTES, (8, 8), None),
])
def test_a_record_that_cannot_be_used_is_named(tmp_path, text, size, reason):
    members = [("1.png", picture(size=size)), ("1.txt", text)]
    good, bad = read_all(write_tar(tmp_path / "a.tar", *members, *GOOD), 32)
    assert len(good) == 2 - len(bad)
    if reason:
        assert reason in bad[0] and "a.tar: 1, byte 512" in bad[0]
    assert all(example.target.size == (32, 32) for example in good)


def test_a_picture_to_start_from_may_be_small_but_not_thin(tmp_path):
    rest = [("1.png", picture()), ("1.txt", b"x")]
    good, bad = read_all(write_tar(tmp_path / "a.tar", ("1.source.png", picture(size=(1, 1))),
                                   *rest))
    assert good[0].images[0].size == (1, 1) and not bad
    thin = ("1.source.png", picture(size=(201, 1)))
    assert "source: a picture is too thin" in prompts_of(
        write_tar(tmp_path / "a.tar", thin, *rest))[1][0]


TEXTS = ("<|image_pad|>", "a<|image_pad|>b", "<|im_end|>", "<|vision_start|>", "<|im_start",
         "<|vision_end|><|endoftext|>", "<|image_pad |>", "<|IMAGE_PAD|>")


def refused(function, *args):
    try:
        function(*args)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("size", [(31, 639), (1, 1), (200, 1), (201, 1)])
@pytest.mark.parametrize("text", TEXTS)
def test_what_the_reader_lets_pass_the_mllm_reads(tiny, text, size):
    """And what the MLLM refuses, the reader refuses: no record ends a run."""
    image = Image.new("RGB", size)
    source = sources.Generated(lambda rng, i: sources.Example(text, (image,), image), 0)
    wrong = "<|image_pad|>" in text or size == (201, 1)
    assert refused(tiny.encode, [text], [[image]]) == wrong
    assert refused(source.read, 0) == wrong


def test_other_control_tokens_are_read_as_such():
    """As in the released code."""
    tokenizer = Tokenizer(TINY / "qwen" / "tokenizer.json")
    ids = tokenizer.encode("a <|im_end|> b <|vision_start|>")
    assert tokenizer.special["im_end"] in ids and ids[-1] == tokenizer.special["vision_start"]


def test_a_bad_caption_does_not_end_a_run(tmp_path):
    """It did: the reader let it pass, the loop raised, and --resume met it again."""
    folder = imagefolder(tmp_path / "data", "0.png")
    rows = [dict(file_name="0.png", text=text) for text in ("a", "<|image_pad|>", "b", "c")]
    jsonl(folder, *rows)
    words = ["--data", folder, "--steps", 3, "--batch", 2, "--out", tmp_path / "out", "--size", 32,
             "--max-bad", 0.9, "--sheet-every", 0, "--dtype", "float32"]
    run = train.Run(train.options([str(word) for word in words]))
    assert [report.step for report in run.steps()] == [1, 2, 3]
    assert any("line 2: the text holds <|image_pad|>" in bad for bad in run.reader.bad)


def test_training_sees_what_drawing_sees(tmp_path, tiny):
    """A picture to start from is resized once, uncropped, as in the released code; only the picture
    to draw becomes a square."""
    noise = torch.rand(45, 90, 3, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray((255 * noise).byte().numpy())
    for name, size in (("wide", (90, 45)), ("tall", (50, 210)), ("large", (900, 700))):
        image.resize(size).save(tmp_path / f"{name}.png")
        jsonl(tmp_path, dict(source=f"{name}.png", target=f"{name}.png", text="x"))
        source = sources.source(str(tmp_path), {}, 0, 32)
        (_, example), = itertools.islice(data.Reader(data.Share([source], [1], 0, 0, [(1, [0])])),
                                         1)
        drawn = open_image(tmp_path / f"{name}.png")
        assert example.images[0].size == drawn.size == size
        assert example.target.size == (32, 32)
        # 0.9: neither text nor picture is dropped.
        rng = random.Random(0)
        rng.random = lambda: 0.9
        _, (seen,) = train.drop_condition(example, rng, 0.1)
        config = tiny.mllm.config.vision
        patches, grid = patchify(seen, config)
        want, want_grid = patchify(drawn, config)
        assert grid == want_grid and torch.equal(patches, want)
        # A square of it would be seen otherwise.
        assert patchify(sources.square(drawn, 32), config)[1] != grid or size == (900, 700)


# ----------------------------------------------------------------------------------- what is named

@pytest.mark.parametrize("spec, message", [
    ("a-{0..99999999999}.tar", "a range of 1 to 100000 files"),
    ("a-{0..100000}.tar", "a range of 1 to 100000 files"),
    ("a-{5..0}.tar", "a range of 1 to 100000 files"),
    (f"a-{{0..{'9' * 5000}}}.tar", "a range of 1 to 100000 files"),
    ("a-{0..99999}.tar", "no such files"),
    ("/dev/null", "is not a regular file"),
])
def test_what_cannot_be_meant(spec, message):
    with pytest.raises(ValueError, match=message) as e:
        sources.open_source(spec, {}, 0)
    assert len(str(e.value)) < 1000


def test_a_fifo_among_tars_is_named(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    for spec in (tmp_path, tmp_path / "a.tar", tmp_path / "*.tar"):
        with pytest.raises(ValueError, match="a.tar is not a regular file"):
            sources.open_source(str(spec), {}, 0)


def test_a_source_of_which_nothing_can_be_used_is_named_soon(tmp_path):
    """After a thousand records."""
    jsonl(tmp_path, *[dict(file_name="0.png", text=str(i)) for i in range(2000)])
    with pytest.raises(ValueError, match=r"not one .*of the first 1000") as e:
        sources.source(str(tmp_path), {}, 0, 32)
    assert str(e.value).count("\n") == 10
