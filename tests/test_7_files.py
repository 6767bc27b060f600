"""Files and the command line: what is written is whole, what is wrong is named, nothing is lost."""
import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from engine import fast
from engine import words as words_of
from engine.files import write_shards
from engine.pictures import open_image
from tbac import TBAC
from tests.conftest import ROOT, relative, run


@pytest.fixture
def copy(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


# ----------------------------------------------------------------------------------------- models

def test_save_and_load_is_bit_identical(tiny, tmp_path):
    tiny.save(tmp_path)
    again = TBAC.load(tmp_path)
    assert again.config == tiny.config
    own = again.state_dict()
    assert all(torch.equal(t, own[name]) for name, t in tiny.state_dict().items())
    assert not any(file.name.startswith(".") for file in tmp_path.iterdir())
    learns = [p.requires_grad for p in tiny.parameters()]
    assert [p.requires_grad for p in again.parameters()] == learns


def test_a_failed_save_leaves_the_old_model(tiny, copy, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    before = (copy / "model.safetensors").read_bytes()
    monkeypatch.setattr("engine.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny.save(copy)
    assert (copy / "model.safetensors").read_bytes() == before
    names = sorted(file.name for file in copy.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]


def test_shards(tiny, tmp_path):
    tensors = list(tiny.state_dict().items())
    where = write_shards(tmp_path, tensors, limit=500_000)
    assert len(set(where.values())) == len(list(tmp_path.iterdir())) > 3
    for name, t in tensors[::40]:
        assert torch.equal(load_file(tmp_path / where[name])[name], t)


def change(folder, edit):
    found = load_file(folder / "model.safetensors")
    edit(found)
    save_file(found, folder / "model.safetensors")


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.pop("ladder.queries"), "missing.*ladder.queries"),
    (lambda t: t.update(extra=torch.zeros(2)), "tensor 'extra' is not part"),
    (lambda t: t.update({"ladder.queries": torch.zeros(9, 64)}),
     r"ladder.queries has shape \(9, 64\), expected \(8, 64\)"),
    (lambda t: t["ladder.queries"].fill_(float("inf")),
     "ladder.queries has values that are not finite"),
])
def test_bad_tensors_are_named(copy, edit, message):
    change(copy, edit)
    with pytest.raises(ValueError, match=message):
        TBAC.load(copy)


