"""Pictures in and out: a file becomes an upright RGB picture, pictures become numbers and numbers
pictures, and a contact sheet shows many of them at once."""
import textwrap
import warnings

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB. What is transparent becomes white (its hidden colour is often black), 16 bits become 8.
    ValueError for a picture whose values are floats."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int32) >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its values are floats, and no convention says which of them is white")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image.convert("RGBA"))
    return image.convert("RGB")


def open_image(file, name: str | None = None) -> Image.Image:
    """An upright RGB picture from a path or an open file; `name` stands for it in messages.
    ValueError if it cannot be read, or is so large that it may be an attack."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file)
            # Cameras store pictures lying on a side and note in EXIF how to turn them.
            return to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS
        raise ValueError(f"{name or file}: picture has more than {limit} pixels") from None
    # Decoders raise all sorts of errors on damaged bytes.
    except Exception as e:
        raise ValueError(f"{name or file} is not a readable picture: {e}") from None


# ------------------------------------------------------------------------- pictures as numbers

def to_pixels(images: list[Image.Image], device, dtype=torch.float32) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    pixels = torch.from_numpy(np.stack(arrays))  # (B, H, W, 3), 0 to 255
    pixels = pixels.permute(0, 3, 1, 2)          # (B, 3, H, W)
    return (pixels.to(device) / 127.5 - 1).to(dtype)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], or a little outside -> list of PIL images."""
    pixels = (pixels.float().clamp(-1, 1) + 1) * 127.5
    arrays = pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(array) for array in arrays]


# ---------------------------------------------------------------------------------- to look at

def contact_sheet(images, labels=None, scale: int = 1, columns: int | None = None) -> Image.Image:
    """Pictures of one size in a grid, a small text under each; `scale` enlarges them without
    smoothing."""
    width, height = (scale * side for side in images[0].size)
    columns = columns or min(len(images), max(1, 1080 // (width + 8)))
    n_row = -(-len(images) // columns)

    # Every cell has room for the longest text, at most six lines.
    font = ImageFont.load_default(10)
    letters = max(1, int(width / font.getlength("n")))
    texts = [textwrap.wrap(str(label), letters, max_lines=6, placeholder="...")
             for label in labels or [""] * len(images)]
    cell_height = height + 8 + 12 * max(len(lines) for lines in texts)

    page = Image.new("RGB", (columns * (width + 8) + 8, n_row * cell_height + 8), "white")
    draw = ImageDraw.Draw(page)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        x = 8 + i % columns * (width + 8)
        y = 8 + i // columns * cell_height
        enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        page.paste(enlarged, (x, y))
        # A frame, because many of the pictures are white, as the page is.
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline="lightgrey")
        draw.multiline_text((x, y + height), "\n".join(lines), "black", font, spacing=1)
    return page
