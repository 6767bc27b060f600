"""What docs/promises.md promises of writing, commands and --resume: nothing is destroyed, nothing
that is wrong passes."""
import argparse
import functools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import sample
import train
import weights_convert
from engine import command, files
from engine.log import read_log
from engine.outputs import save_png
from engine.runs import lock, run_folder
from engine.state import checkpoints
from lab import evaluate, pretrain
from sample import TOY_FOLDER
from tbac import TBAC
from tests.conftest import ROOT, TINY, run
from tests.fuzz.runs import DAMAGE

RUN = ("--stage", "mix", "--size", 32, "--batch", 1, "--warmup", 1, "--sheet-every", 0, "--dtype",
       "float32", "--plain", "--steps", 2)


@pytest.fixture(scope="module")
def small(tiny_folder):
    """The tiny checkpoint."""
    return tiny_folder


def new_run(model, out, *args):
    words = [str(word) for word in (*RUN, "--model", model, "--out", out, *args)]
    return train.Run(train.options(words))


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """The folder of a run of two steps, with two checkpoints."""
    out = tmp_path_factory.mktemp("finished") / "run"
    started = new_run(small, out)
    out.mkdir()
    rows = []
    for report in started.steps():
        rows.append(json.dumps(dict(step=report.step, loss=report.loss, skipped=None)))
        started.save()
    train.store(started.args)
    (out / "log.jsonl").write_text("\n".join(rows) + "\n")
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"}


def main(monkeypatch, script, *args):
    """A command in this process -> its status, or the message that it ends with."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in (script.__name__, *args)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    return ended.value.code


# ------------------------------------------------------------------------- what a run writes over

def test_a_run_never_takes_the_place_of_a_model(small, tmp_path, monkeypatch):
    model = shutil.copytree(small, tmp_path / "model")
    before = contents(model)
    for more in ((), ("--resume",)):
        said = main(monkeypatch, train, *RUN, "--model", model, "--out", model, *more)
        assert "holds a model (config.json) without the checkpoints of a run" in said
        assert contents(model) == before
    with pytest.raises(ValueError, match="holds a model"):
        new_run(model, model)


@pytest.mark.parametrize("name", [
    "options.json", "log.jsonl", "tokenizer.json", "code.safetensors", "curves.png",
    "sheet-00000500.png"])
def test_a_run_never_takes_the_place_of_files_of_others(small, tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("{}")
    said = main(monkeypatch, train, *RUN, "--model", small, "--out", tmp_path)
    assert f"holds {name}, which is not of a run" in said
    assert contents(tmp_path) == {name: b"{}"}


def test_a_lock_of_somebody_else_is_kept(small, tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("{}")
    said = main(monkeypatch, train, *RUN, "--model", small, "--out", tmp_path)
    assert "holds .lock, which is not of a run" in said
    assert (tmp_path / ".lock").read_text() == "{}" and not contents(tmp_path)


def test_curves_take_the_place_of_a_png_only(copy, monkeypatch):
    (copy / "curves.png").write_text("somebody's")
    assert "curves.png" in main(monkeypatch, train, "--curves", "--out", copy)
    assert (copy / "curves.png").read_text() == "somebody's"


def test_what_is_compared_is_checked_first(tmp_path, monkeypatch):
    said = main(monkeypatch, sample, "a red circle", "--explain", "--compare", "<|image_pad|>",
                "--out", tmp_path / "out.png")
    assert "--compare" in said and not list(tmp_path.iterdir())


def test_a_code_that_is_none_is_refused(small, tmp_path):
    """By its file's name; a pipe, too, and at once."""
    model = TBAC.load(TOY_FOLDER, "cpu")
    args = argparse.Namespace(model=tmp_path)
    file = tmp_path / pretrain.CODE
    for write, why in ((lambda: file.write_bytes(b"{}"), "code.safetensors"),
                       (lambda: shutil.copy(small / "model.safetensors", file), "unknown|not"),
                       (lambda: os.mkfifo(file), "regular file")):
        file.unlink(missing_ok=True)
        write()
        with pytest.raises(ValueError, match=why):
            pretrain.learnt_code(model, args)