def test_a_truncated_file_is_named(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        TBAC.load(copy)


@pytest.mark.parametrize("missing, message", [
    ("config.json", "config.json is missing"),
    ("tokenizer.json", "tokenizer.json is missing"),
    ("model.safetensors", r"no \*.safetensors"),
])
def test_a_missing_file_is_named(copy, missing, message):
    (copy / missing).unlink()
    with pytest.raises(ValueError, match=message):
        TBAC.load(copy)


def test_a_folder_of_the_wrong_kind_is_named(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"weights_convert.py"):
        TBAC.load(copy)


# ---------------------------------------------------------------------------------------- prompts

def test_a_long_prompt_is_cut_with_a_warning_and_an_empty_one_is_fine(model):
    model.config = dataclasses.replace(model.config, max_prompt=77)
    long = "circle " * 400
    with pytest.warns(UserWarning, match="cut from .* to 77 tokens"):
        found = model.encode([long])
    ids = model.mllm.tokenizer.encode(long)[:77]
    want = model.encode([model.mllm.tokenizer.decode(ids)])
    assert relative(found.detach(), want.detach()) < 1e-5
    assert model.encode([""]).shape == (4, 1, 8, 48)


def listen(folder, monkeypatch, capsys, *words):
    """What sample.py says on stderr, but for its progress."""
    out = str(folder / "out.png")
    monkeypatch.setattr("sys.argv", ["sample.py", "--model", str(folder), "--out", out, *words])
    sample.main()
    return [line for line in capsys.readouterr().err.splitlines() if "heard" in line]


def test_compile_is_warmed_up_before_it_draws(copy, monkeypatch):
    """By a picture in one step."""
    drawn = []
    monkeypatch.setattr(fast, "compile_parts", lambda model, warm_up: drawn.append(warm_up()))
    out = copy / "out.png"
    monkeypatch.setattr("sys.argv", ["sample.py", "--model", str(copy), "--out", str(out),
                                     "--compile", "--steps", "2", "a dog"])
    sample.main()
    assert [len(pictures) for pictures in drawn] == [1] and out.is_file()


def test_words_that_a_model_has_never_heard_are_named(copy, monkeypatch, capsys):
    """If its folder says which it knows; it draws and answers all the same."""
    words = ("a red Corgi’s corgi", "--negative", "dog", "--steps", "1")
    assert listen(copy, monkeypatch, capsys, *words) == []
    (copy / "words.txt").write_text("a\nred\nare\nthere\n")
    assert listen(copy, monkeypatch, capsys, *words) == [
        "warning: never heard: corgi's, corgi, dog"]
    assert (copy / "out.png").exists()
    assert listen(copy, monkeypatch, capsys, "--ask", "are there 2?") == ["warning: never heard: 2"]
    assert listen(copy, monkeypatch, capsys, "reds", "--steps", "1") == []
    many = " ".join(f"{letter}x" for letter in "bcdefghijklmnopqrstuv")
    with pytest.warns(UserWarning, match=r"bx, cx.* mx and 9 others$"):
        words_of.listen(copy, many)


def test_prompts_and_images_must_fit(model):
    with pytest.raises(ValueError, match="2 prompts but 1"):
        model.encode(["a", "b"], [[]])
    for wrong in ("a dog", []):
        with pytest.raises(ValueError, match="a list of prompts, got"):
            model.encode(wrong)
        with pytest.raises(ValueError, match="a list of prompts, got"):
            model.ask_all(wrong)
    with pytest.raises(ValueError, match="image tokens itself"):
        model.encode(["draw <|image_pad|>"])


# ------------------------------------------------------------------------------- the command line

def draw(model, *args):
    return run("sample.py", *args, "--model", model, "--steps", 2)


def test_without_arguments_it_explains_itself():
    done = run("sample.py")
    assert done.returncode == 0
    assert "--guidance" in done.stdout
    assert "a red circle left of a blue square" in done.stdout


@pytest.mark.slow
def test_a_seed_gives_the_same_picture_whatever_n_is(tiny_folder, tmp_path):
    one, two, three = (tmp_path / name for name in ("one.png", "two.png", "three.png"))
    assert draw(tiny_folder, "a dog", "--seed", 4, "--out", one).returncode == 0
    seeds_3_and_4 = ["a dog", "--seed", 3, "--n", 2]
    done = draw(tiny_folder, *seeds_3_and_4, "--out", two, "--negative", "cat")
    assert done.returncode == 0, done.stderr
    assert draw(tiny_folder, *seeds_3_and_4, "--out", three).returncode == 0
    one, other, sheet = map(Image.open, (one, tmp_path / "three-2.png", three))
    assert one.tobytes() == other.tobytes()
    assert min(sheet.size) > 256
    assert one.text["prompt"] == "a dog"
    assert one.text["seed"] == "4"
    assert one.text["steps"] == "2"
    assert Image.open(tmp_path / "two-1.png").text["negative"] == "cat"


def test_plain_draws_the_same_picture(tiny_folder, tmp_path, monkeypatch):
    """Up to rounding: at most one level of a channel. Without --plain the fast path is on."""
    values, switched, enable = [], [], fast.enable
    monkeypatch.setattr(fast, "enable", lambda model: switched.append(model) or enable(model))
    for more in ([], ["--plain"]):
        words = ["a dog", "--model", tiny_folder, "--steps", 2, "--out", tmp_path / "a.png", *more]
        monkeypatch.setattr("sys.argv", ["sample.py", *map(str, words)])
        sample.main()
        assert len(switched) == 1
        values.append(torch.tensor(list(Image.open(tmp_path / "a.png").tobytes())))
    assert (values[0] - values[1]).abs().max() <= 1


def test_every_setting_of_the_command_line_reaches_the_picture(tiny_folder, one, tmp_path,
                                                               monkeypatch):
    red, out = tmp_path / "red.png", tmp_path / "a.png"
    Image.new("RGB", (60, 40), "red").save(red)
    words = ["a dog", "--image", red, "--negative", "a cat", "--guidance", 2, "--image-guidance", 3,
             "--solver", "euler", "--steps", 3, "--size", "32x64", "--seed", 7, "--out", out,
             "--model", tiny_folder, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, words)])
    sample.main()
    settings = dict(negative="a cat", guidance=2.0, image_guidance=3.0, solver="euler", steps=3,
                    size=(64, 32))

    def picture(**changed):
        generator = torch.Generator().manual_seed(7)
        return sample.generate(one, ["a dog"], [[Image.open(red)]], generator=generator,
                               **settings | changed)[0].tobytes()

    assert Image.open(out).tobytes() == picture() != picture(negative="")


