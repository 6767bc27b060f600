"""Real data: tars and folders give the same examples, everybody sees each record once an epoch, and what is broken is named."""
import argparse
import io
import itertools
import json
import random
import tarfile
from collections import Counter

import pytest
from PIL import Image

import data
import sample
import train


def jpeg(colour, size=(80, 60)):
    f = io.BytesIO()
    Image.new("RGB", size, colour).save(f, "png")
    return f.getvalue()


def tar(file, records):
    """records: {key: {suffix: bytes}}"""
    with tarfile.open(file, "w") as t:
        for key, parts in records.items():
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                t.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Three tars of 10, 7 and 1 records; the text is the record's number."""
    numbers = iter(range(18))
    for i, n in enumerate((10, 7, 1)):
        tar(tmp_path / f"s-{i:03d}.tar", {f"a/{k:04d}": {"png": jpeg((k, 0, 0)), "txt": str(k).encode()} for k in itertools.islice(numbers, n)})
    return tmp_path


def source(spec, size=32):
    return data.source(str(spec), {}, 0, size)


def texts(sources, n, rank=0, past=((1, [0]),), weights=None, workers=0):
    share = data.Share(sources, weights or [1] * len(sources), 0, rank, list(past))
    return [e.prompt for _, e in itertools.islice(data.Reader(share, workers), n)]


@pytest.mark.parametrize("spec", ["s-{000..002}.tar", "s-*.tar", "."])
def test_tars_by_range_pattern_and_folder(shards, spec):
    found = source(shards / spec)
    assert sorted(texts([found], 18), key=int) == [str(i) for i in range(18)]
    example = found.read(next(found.locations(random.Random(0))))
    assert example.target.size == (32, 32) and example.images == () and example.target.getpixel((3, 3)) == (int(example.prompt), 0, 0)


def test_shorter_side_then_centre_crop(tmp_path):
    picture = Image.new("RGB", (90, 30), "red")
    picture.paste("blue", (30, 0, 60, 30))
    picture.save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(dict(file_name="a.png", text="x")))
    example, = (e for _, e in itertools.islice(data.Reader(data.Share([source(tmp_path, 30)], [1], 0, 0, [(1, [0])])), 1))
    assert example.target.size == (30, 30) and example.target.getcolors() == [(900, (0, 0, 255))]
    x = sample.to_pixels([example.target], "cpu")
    assert x.shape == (1, 3, 30, 30) and x.min() == -1 and x.max() == 1


def test_editing_records_in_tars_and_folders_are_the_same(tmp_path):
    (tmp_path / "tars").mkdir(), (tmp_path / "folder").mkdir()
    pictures = {"source0.png": jpeg("red"), "source1.png": jpeg("green"), "target.png": jpeg("blue")}
    tar(tmp_path / "tars" / "a.tar", {"one": pictures | {"txt": b"mix them"}})
    for name, content in pictures.items():
        (tmp_path / "folder" / name).write_bytes(content)
    (tmp_path / "folder" / "metadata.jsonl").write_text(json.dumps(dict(source=["source0.png", "source1.png"], text="mix them", target="target.png")))
    a, b = (next(iter(data.Reader(data.Share([source(tmp_path / f)], [1], 0, 0, [(1, [0])]))))[1] for f in ("tars", "folder"))
    assert a.prompt == b.prompt == "mix them" and [i.getpixel((0, 0)) for i in a.images] == [(255, 0, 0), (0, 128, 0)]
    assert [i.tobytes() for i in (*a.images, a.target)] == [i.tobytes() for i in (*b.images, b.target)]


def test_an_epoch_is_shuffled_and_the_next_one_otherwise(shards):
    seen = texts([source(shards)], 36)
    assert sorted(seen[:18]) == sorted(seen[18:]) and len(set(seen[:18])) == 18
    assert seen[:18] != seen[18:] and seen[:18] != sorted(seen[:18], key=int)


