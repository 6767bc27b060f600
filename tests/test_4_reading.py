"""Real data: tars and folders give the same examples, the processes together see each record once
an epoch, and what is broken is named."""
import argparse
import io
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train
from engine import data, pictures, sources, stream
from tests.conftest import ROOT
from tests.test_4_pictures import only_a_header


def png(colour, size=(80, 60)):
    f = io.BytesIO()
    Image.new("RGB", size, colour).save(f, "png")
    return f.getvalue()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tar(file, records):
    """records: {key: {suffix: bytes}}"""
    with tarfile.open(file, "w") as t:
        for key, parts in records.items():
            for suffix, content in parts.items():
                add(t, f"{key}.{suffix}", content)


@pytest.fixture
def shards(tmp_path):
    """Three tars of 10, 7 and 1 records; the text is the record's number."""
    numbers = iter(range(18))
    for i, n in enumerate((10, 7, 1)):
        records = {}
        for k in itertools.islice(numbers, n):
            records[f"a/{k:04d}"] = {"png": png((k, 0, 0)), "txt": str(k).encode()}
        tar(tmp_path / f"s-{i:03d}.tar", records)
    return tmp_path


def source(spec, size=32):
    return sources.source(str(spec), {}, 0, size)


def read(source, **options):
    """The Reader of a single process, from the beginning."""
    return data.Reader(data.Share([source], [1], 0, 0, [(1, [0])]), **options)


def prompts(reader, n):
    return [example.prompt for _, example in itertools.islice(reader, n)]


def texts(sources, n, rank=0, history=((1, [0]),), weights=None, workers=0):
    share = data.Share(sources, weights or [1] * len(sources), 0, rank, list(history))
    return prompts(data.Reader(share, workers), n)


@pytest.mark.parametrize("spec", ["s-{000..002}.tar", "s-*.tar", "."])
def test_tars_by_range_pattern_and_folder(shards, spec):
    found = source(shards / spec)
    assert sorted(texts([found], 18), key=int) == [str(i) for i in range(18)]
    example = found.read(next(found.locations(random.Random(0))))
    assert example.target.size == (32, 32)
    assert example.images == ()
    assert example.target.getpixel((3, 3)) == (int(example.prompt), 0, 0)


def test_shorter_side_then_centre_crop(tmp_path):
    picture = Image.new("RGB", (90, 30), "red")
    picture.paste("blue", (30, 0, 60, 30))
    picture.save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(dict(file_name="a.png", text="x")))
    _, example = next(iter(read(source(tmp_path, 30))))
    assert example.target.size == (30, 30)
    assert example.target.getcolors() == [(900, (0, 0, 255))]
    x = pictures.to_pixels([example.target], "cpu")
    assert x.shape == (1, 3, 30, 30)
    assert x.min() == -1
    assert x.max() == 1


def test_editing_records_in_tars_and_folders_are_the_same(tmp_path):
    (tmp_path / "tars").mkdir()
    (tmp_path / "folder").mkdir()
    files = {"source0.png": png("red"), "source1.png": png("green"), "target.png": png("blue")}
    tar(tmp_path / "tars" / "a.tar", {"one": files | {"txt": b"mix them"}})
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    row = dict(source=["source0.png", "source1.png"], text="mix them", target="target.png")
    # As other programs write what is not there.
    row["file_name"] = None
    (tmp_path / "folder" / "metadata.jsonl").write_text(json.dumps(row))
    _, a = next(iter(read(source(tmp_path / "tars"))))
    _, b = next(iter(read(source(tmp_path / "folder"))))
    assert a.prompt == b.prompt == "mix them"
    assert [i.getpixel((0, 0)) for i in a.images] == [(255, 0, 0), (0, 128, 0)]
    assert [i.tobytes() for i in (*a.images, a.target)] == \
           [i.tobytes() for i in (*b.images, b.target)]


def test_an_epoch_is_shuffled_and_the_next_one_otherwise(shards):
    seen = texts([source(shards)], 36)
    assert sorted(seen[:18]) == sorted(seen[18:])
    assert len(set(seen[:18])) == 18
    assert seen[:18] != seen[18:]
    assert seen[:18] != sorted(seen[:18], key=int)


