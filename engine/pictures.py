"""Pictures in and out: a file becomes an upright RGB picture as a viewer shows it, pictures become
numbers and numbers pictures, and a contact sheet shows many of them at once."""
import io
import os
import textwrap
import warnings

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from engine.checks import printable
from engine.files import regular_file
from engine.limits import MAX_PICTURE_BYTES, MAX_PIXELS, MAX_PROFILE_BYTES

# What is opened at all. Pillow knows many more, and for some of them it starts other programs on
# bytes that come from outside (Ghostscript for PostScript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SRGB = ImageCms.createProfile("sRGB")
# EXIF's tag 274, and how to turn what a camera stored lying on a side or mirrored.
ORIENTATION = 274
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unusable(ValueError):
    """A picture or a record that cannot be used. reason: in words that are the same for all of a
    kind, to be counted; where, and what more there is to say, stand in the message only."""

    def __init__(self, where, reason: str, more: str = ""):
        super().__init__(f"{where}: {reason}{more}")
        self.where = where
        self.reason = reason


# ------------------------------------------------------------------------------ files to pictures

def open_image(file, name: str | None = None, most: int = MAX_PIXELS) -> Image.Image:
    """An upright sRGB picture from a path or an open file; `name` stands for it in messages.
    Unusable, a ValueError, if it cannot be read, or has more than `most` pixels."""
    where = name or printable(file)
    if isinstance(file, str | os.PathLike):
        try:
            regular_file(file, MAX_PICTURE_BYTES)
        except ValueError as e:
            raise Unusable(where, "its file cannot be read", f": {e}") from None
    try:
        with warnings.catch_warnings():
            # Of odd metadata, and of a size that is refused below.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                check_pixels(image.size, where, most)
                return upright(to_srgb(image), image)
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise Unusable(where, too_many(most)) from None
    except Image.UnidentifiedImageError:
        raise Unusable(where, "not a readable picture", f": none of {', '.join(FORMATS)}") from None
    # Decoders raise all sorts of errors on damaged bytes.
    except Exception as e:
        raise Unusable(where, "not a readable picture", f": {e or type(e).__name__}") from None


def too_many(most: int) -> str:
    return f"picture has more than {most} pixels"


def check_pixels(size: tuple[int, int], where: str, most: int) -> None:
    width, height = size
    if width * height > most:
        raise Unusable(where, too_many(most), f": {width} x {height}")


def upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    """`picture`, turned as the metadata of `image`, the file that it comes from, say."""
    # The orientation alone: of other tags, many files hold what Pillow cannot write anew.
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    # Damaged metadata; viewers show such a picture as it is stored.
    except Exception:
        turn = None
    return picture if turn is None else picture.transpose(turn)


def to_srgb(image: Image.Image) -> Image.Image:
    """Mode RGB, in sRGB. What is transparent becomes white (its hidden colour is often black).
    ValueError for a picture whose values no convention turns into brightness."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = to_bytes(image)
    if not image.has_transparency_data:
        return by_profile(image, profile) if profile else image.convert("RGB")
    # (To convert to the same mode would copy.)
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    picture = image.convert("RGB")
    if profile:
        picture = by_profile(picture, profile)
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=image.getchannel("A"))
    return page


def to_bytes(image: Image.Image) -> Image.Image:
    """Grey values of 16 or 32 bits -> of 8. Those of 32 bits are 8 or 16 bits in a larger field,
    and which of them, only the values tell."""
    if image.mode == "F":
        raise ValueError("its values are floats, and no convention says which of them is white")
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its values go from {low} to {high}, and no convention says which of "
                         "them is white; expected 0 to 255 or 0 to 65535")
    wide = image.mode != "I" or high > 255
    grey = Image.fromarray((values >> 8 if wide else values).astype(np.uint8))
    # A PNG may name one value that is transparent.
    if "transparency" in image.info:
        seen = values != image.info["transparency"]
        grey.putalpha(Image.fromarray(255 * seen.astype(np.uint8)))
    return grey


def by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours as the file's colour profile means them -> sRGB. A profile that is damaged, or for
    another kind of picture, is ignored, as browsers do."""
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if len(profile) > MAX_PROFILE_BYTES:
        return image.convert("RGB")
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(found).startswith("sRGB"):
            return image.convert("RGB")
        return ImageCms.profileToProfile(image, found, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")


# ------------------------------------------------------------------------- pictures as numbers

def to_pixels(images: list[Image.Image], device, dtype=torch.float32) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    pixels = torch.from_numpy(np.stack(arrays))  # (B, H, W, 3), 0 to 255
    pixels = pixels.permute(0, 3, 1, 2)          # (B, 3, H, W)
    return (pixels.to(device) / 127.5 - 1).to(dtype)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], or a little outside -> list of PIL images. ValueError for values
    that are not finite: they would be black, as if somebody had asked for that."""
    if not pixels.isfinite().all():
        raise ValueError("the picture has values that are not finite: too much guidance, or "
                         "weights that are too large for their dtype")
    pixels = (pixels.float().clamp(-1, 1) + 1) * 127.5
    arrays = pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(array) for array in arrays]


# ---------------------------------------------------------------------------------- to look at

# At the end of a text that is cut; a line has room for it, however small the pictures are.
CUT = "..."


def contact_sheet(images, labels=None, scale: int = 1, columns: int | None = None,
                  size: tuple[int, int] | None = None) -> Image.Image:
    """Pictures in a grid, a small text under each. size: (width, height) of a cell, default the
    first picture's; `scale` enlarges without smoothing. A picture of another size is made to fit,
    uncropped."""
    size = size or images[0].size
    font = ImageFont.load_default(10)
    width, height = (scale * side for side in size)
    # Small pictures stand apart, so that their texts do not meet.
    letters = max(len(CUT), int(width / font.getlength("n")))
    cell = max(width, round(letters * font.getlength("n"))) + 8
    columns = columns or min(len(images), max(1, 1080 // cell))
    n_row = -(-len(images) // columns)

    # Every cell has room for the longest text, at most six lines.
    texts = [" ".join(str(label).split()) for label in labels or [""] * len(images)]
    texts = [textwrap.wrap(printable(text, 1000), letters, max_lines=6, placeholder=CUT)
             for text in texts]
    cell_height = height + 8 + 12 * max(len(lines) for lines in texts)

    page = Image.new("RGB", (columns * cell + 8, n_row * cell_height + 8), "white")
    draw = ImageDraw.Draw(page)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        x = 8 + i % columns * cell
        y = 8 + i // columns * cell_height
        page.paste(in_cell(image.convert("RGB"), size, scale), (x, y))
        # A frame, because many of the pictures are white, as the page is.
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline="lightgrey")
        draw.multiline_text((x, y + height), "\n".join(lines), "black", font, spacing=1)
    return page


def in_cell(image: Image.Image, size: tuple[int, int], scale: int) -> Image.Image:
    cell = (scale * size[0], scale * size[1])
    if image.size == size:
        return image.resize(cell, Image.Resampling.NEAREST)
    return ImageOps.pad(image, cell, Image.Resampling.BICUBIC, color="whitesmoke")