@pytest.mark.parametrize("world, workers", [(1, 2), (2, 0), (3, 0), (2, 2)])
def test_processes_and_workers_share_an_epoch_without_overlap(shards, world, workers):
    whole, past = texts([source(shards)], 18), [(world, [0] * world)]
    parts = [texts([source(shards)], 18 // world, rank, past, workers=workers) for rank in range(world)]
    assert [parts[i % world][i // world] for i in range(18)] == whole


def test_going_on_with_another_number_of_processes_loses_and_repeats_nothing(shards):
    """Two processes, one of them further than the other; then one; then three."""
    first = [texts([source(shards)], n, rank, [(2, [0, 0])]) for rank, n in ((0, 3), (1, 2))]
    past = [(2, [5, 4]), (1, [0])]
    second = texts([source(shards)], 4, 0, past)
    past = [(2, [5, 4]), (1, [4]), (3, [0, 0, 0])]
    third = [texts([source(shards)], 3, rank, past) for rank in range(3)]
    assert len(set(sum(first + third, second))) == 18


def test_a_reader_says_where_to_go_on(shards):
    whole = texts([source(shards)], 12)
    reader = data.Reader(data.Share([source(shards)], [1], 0, 0, [(1, [0])]), workers=2)
    assert [e.prompt for _, e in itertools.islice(reader, 5)] == whole[:5] and reader.reached == 5
    assert texts([source(shards)], 7, past=[(1, [5])], workers=1) == whole[5:]


def test_mixtures_follow_their_weights(shards, tmp_path):
    toy = data.Toy(lambda rng, i: data.draw_example(rng, 32), 0)
    seen = Counter(t.isdigit() for t in texts([source(shards), toy], 1000, weights=[0.3, 0.7]))
    assert 250 < seen[True] < 350
    a = argparse.Namespace(stage="t2i", data=[f"{shards}=0.3", "toy=0.7", "toy-edit"], seed=0, size=32)
    assert train.sources(a, None)[1] == [0.3, 0.7, 1.0]


def broken(tmp_path):
    good = {"png": jpeg("red"), "txt": b"fine"}
    bomb = io.BytesIO()
    Image.new("1", (20000, 20000)).save(bomb, "png")
    tar(tmp_path / "a.tar", {"good": good, "cut": good | {"png": jpeg("red")[:40]}, "no-text": {"png": jpeg("red")}, "no-picture": {"txt": b"x"},
                             "huge": good | {"png": bomb.getvalue()}, "latin": good | {"txt": b"\xff\xfe\xfa"}, "good2": good})
    return tmp_path / "a.tar"


def test_what_is_broken_is_skipped_counted_and_named(tmp_path):
    reader = data.Reader(data.Share([source(broken(tmp_path))], [1], 0, 0, [(1, [0])]), max_bad=1)
    assert [e.prompt for _, e in itertools.islice(reader, 4)] == ["fine"] * 4
    named = " ".join(reader.bad)
    assert all(word in named for word in ("cut", "no-text", "no-picture", "huge", "latin", "a.tar")) and "more than" in named
    assert not list(tmp_path.glob("*.png"))                                     # nothing was extracted


def test_too_much_that_is_broken_stops_the_run_with_the_list(tmp_path):
    reader = data.Reader(data.Share([source(broken(tmp_path))], [1], 0, 0, [(1, [0])]))
    with pytest.raises(ValueError, match=r"3 of \d+ records are broken.*--max-bad(.|\n)*a.tar"):
        list(itertools.islice(reader, 100))


def test_a_tar_that_is_cut_short_loses_its_end_only(shards):
    file = shards / "s-000.tar"
    file.write_bytes(file.read_bytes()[:4000])
    reader = data.Reader(data.Share([source(shards)], [1], 0, 0, [(1, [0])]), max_bad=1)
    seen = [e.prompt for _, e in itertools.islice(reader, 20)]
    assert {str(i) for i in range(10, 18)} < set(seen) and any("s-000.tar" in bad for bad in reader.bad)


def test_a_missing_picture_or_a_bad_line_is_one_broken_record(tmp_path):
    (tmp_path / "a.png").write_bytes(jpeg("red"))
    lines = [dict(file_name="a.png", text="fine"), dict(file_name="b.png", text="gone"), dict(file_name="a.png"), dict(text="no picture")]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*map(json.dumps, lines), "{not json", "[]", ""]))
    reader = data.Reader(data.Share([source(tmp_path)], [1], 0, 0, [(1, [0])]), max_bad=1)
    assert [e.prompt for _, e in itertools.islice(reader, 2)] == ["fine"] * 2
    assert len(set(reader.bad)) == 5 and any("b.png" in bad for bad in reader.bad)


@pytest.mark.parametrize("spec, message", [("nothing", "no such files"), ("a-{0..2}.tar", "a-0.tar"), ("empty", "no such files"),
                                           ("empty.tar", "not one record")])
def test_an_empty_source_is_an_error_at_once(tmp_path, spec, message):
    (tmp_path / "empty").mkdir()
    tar(tmp_path / "empty.tar", {})
    with pytest.raises(ValueError, match=message):
        source(tmp_path / spec)