@pytest.mark.parametrize("world, workers", [(1, 2), (2, 0), (3, 0), (2, 2)])
def test_processes_and_workers_share_an_epoch_without_overlap(shards, world, workers):
    whole = texts([source(shards)], 18)
    history = [(world, [0] * world)]
    parts = [texts([source(shards)], 18 // world, rank, history, workers=workers)
             for rank in range(world)]
    assert [parts[i % world][i // world] for i in range(18)] == whole


def test_going_on_with_another_number_of_processes_loses_and_repeats_nothing(shards):
    """Two processes, one of them further than the other; then one; then three."""
    first = [texts([source(shards)], n, rank, [(2, [0, 0])]) for rank, n in ((0, 3), (1, 2))]
    second = texts([source(shards)], 4, 0, [(2, [5, 4]), (1, [0])])
    history = [(2, [5, 4]), (1, [4]), (3, [0, 0, 0])]
    third = [texts([source(shards)], 3, rank, history) for rank in range(3)]
    assert len(set(sum(first + third, second))) == 18


def test_a_reader_says_where_to_go_on(shards):
    whole = texts([source(shards)], 12)
    reader = read(source(shards), workers=2)
    assert prompts(reader, 5) == whole[:5]
    assert reader.offset == 5
    assert texts([source(shards)], 7, history=[(1, [5])], workers=1) == whole[5:]


def test_mixtures_follow_their_weights(shards, tmp_path):
    makers = {"toy": lambda rng, i: train.draw_example(rng, i, 32),
              "toy-edit": lambda rng, i: train.edit_example(rng, i, 32)}
    toy = sources.Generated(makers["toy"], 0)
    seen = Counter(t.isdigit() for t in texts([source(shards), toy], 1000, weights=[0.3, 0.7]))
    assert 250 < seen[True] < 350
    args = argparse.Namespace(data=[f"{shards}=0.3", "toy=0.7", "toy-edit"], seed=0, size=32)
    _, weights = stream.open_sources(args, makers, None)
    assert weights == [0.3, 0.7, None]


@pytest.mark.parametrize("given, weights", [("", [6, 2]), ("=1", [1, 1])])
def test_in_epochs_sizes_count_unless_weights_are_given(tmp_path, given, weights):
    """Equal ones, too."""
    line = json.dumps(dict(file_name="a.jpg", text="x")) + "\n"
    for name, n in (("many", 6), ("few", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(png("red"))
        (tmp_path / name / "metadata.jsonl").write_text(n * line)
    args = argparse.Namespace(seed=0, size=32, overfit=False, epochs=1, batch=1, accumulate=1,
                              workers=0, max_bad=0,
                              data=[f"{tmp_path / name}{given}" for name in ("many", "few")])
    state = argparse.Namespace(history=[], step=0, seen=0)
    reader = stream.open_reader(args, state, 0, 1, {}, None)
    assert reader.share.weights == weights
    assert args.steps == 8
    # With --resume --steps it goes on in the same order: options.json has what args have now.
    state = argparse.Namespace(history=[(1, [4])], step=4, seen=4)
    resumed = argparse.Namespace(**vars(args) | dict(epochs=None, steps=10))
    assert stream.open_reader(resumed, state, 0, 1, {}, None).share.weights == weights

    # Half of it done by one process, the rest by two.
    state = argparse.Namespace(history=[(1, [4])], step=4, seen=4)
    stream.open_reader(args, state, 0, 2, {}, None)
    assert args.steps == 4 + 2

    # Of fewer epochs than it has seen nothing is left.
    fewer = argparse.Namespace(**vars(args) | dict(epochs=0.1))
    state = argparse.Namespace(history=[(1, [4])], step=4, seen=4)
    stream.open_reader(fewer, state, 0, 1, {}, None)
    assert fewer.steps == 4


def broken(tmp_path):
    good = {"png": png("red"), "txt": b"fine"}
    tar(tmp_path / "a.tar", {
        "good": good,
        "cut": good | {"png": png("red")[:40]},
        "no-text": {"png": png("red")},
        "no-picture": {"txt": b"x"},
        "huge": good | {"png": only_a_header(20_000, 20_000)},
        "latin": good | {"txt": b"\xff\xfe\xfa"},
        "good2": good,
    })
    return tmp_path / "a.tar"


def test_what_is_broken_is_skipped_counted_and_named(tmp_path):
    reader = read(source(broken(tmp_path)), max_bad=1)
    assert prompts(reader, 4) == ["fine"] * 4
    named = " ".join(reader.bad)
    for word in ("cut", "no-text", "no-picture", "huge", "latin", "a.tar", "more than"):
        assert word in named
    # Nothing was extracted.
    assert not list(tmp_path.glob("*.png"))


def test_too_much_that_is_broken_stops_the_run_with_the_list(tmp_path):
    message = r"3 of \d+ records are broken.*--max-bad(.|\n)*a.tar"
    with pytest.raises(ValueError, match=message):
        prompts(read(source(broken(tmp_path))), 100)


class Unreliable(sources.Generated):
    """Each record is broken with a given probability."""

    def __init__(self, broken):
        self.rng = random.Random(0)
        self.broken = broken

    def read(self, i):
        if self.rng.random() < self.broken:
            raise ValueError(f"record {i}")
        return sources.Example("x", (), None)


def test_chance_does_not_stop_good_data():
    assert len(prompts(read(Unreliable(0.008), max_bad=0.01), 20_000)) == 20_000


@pytest.mark.parametrize("broken, max_bad, message", [
    (0.02, 0.01, r"of \d+ records"),
    (1, 1, "1000 of 1000 records"),
    (1, 0.01, "3 of 3 records"),
])
def test_more_than_chance_stops_and_what_is_all_broken_stops(broken, max_bad, message):
    with pytest.raises(ValueError, match=message):
        prompts(read(Unreliable(broken), max_bad=max_bad), 20_000)


def test_a_tar_that_is_cut_short_loses_its_end_only(shards):
    file = shards / "s-000.tar"
    file.write_bytes(file.read_bytes()[:4000])
    reader = read(source(shards), max_bad=1)
    seen = prompts(reader, 20)
    assert {str(i) for i in range(10, 18)} < set(seen)
    assert any("s-000.tar" in bad for bad in reader.bad)


@pytest.mark.parametrize("harm", ["header", "cut in a header", "cut between members"])
def test_a_tar_with_a_broken_header_or_without_an_end_is_a_broken_record(shards, harm):
    file = shards / "s-000.tar"
    with tarfile.open(file) as t:
        # Of the sixth record.
        offset = t.getmembers()[10].offset
    content = bytearray(file.read_bytes())
    # The checksum is wrong now.
    content[offset] ^= 1
    ends = {"header": None, "cut in a header": offset + 100, "cut between members": offset}
    file.write_bytes(content[:ends[harm]])
    reader = read(source(shards), max_bad=1)
    seen = prompts(reader, 30)
    # The fifth record is lost, too: it may have had more members.
    assert set(seen) == {str(i) for i in (*range(4), *range(10, 18))}
    assert reader.bad
    for bad in reader.bad:
        assert "s-000.tar: damaged tar" in bad
        assert f"byte {offset}" in bad


def test_a_worker_outlives_the_first_signal():
    code = ("import time; from engine.data import ignore_signals; ignore_signals(0)\n"
            "print('ready', flush=True)\nfor _ in range(600): time.sleep(0.1)")
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert worker.stdout.readline() == b"ready\n"
    for number in (signal.SIGINT, signal.SIGTERM):
        worker.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(0.5)
    worker.terminate()
    assert worker.wait(10) == -signal.SIGTERM
    worker.stdout.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_that_is_gone_stops_the_run_with_a_line(shards, workers):
    found = source(shards)
    (shards / "s-001.tar").unlink()
    with pytest.raises(OSError, match=r"\A\[Errno 2\] No such file .*s-001.tar'\Z"):
        texts([found], 100, workers=workers)


def test_two_records_of_one_key_have_two_names_and_sources_come_by_number(tmp_path):
    files = {f"source{i}.png": png((i, 0, 0)) for i in (10, 9, 2)}
    files |= {"target.png": png("blue"), "txt": b"mix them"}
    tar(tmp_path / "a.tar", {"one": files, "two": files})
    with tarfile.open(tmp_path / "a.tar", "a") as t:
        for suffix, content in files.items():
            add(t, f"one.{suffix}", content)
    found = source(tmp_path / "a.tar")
    examples = [found.read(where) for where in found.locations(random.Random(0))]
    assert len({e.name for e in examples}) == 3
    assert [i.getpixel((0, 0))[0] for i in examples[0].images] == [2, 9, 10]


def test_a_missing_picture_or_a_bad_line_is_one_broken_record(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    fine = dict(text="x", target="a.png")
    rows = [
        dict(file_name="a.png", text="fine"),
        dict(file_name="b.png", text="gone"),
        dict(file_name="a.png"),
        dict(text="no picture"),
        fine | dict(source=[None]),
        fine | dict(source=[1]),
        fine | dict(target=5),
        fine | dict(text="\ud800"),
        fine | dict(text=5),
        fine | dict(target="\ud800"),
        fine | dict(source={"a": [1]}),
    ]
    lines = [*map(json.dumps, rows), "{not json", "[]", ""]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    reader = read(source(tmp_path), max_bad=1)
    assert prompts(reader, 2) == ["fine"] * 2
    # Each of the twelve others, by its line.
    lines = sorted({int(re.search(r"metadata.jsonl, line (\d+)", bad)[1]) for bad in reader.bad})
    assert lines == [*range(2, 14)]
    assert all(str(tmp_path) in bad for bad in reader.bad)
    # All of it can be printed.
    "".join(reader.bad).encode()


@pytest.mark.parametrize("spec, message", [
    ("nothing", "no such files"),
    ("a-{0..2}.tar", "a-0.tar"),
    ("empty", "no such files"),
    ("empty.tar", "not one record"),
    ("zero.tar", "not one record"),
    ("text.tar", "not one record"),
    ("broken.tar", "not one record(.|\n)*broken.tar: a, byte 512: the record has no text"),
])
def test_an_empty_source_is_an_error_at_once(tmp_path, spec, message):
    (tmp_path / "empty").mkdir()
    tar(tmp_path / "empty.tar", {})
    tar(tmp_path / "broken.tar", {"a": {"png": png("red")}})
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ValueError, match=message):
        source(tmp_path / spec)


# ------------------------------------------------------------------------------ weights, latents

@pytest.mark.parametrize("spec, name, weight", [
    ("a=0.7", "a", 0.7), ("a=2", "a", 2.0), ("a=.5", "a", 0.5), ("a", "a", None),
    ("a=b", "a=b", None), ("a=\u00b2", "a=\u00b2", None), ("a=1e3", "a=1e3", None)])
def test_a_weight_stands_behind_the_last_equals_sign(spec, name, weight):
    assert stream.split_weight(spec) == (name, weight)


def test_a_folder_may_end_like_a_weight(tmp_path):
    (tmp_path / "date=2024").mkdir()
    spec = str(tmp_path / "date=2024")
    assert stream.split_weight(spec) == (spec, None)
    assert stream.split_weight(f"{spec}=0.5") == (spec, 0.5)


@pytest.mark.parametrize("spec", ["a=0", "a=0.0", f"a={'9' * 400}"])
def test_a_weight_that_cannot_be_meant(spec):
    with pytest.raises(ValueError, match="a weight must be above 0"):
        stream.split_weight(spec)


def test_only_latents_are_deleted(tmp_path):
    """By their whole names: a folder may hold what somebody else put there."""
    digest = "0123456789abcdef"
    kept = [tmp_path / "mine" / f"{digest * 2}.safetensors", tmp_path / digest / "notes.txt",
            tmp_path / digest / "model.safetensors", tmp_path / "elsewhere" / f"{digest * 2}.77"]
    gone = [tmp_path / digest / f"{digest * 2}.safetensors", tmp_path / digest / f"{digest * 2}.77",
            tmp_path / digest[::-1] / f"{digest * 2}.safetensors"]
    for file in (*kept, *gone):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    (tmp_path / "fedcba9876543211").symlink_to(tmp_path / "elsewhere")
    for folder in list(tmp_path.iterdir()):
        data.remove_latents(folder)
    assert all(file.exists() for file in kept)
    assert not any(file.exists() for file in gone) and not gone[-1].parent.exists()


@pytest.mark.parametrize("stored", [
    {}, {"other": torch.zeros(4, 8, 8)}, {"x0": torch.zeros(4, 8, 9)},
    {"x0": torch.full((4, 8, 8), torch.nan)}, b"cut"],
    ids=["empty", "another name", "another shape", "not finite", "damaged"])
def test_latents_that_are_not_these_are_made_anew(tiny, tmp_path, stored):
    args = argparse.Namespace(device="cpu", dtype="float32", cache_latents=True, out=tmp_path,
                              size=32)
    latents = data.Latents(tiny, args)
    example = sources.Example("x", (), Image.new("RGB", (32, 32), "red"), "a")
    want = latents(tiny, [example])
    assert torch.equal(latents.known("a"), want[0])
    if isinstance(stored, bytes):
        latents.file("a").write_bytes(stored)
    else:
        save_file(stored, latents.file("a"))
    assert latents.known("a") is None
    latents(tiny, [example])
    assert torch.equal(latents.known("a"), want[0])