def test_a_run_refuses_what_is_no_regular_file(copy, tmp_path, monkeypatch):
    aim = tmp_path / "aim"
    aim.write_text("somebody's")
    (copy / "log.jsonl").unlink()
    (copy / "log.jsonl").symlink_to(aim)
    said = main(monkeypatch, train, "--resume", "--steps", 3, "--out", copy)
    assert "log.jsonl exists and is not a regular file" in said
    assert aim.read_text() == "somebody's"


def test_saves_remove_only_what_a_run_has_written(copy):
    """Neither models nor checkpoints of other names; and --resume does not take them."""
    kept = ["model-best.safetensors", "model.safetensors.bak", "old-model.safetensors",
            "checkpoints/step-00000001-best/x", "checkpoints/step-00000009.bak/x",
            "checkpoints/notes.txt", ".new-mine/x"]
    for name in kept:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(name)
    gone = ["model-00001-of-00002.safetensors", ".new-a1b2c3d4/x"]
    for name in gone:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(name)
    shutil.copyfile(copy / "model.safetensors", copy / "model-best.safetensors")
    again = train.Run(train.options(["--resume", "--out", str(copy), "--steps", "3"]))
    assert again.state.step == 2
    list(again.steps())
    again.save()
    assert [file.name for file in checkpoints(copy)] == ["step-00000002", "step-00000003"]
    assert all((copy / name).exists() for name in kept)
    assert not any((copy / name).exists() for name in gone)
    TBAC.load(copy)


@pytest.mark.parametrize("out", ["held", "sana/transformer", "qwen/new", "."])
def test_a_conversion_writes_only_into_a_new_folder(tmp_path, monkeypatch, out):
    for name in ("qwen", "sana"):
        shutil.copytree(TINY / name, tmp_path / name)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "model-best.safetensors").write_text("mine")
    before = contents(tmp_path)
    said = main(monkeypatch, weights_convert, "--qwen", tmp_path / "qwen", "--sana",
                tmp_path / "sana", "--out", tmp_path / out)
    assert "--out" in said and ("holds" in said or "is one of the folders to read" in said)
    assert contents(tmp_path) == before


# ----------------------------------------------------------------------------- weights that are NaN

def test_weights_that_are_not_finite_are_never_saved(copy):
    again = train.Run(train.options(["--resume", "--out", str(copy), "--steps", "9",
                                     "--no-guard", "--keep", "1"]))
    next(again.steps())
    before = contents(copy)
    last = {name: p.detach().clone() for name, p in again.state.params.items()}
    name, p = next(iter(again.state.params.items()))
    moments = again.state.optimizer.state[p]
    for tensor, what in ((p.data, f"param.{name}"), (again.state.ema[name], f"ema.{name}"),
                         (moments["exp_avg"], f"exp_avg.{name}")):
        kept = tensor.clone()
        for value in (float("nan"), float("inf"), -float("inf")):
            tensor.view(-1)[0] = value
            with pytest.raises(ValueError, match=f"step 3 is not saved: {what} .*0002 is whole"):
                again.save()
        tensor.copy_(kept)
    assert contents(copy) == before
    assert all(torch.equal(p, last[name]) for name, p in again.state.params.items())
    again.save()
    assert [file.name for file in checkpoints(copy)] == ["step-00000003"]


def test_a_first_save_that_is_not_finite_is_refused_in_words(small, tmp_path):
    """There is no checkpoint to go on from yet."""
    begun = train.Run(train.options(["--model", str(small), "--out", str(tmp_path / "run"),
                                     "--steps", "1", "--batch", "1", "--size", "32"]))
    next(iter(begun.state.params.values())).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="step 0 is not saved: .*take a smaller --lr"):
        begun.save()
    assert not (tmp_path / "run").exists()


