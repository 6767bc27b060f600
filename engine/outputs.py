"""The files that sample.py writes: where they are, what they may write over, and how they are
written. Other scripts that write pictures ask the same of them."""
import json
import pathlib
from dataclasses import dataclass

from PIL import Image, PngImagePlugin

from engine import files
from engine.files import check_replaceable, check_writable

# How a file of this kind begins; a page, as engine/explain.html does.
SIGNATURES = {".png": b"\x89PNG\r\n\x1a\n",
              ".html": b"<!DOCTYPE html>\n<!-- of sample.py --explain -->"}


@dataclass
class Outputs:
    """Pictures, a sheet of them if there are several, a poster that explains, the same as a page to
    touch."""
    pictures: list[pathlib.Path]
    sheet: pathlib.Path | None
    poster: pathlib.Path | None
    html: pathlib.Path | None

    def every(self) -> list[pathlib.Path]:
        return [*self.pictures, *filter(None, (self.sheet, self.poster, self.html))]


def outputs(args) -> Outputs:
    """args: of sample.py."""
    out = pathlib.Path(args.out)
    poster = out.with_name(f"{out.stem}-explain.png") if args.explain else None
    html = poster and poster.with_suffix(".html")
    if args.ask is not None:
        return Outputs([], None, poster, html)
    if args.n == 1:
        return Outputs([out], None, poster, html)
    pictures = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(args.n)]
    return Outputs(pictures, out, poster, html)


def check_outputs(args) -> None:
    """Before any work: ValueError or OSError where a file could not be written, or would take the
    place of something of another kind, or of a picture that is read."""
    out = pathlib.Path(args.out)
    check_name("--out", out)
    found = outputs(args).every()
    if found and not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    for file in found:
        check_kind(file)
        if file.exists() and any(file.samefile(source) for source in args.image):
            raise ValueError(f"{file} is one of --image and would be lost: give another --out")
    if found:
        check_writable(out.parent)


def check_name(option: str, file: pathlib.Path) -> None:
    """ValueError where a picture would not be called so."""
    if file.is_dir():
        raise ValueError(f"{option} {file}: is a folder")
    if file.suffix.lower() != ".png":
        name = file.with_suffix(".png") if file.name else "out.png"
        raise ValueError(f"{option} {file}: pictures are written as PNG, call it {name}")


def prepare_folder(folder, *names: str) -> None:
    """A folder in which files of these names are to be written: made where there is none, and
    tried."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder)
    for name in names:
        check_kind(folder / name)


def check_kind(file: pathlib.Path) -> None:
    """ValueError where something has this name that is not of the kind that it says."""
    check_replaceable(file)
    if not file.exists():
        return
    kind = file.suffix.lower()
    # Of other kinds any file will do.
    expected = SIGNATURES.get(kind, b"")
    with open(file, "rb") as f:
        found = f.read(len(expected))
    if found != expected:
        name = "a PNG" if kind == ".png" else "a page of this --explain"
        raise ValueError(f"{file} is not {name} and would be lost: give another name")


def save_png(image: Image.Image, file: pathlib.Path, settings: dict) -> None:
    """Writes the picture with its prompt and settings as text chunks; an interrupted write leaves
    nothing half done."""
    info = PngImagePlugin.PngInfo()
    for key, value in settings.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, default=str))
    files.save_png(image, file, pnginfo=info)
