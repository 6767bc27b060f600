"""The files that sample.py writes: where they are, what they may write over, and how they are
written."""
import json
import pathlib
from dataclasses import dataclass

from PIL import Image, PngImagePlugin

from engine import files
from engine.files import check_replaceable, check_writable

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass
class Outputs:
    """Pictures, a sheet of them if there are several, a page that explains."""
    pictures: list[pathlib.Path]
    sheet: pathlib.Path | None
    page: pathlib.Path | None

    def every(self) -> list[pathlib.Path]:
        return [*self.pictures, *(file for file in (self.sheet, self.page) if file)]


def outputs(args) -> Outputs:
    """args: of sample.py."""
    out = pathlib.Path(args.out)
    page = out.with_name(f"{out.stem}-explain.png") if args.explain else None
    if args.ask is not None:
        return Outputs([], None, page)
    if args.n == 1:
        return Outputs([out], None, page)
    pictures = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(args.n)]
    return Outputs(pictures, out, page)


def check_outputs(args) -> None:
    """Before any work: ValueError or OSError where a file could not be written, or would take the
    place of something that is not a PNG, or of a picture that is read."""
    out = pathlib.Path(args.out)
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder")
    found = outputs(args).every()
    if out.suffix.lower() != ".png":
        name = out.with_suffix(".png") if out.name else "out.png"
        raise ValueError(f"--out {out}: pictures are written as PNG, call it {name}")
    if found and not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    for file in found:
        check_png(file)
        if file.exists() and any(file.samefile(source) for source in args.image):
            raise ValueError(f"{file} is one of --image and would be lost: give another --out")
    if found:
        check_writable(out.parent)


def check_png(file: pathlib.Path) -> None:
    """ValueError where something has this name that is not a PNG file."""
    check_replaceable(file)
    if not file.exists():
        return
    with open(file, "rb") as f:
        found = f.read(len(PNG_SIGNATURE))
    if found != PNG_SIGNATURE:
        raise ValueError(f"{file} is not a PNG and would be lost: give another --out")


def save_png(image: Image.Image, file: pathlib.Path, settings: dict) -> None:
    """Writes the picture with its prompt and settings as text chunks; an interrupted write leaves
    nothing half done."""
    info = PngImagePlugin.PngInfo()
    for key, value in settings.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, default=str))
    files.save_png(image, file, pnginfo=info)