def test_weights_that_the_models_dtype_cannot_hold_are_not_saved(copy):
    again = train.Run(train.options(["--resume", "--out", str(copy), "--steps", "3"]))
    next(again.steps())
    next(iter(again.state.params.values())).data.view(-1)[0] = 1e6
    again.save()
    again.model.config = train.dataclasses.replace(again.model.config, dtype="float16")
    again.state.saved = None
    with pytest.raises(ValueError, match="too large for the model's dtype"):
        again.save()


# ------------------------------------------------------------------------------ what --resume reads

# What else may be wrong with a run: tests/fuzz/runs.py.
@pytest.mark.parametrize("damage", ["one mean is missing", "all moments", "nan in param",
                                    "the log has no step"])
def test_a_damaged_run_is_named_before_anything_has_changed(copy, monkeypatch, damage):
    edit, message = DAMAGE[damage]
    edit(copy)
    before = contents(copy)
    said = main(monkeypatch, train, "--resume", "--steps", 3, "--out", copy)
    assert len(said.splitlines()) == 1 and re.search(message, said)
    assert contents(copy) == before


def test_weights_stay_as_they_are_where_a_checkpoint_is_refused(copy):
    again = train.Run(train.options(["--resume", "--out", str(copy), "--steps", "3"]))
    before = {name: p.detach().clone() for name, p in again.state.params.items()}
    DAMAGE["one mean is missing"][0](copy)
    with pytest.raises(ValueError):
        again.state.load(checkpoints(copy)[-1])
    assert all(torch.equal(p, before[name]) for name, p in again.state.params.items())


def test_a_run_does_not_go_on_with_another_wiring(copy, monkeypatch):
    said = main(monkeypatch, train, "--resume", "--steps", 3, "--out", copy, "--wiring", "reversed")
    assert "state.json: the run has model.wiring = 'ladder', here it is 'reversed'" in said


def test_half_a_line_and_lines_of_other_kinds_are_no_harm(copy):
    with open(copy / "log.jsonl", "ab") as log:
        log.write(b'{"step": 2, "process": 1, "bad": ["x"]}\n{"step": 3, "lo\xc3')
    assert [row["step"] for row in read_log(copy)] == [1, 2]


# --------------------------------------------------------------------------------------- two runs

