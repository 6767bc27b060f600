"""python -m engine.data SPEC --check: a look at data before training on them."""
import json
import subprocess
import sys

import pytest
from PIL import Image

from engine import data
from sample import TOY_FOLDER
from tests.conftest import ROOT, TINY, run
from tests.test_4_sources import GOOD, picture, write_tar

GREEN = picture("green", (90, 30))


@pytest.fixture
def mixed(tmp_path):
    """Two good records, one of them an edit, and two that are broken."""
    return write_tar(
        tmp_path / "a.tar", *GOOD, ("1.png", picture()), ("2.png", picture()[:50]), ("2.txt", b"x"),
        ("3.source.png", GREEN), ("3.target.png", picture(size=(64, 64))),
        ("3.txt", b"\xef\xbb\xbfmake it <|im_end|> red\n"))


def test_a_line_for_each_record_a_summary_and_a_sheet(mixed, tmp_path):
    sheet = tmp_path / "sheet.png"
    done = run("-m", "engine.data", mixed, "--check", "--size", 64, "--sheet", sheet)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert [row.get("prompt") for row in rows] == ["fine", None, None, "make it <|im_end|> red"]
    assert rows[0] | dict(name="") == dict(name="", prompt="fine", sources=[], target="80x60")
    assert rows[3]["sources"] == ["90x30"] and rows[3]["target"] == "64x64"
    assert rows[1]["name"].startswith(f"{mixed}: 1, byte ") and "no text" in rows[1]["error"]
    for said in ("4 records, 2 of them broken", "1 broken: the record has no text",
                 "1 broken: not a readable picture", "<|im_end|>, which is read as a control token",
                 "60 to 64, median 60; 1 are smaller than 64", "80x60 (1), 64x64 (1)",
                 "pictures/s"):
        assert said in done.stderr, done.stderr
    # Three pictures, of which the source is uncropped: 128 x 43.
    colours = {colour: n for n, colour in Image.open(sheet).convert("RGB").getcolors(1 << 20)}
    assert colours[255, 0, 0] == 2 * 128 * 128
    assert 128 * 42 <= colours[0, 128, 0] <= 128 * 43


def test_all_good_is_status_0_and_tokens_are_counted(tmp_path):
    texts = ("x", "a red circle " * 200)
    for i, text in enumerate(texts):
        write_tar(tmp_path / f"{i}.tar", ("1.png", picture()), ("1.txt", text.encode()))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").symlink_to(TINY / "qwen" / "tokenizer.json")
    (tmp_path / "model" / "config.json").symlink_to(TOY_FOLDER / "config.json")
    done = run("-m", "engine.data", tmp_path / "{0..1}.tar", "--check", "--model",
               tmp_path / "model")
    assert done.returncode == 0, done.stderr
    # In the order of the files.
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == \
           [text.strip() for text in texts]
    assert "; 1 prompts have more than 256" in done.stderr
    # Of another program's folder one hears before any record is read.
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["Qwen"]}')
    done = run("-m", "engine.data", tmp_path / "{0..1}.tar", "--check", "--model",
               tmp_path / "model")
    assert done.returncode == 1 and "not a folder of this project" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize("spec, message", [
    ("none", "error: --data none: no such files"), ("a-{0..999999999}.tar", "range of 1 to")])
def test_what_is_not_there_is_one_line(spec, message):
    done = run("-m", "engine.data", spec, "--check")
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_nothing_is_broken_too(tmp_path):
    done = run("-m", "engine.data", write_tar(tmp_path / "a.tar"), "--check")
    assert done.returncode == 1 and "0 records" in done.stderr


def test_whoever_reads_may_stop(tmp_path):
    """As `head` does."""
    members = [(f"{i}-{name}", content) for i in range(200) for name, content in GOOD]
    file = write_tar(tmp_path / "a.tar", *members)
    command = f"{sys.executable} -m engine.data {file} --check"
    done = subprocess.run(["bash", "-c", f"{command} | head -1"], cwd=ROOT, capture_output=True,
                          text=True)
    assert json.loads(done.stdout)["prompt"] == "fine" and "rror" not in done.stderr


def test_the_sheet_is_a_fair_sample(mixed):
    """Each of 200 records has the same chance to be among the 16."""
    args = data.options([str(mixed), "--check", "--sheet", "x.png"])
    summary = data.Summary(args)
    summary.show = lambda example: ([], [example.prompt])
    image = Image.new("RGB", (8, 8))
    for i in range(200):
        summary.add(data.Example(str(i), (), image))
    shown = [int(label) for _, (label,) in summary.shown]
    assert len(set(shown)) == 16 and 70 < sum(shown) / 16 < 130


@pytest.mark.parametrize("name, said", [("metadata.jsonl", "written as PNG"),
                                        ("mine.png", "is not a PNG and would be lost")])
def test_a_sheet_takes_no_other_files_place(tmp_path, name, said):
    """Nobody's data go because a file was named by mistake."""
    (tmp_path / name).write_text("mine")
    args = data.options([str(tmp_path), "--check", "--sheet", str(tmp_path / name)])
    with pytest.raises(ValueError, match=said):
        data.check(args)
    assert (tmp_path / name).read_text() == "mine"


def test_a_sheet_takes_no_records_place(tmp_path):
    """A picture that is read is a PNG, too."""
    file = tmp_path / "1.png"
    file.write_bytes(GREEN)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "green"}\n')
    args = data.options([str(tmp_path), "--check", "--sheet", str(file)])
    with pytest.raises(ValueError, match="may be one of the pictures to read"):
        data.check(args)
    assert file.read_bytes() == GREEN