def test_edit_and_ask(tiny_folder, tmp_path):
    source, edited = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGB", (60, 40), "red").save(source)
    done = draw(tiny_folder, "make it blue", "--image", source, "--out", edited, "--size", "32x64")
    assert done.returncode == 0, done.stderr
    assert Image.open(edited).size == (32, 64)
    done = draw(tiny_folder, "--ask", "what is it?", "--image", source)
    assert done.returncode == 0
    answer = TBAC.load(tiny_folder).ask("what is it?", [Image.open(source)])
    assert done.stdout.strip() == answer


def refused(monkeypatch, *words):
    """What sample.py ends with."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        sample.main()
    return ended.value.code


@pytest.mark.parametrize("args, message", [
    (["a dog", "--size", "30"], "multiples of 4"),
    (["a dog", "--out", "tests"], "is a folder"),
    (["a dog", "--out", "nowhere/x.png"], "no folder nowhere"),
    (["a dog", "--image", "README.md"], "not a readable picture"),
    (["a dog", "--image", "nothing.png"], "nothing.png"),
    (["a dog", "--model", "tests"], "config.json is missing"),
    (["a dog", "--out", "dog.jpg"], "call it dog.png"),
    (["a dog", "--out", "x" * 300 + ".png"], "name too long"),
])
def test_errors_are_one_clear_line(tiny_folder, args, message, monkeypatch):
    said = refused(monkeypatch, "--model", tiny_folder, *args)
    assert said.startswith("error: ") and message in said and "\n" not in said


@pytest.mark.parametrize("args, message", [
    (["--image", "a.png", "make it blue"], "stands before --image"),
    (["a dog", "--ask", "what is it?"], "not both"),
    (["a dog", "--n", "0"], "--n: must be a whole number from 1 to 1000, not '0'"),
    (["a dog", "--n", "1000000000"], "--n: must be"),
    (["a dog", "--steps", "1001"], "--steps: must be"),
    (["a dog", "--seed", "18446744073709551616"], "--seed: must be"),
    (["a dog", "--guidance", "nan"], "--guidance: must be a number from 0 to 1000, not 'nan'"),
    (["a dog", "--guidance", "1e38"], "--guidance: must be"),
    (["a dog", "--image-guidance", "inf"], "--image-guidance: must be"),
    (["a dog", "--size", "banana"], "--size: must be a number of pixels or WIDTHxHEIGHT"),
    (["a dog", "--size", "1000000"], "--size: must be"),
    (["a dog", "--device", "banana"], "--device: must be cpu, cuda"),
    (["a \udcff dog"], "not UTF-8"),
    (["--ask", "x" * 100_000], "is 100000 bytes long, 65536 bytes are the limit"),
    (["a dog", "--model", "\udcff"], "not UTF-8"),
    (["a dog", "--out", ""], "is empty"),
])
def test_what_cannot_be_meant_is_said_in_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as ended:
        sample.options(args)
    error, = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and error.startswith("error: ") and message in error


@pytest.mark.parametrize("name, more", [
    ("a.png", []), ("a-2.png", ["--n", 2]), ("a-explain.png", ["--explain"])])
def test_a_picture_is_not_lost_to_its_edit(tiny_folder, tmp_path, monkeypatch, name, more):
    source = tmp_path / name
    Image.new("RGB", (32, 32), "red").save(source)
    words = ("make it blue", "--image", source, "--model", tiny_folder, "--out", tmp_path / "a.png")
    assert "is one of --image" in refused(monkeypatch, *words, *more)
    assert Image.open(source).getpixel((0, 0)) == (255, 0, 0)


# --------------------------------------------------------------------------------------- pictures

@pytest.mark.parametrize("mode, value, seen", [
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
    ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
    ("LA", (0, 0), (255, 255, 255)),
    ("I;16", 128 << 8, (128, 128, 128)),
    ("1", 1, (255, 255, 255)),
    ("L", 7, (7, 7, 7)),
])
def test_pictures_of_every_mode_look_as_in_a_viewer(tmp_path, mode, value, seen):
    """What is transparent is white, not what colour it hides; 16 bits are not cut off at 255."""
    Image.new(mode, (4, 4), value).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == seen


def test_a_picture_of_floats_is_refused(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="floats"):
        open_image(tmp_path / "a.tiff")


def test_a_huge_picture_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="more than 5000 pixels: 100 x 100"):
        open_image(tmp_path / "a.png", most=5000)
    # Far above: Pillow itself does not open it.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="more than 5000 pixels"):
        open_image(tmp_path / "a.png", most=5000)


def test_the_project_reads_no_pickle():
    folders = [ROOT, *(ROOT / name for name in ("engine", "toy", "lab"))]
    files = [file for folder in folders for file in folder.glob("*.py")]
    assert len(files) > 20
    for file in files:
        code = file.read_text()
        assert "torch.load" not in code, file
        assert "import pickle" not in code, file