def test_two_runs_do_not_share_a_folder(tmp_path):
    """A lock that outlives nothing: its owner's death ends it, in whatever way."""
    code = ("import time, pathlib; from engine.runs import lock\n"
            f"with lock(pathlib.Path({str(tmp_path)!r})):\n"
            "    print('held', flush=True)\n    time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"process {other.pid} on .* is running there"):
        with lock(tmp_path):
            pass
    args = train.options(["--out", str(tmp_path)])
    with pytest.raises(ValueError, match=f"process {other.pid}"):
        with run_folder(args):
            pass
    other.kill()
    other.communicate()
    with run_folder(args):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()


def test_what_a_run_saves_leaves_its_lock(tmp_path, tiny):
    """The system lets go of a lock as soon as its owner closes the file, whoever opened it."""
    code = ("import pathlib; from engine.runs import lock\n"
            f"with lock(pathlib.Path({str(tmp_path)!r})):\n    pass")
    with lock(tmp_path):
        tiny.save(tmp_path)
        other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert f"process {os.getpid()} on".encode() in other.stderr
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ------------------------------------------------------------------------------ pictures, and --out

def draws(monkeypatch, model, out, *args):
    return main(monkeypatch, sample, "a dog", "--model", model, "--steps", 1, "--out", out, *args)


def make_fifo(file):
    os.mkfifo(file)


def link_to_aim(file):
    file.symlink_to(file.with_name("aim"))


def write_jpeg(file):
    Image.new("RGB", (4, 4)).save(file, "jpeg")


@pytest.mark.parametrize("make, message", [
    (make_fifo, "is not a regular file"), (link_to_aim, "is not a regular file"),
    (write_jpeg, "is not a PNG and would be lost"),
    (lambda file: file.write_text("letters"), "is not a PNG"),
    (lambda file: file.write_text("<!DOCTYPE html>\n<title>notes</title>"), "is not a PNG"),
    (lambda file: file.mkdir(), "is a folder"),
])
@pytest.mark.parametrize("name, more", [
    ("a.png", ()), ("a-2.png", ("--n", 2)), ("a-explain.png", ("--explain",)),
    ("a-explain.html", ("--explain",))])
def test_only_a_png_is_written_over(small, tmp_path, monkeypatch, make, message, name, more):
    (tmp_path / "aim").write_text("precious")
    make(tmp_path / name)
    before = contents(tmp_path), os.lstat(tmp_path / name)
    said = draws(monkeypatch, small, tmp_path / "a.png", *more)
    if name.endswith("html"):
        message = message.replace("a PNG", "a page of this --explain")
    assert message in said or "is not a regular file" in said
    assert (contents(tmp_path), os.lstat(tmp_path / name)) == before


@pytest.mark.parametrize("out", ["LICENSE", "a", "a.jpg", "/dev/null"])
def test_a_picture_is_called_png(small, monkeypatch, out):
    before = os.lstat("/dev/null")
    assert "pictures are written as PNG" in draws(monkeypatch, small, out)
    assert stat.S_ISCHR(os.lstat("/dev/null").st_mode) and os.lstat("/dev/null") == before


def test_no_link_is_followed_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    """The scratch name cannot be guessed; and if it could, a link there would not be followed."""
    aim = tmp_path / "aim"
    aim.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".guessed.new").symlink_to(aim)
    with pytest.raises(FileExistsError):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", {})
    assert aim.read_text() == "precious"
    monkeypatch.undo()
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        def fail(*_, error=error, **__):
            raise error
        monkeypatch.setattr(Image.Image, "save", fail)
        with pytest.raises(type(error)):
            save_png(Image.new("RGB", (4, 4)), tmp_path / "b.png", {})
    assert "aim" in contents(tmp_path) and not any("b.png" in name for name in os.listdir(tmp_path))
    assert len(os.listdir(tmp_path)) <= 2


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_follow_the_umask(tiny, tmp_path, mask):
    before = os.umask(mask)
    try:
        save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", {})
        files.write_text(tmp_path / "a.json", "{}")
        tiny.save(tmp_path / "model")
    finally:
        os.umask(before)
    found = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*") if file.is_file()}
    assert found == {0o666 & ~mask}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_picture_that_is_not_finite_is_not_drawn_black(small, tmp_path, monkeypatch, value):
    load = TBAC.load

    def spoilt(*args, **more):
        model = load(*args, **more)
        model.dcae.decoder.conv_out.weight.data.view(-1)[0] = value
        return model

    monkeypatch.setattr(sample.TBAC, "load", spoilt)
    assert "not finite" in draws(monkeypatch, small, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_epochs_have_no_more_steps_than_a_run_may_have(small, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' * 1000)
    with pytest.raises(ValueError, match="--epochs 1e.06 are 1000000000 steps, 99999999 are the"):
        words = [*map(str, RUN[:-2]), "--epochs", "1e6", "--data", str(tmp_path)]
        train.Run(train.options([*words, "--model", str(small), "--out", str(tmp_path / "run")]))


# ----------------------------------------------------------------------------------------- evaluate

def test_scores_are_whole_or_the_older_ones(tmp_path, monkeypatch):
    evaluate.save(tmp_path, dict(scores=1), Image.new("RGB", (4, 4)))
    before = contents(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate.save(tmp_path, dict(scores=2), None)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    evaluate.save(tmp_path, dict(scores=2), None)
    assert list(contents(tmp_path)) == ["scores.json"]


def test_evaluate_tries_the_place_before_the_work(tmp_path, monkeypatch):
    def fail(*_, **__):
        pytest.fail("the place was not tried first")

    monkeypatch.setattr(evaluate.TBAC, "load", fail)
    os.mkfifo(tmp_path / "scores.json")
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "own").mkdir()
    write_jpeg(tmp_path / "own" / "failures.png")
    for out, message in ((tmp_path, "scores.json exists and is not a regular file"),
                         (tmp_path / "own", "failures.png is not a PNG and would be lost"),
                         (file, "File exists"), ("/proc/none", "/proc/none")):
        with pytest.raises(SystemExit, match=message):
            evaluate.main(["--out", str(out)])
    assert file.read_text() == "x"


# ------------------------------------------------------------------------------------ command lines

@pytest.mark.parametrize("args, message", [
    (["--guidance", "nan"], "--guidance: must be a number from 0 to 1000, not 'nan'"),
    (["--image-guidance", "inf"], "--image-guidance: must be"),
    (["--n", "0"], "--n: must be"), (["--steps", "0"], "--steps: must be"),
    (["--seed", "-1"], "--seed: must be"), (["--batch", "1e9"], "--batch: must be"),
    (["--device", "hpu"], "--device: must be cpu"), (["--out", ""], "--out: is empty"),
    (["--model", "\udcff"], "--model: '\\udcff' is not UTF-8"), (["--quic"], "unrecognized"),
])
def test_what_evaluate_cannot_mean(args, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.options(args)
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("script", [("sample.py", "a dog", "--n", 500, "--steps", 1000),
                                    ("-m", "lab.evaluate", "--tasks", "draw")])
def test_ctrl_c_is_one_line_and_status_130(small, tmp_path, script):
    words = [*script, "--model", small, "--out", tmp_path / "a.png"]
    # A shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=heard)
    # A bar that has begun: what is imported is imported.
    seen = process.stderr.read(1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in seen + err
    assert err.splitlines()[-1].strip() == "interrupted"


def test_out_of_memory_is_one_line_and_other_errors_are_not_hidden():
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(SystemExit, match="error: this needs more memory than there is"):
            with command.one_line_errors():
                raise error
    with pytest.raises(SystemExit, match="more memory"):
        with command.one_line_errors():
            torch.empty(2 ** 55, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="a bug"):
        with command.one_line_errors():
            raise RuntimeError("a bug")


def test_messages_do_not_control_the_terminal():
    with pytest.raises(SystemExit) as ended:
        with command.one_line_errors():
            raise ValueError("a\x1b[2J\udcffname")
    assert ended.value.code == r"error: a\x1b[2J\udcffname"


def test_a_message_does_not_fill_the_page():
    name = "x" * 5000
    with pytest.raises(SystemExit) as ended:
        with command.one_line_errors():
            raise ValueError(f"--data {name}: no such file: {name}, what then?")
    message = ended.value.code
    assert len(message) < 1000 and "--data x" in message and message.endswith("what then?")


def test_the_scripts_that_draw_tables_share_the_checks(tmp_path):
    done = run("-m", "lab.ablate", "settings", "--draw-steps", "0", "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: argument --draw-steps: must be")
    assert len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------- the page

def test_the_page_names_tests_that_exist():
    """docs/promises.md: a file, and words of the names of its tests."""
    page = (ROOT / "docs" / "promises.md").read_text()
    cells = [line.split("|")[2] for line in page.splitlines() if line.startswith("|")][2:]
    assert len(cells) > 15
    for cell in cells:
        for group in cell.split(";"):
            names, _, words = group.partition(":")
            tests = "".join((ROOT / "tests" / name).read_text()
                            for name in re.findall(r"`([\w/]+\.py)`", names))
            assert tests or "`fuzz/`" in cell, cell
            for word in re.findall(r"\w+", words):
                assert re.search(rf"def test_\w*{word}", tests), (cell, word)
