"""What one sees while the toy's parts are taught: a page of pictures for each stage of
lab/pretrain.py, drawn every --sheet-every steps."""
import torch
from PIL import Image

from engine.pictures import contact_sheet, to_images, to_pixels
from engine.sources import Example
from mllm import ASK
from sample import denoise
from toy import world
from vit import patchify


def picture_of(example, size: int) -> Image.Image:
    """What an example shows: a scene of the toy world, or a picture from --data."""
    return example.target if isinstance(example, Example) else world.render(example, size)


def beside(pairs: list[tuple[Image.Image, Image.Image]], labels: list[str]) -> Image.Image:
    """Pairs of pictures, four in a row; labels: of the second ones."""
    pictures = [picture for pair in pairs for picture in pair]
    texts = [text for label in labels for text in ("", label)]
    return contact_sheet(pictures, texts, scale=2, columns=8)


def vit(run) -> Image.Image:
    """Pictures, and what each vision token says of its place: its shape in its colour."""
    c, size = run.model.config.mllm.vision, run.args.size
    pairs = []
    for scene in run.shown:
        picture = world.render(scene, size)
        patches, (h, w) = patchify(picture, c)
        hidden = run.model.mllm.encode_images([(patches, (h, w))])         # (U, M)
        shapes = said(run.helper, hidden, "shape")
        colours = said(run.helper, hidden, "colour")
        backgrounds = said(run.helper, hidden, "background")
        rows, columns = h // c.merge, w // c.merge
        things = []
        for i, (shape, colour) in enumerate(zip(shapes, colours)):
            if shape in world.SHAPES and colour in world.COLOURS:
                x, y = (i % columns + 0.5) / columns, (i // columns + 0.5) / rows
                things.append(world.Thing(shape, colour, "small", x, y))
        background = max(set(backgrounds), key=backgrounds.count)
        pairs.append((picture, world.render(world.Scene(tuple(things), background), size)))
    return beside(pairs, ["what each token says"] * len(pairs))


def said(code, hidden: torch.Tensor, attribute: str) -> list[str]:
    """hidden (U, M) -> the likeliest class of this attribute, for each."""
    classes = code.CLASSES[attribute]
    return [classes[i] for i in code.logits(hidden)[attribute].argmax(-1).tolist()]


def mllm(run) -> Image.Image:
    """Pictures, a question or an instruction about each, and what the MLLM answers. Where only a
    text was read, there is a white page."""
    pictures, labels = [], []
    for talk in run.shown:
        question, answer = talk.turns[0]
        images = [world.render(talk.scene, run.args.size)] if talk.scene else []
        batch = run.model.mllm.tokenize([question], [images], talk.system)
        ids, = run.model.mllm.generate(batch, 2 if run.args.dry_run else 40)
        found = run.model.mllm.tokenizer.decode(ids).strip()
        asked = question if talk.system == ASK else f"draw: {question}"
        verdict = "right" if found == answer else f"expected: {answer}"
        pictures += images or [Image.new("RGB", (run.args.size,) * 2, "white")]
        labels.append(f"{asked} -> {found} ({verdict})")
    return contact_sheet(pictures, labels, scale=4, columns=4)


def dcae(run) -> Image.Image:
    """Pictures, and the autoencoder's reconstructions."""
    pictures = [picture_of(example, run.args.size) for example in run.shown]
    dcae = run.model.dcae
    pixels = to_pixels(pictures, run.args.device, dcae.encoder.conv_in.weight.dtype)
    rebuilt = dcae.decode(dcae.encode(pixels))
    errors = (rebuilt - pixels).abs().mean((1, 2, 3)).tolist()
    return beside(list(zip(pictures, to_images(rebuilt))),
                  [f"mean error {error:.3f} of 2" for error in errors])


def dit(run) -> Image.Image:
    """Scenes, and what the DiT draws when it is told what is in them."""
    model, scenes = run.model, run.shown
    told = [list(run.helper.shown([(thing, False) for thing in scene.things], scene, exact=True))
            for scene in scenes]
    nothing = [[{}] * run.helper.n for _ in scenes]
    rungs = run.helper.rungs(model, nothing + told)
    *_, last = denoise(model, [""] * len(scenes), steps=1 if run.args.dry_run else 20,
                       generator=torch.Generator().manual_seed(0), conditioning=(rungs, 2))
    pictures = [world.render(scene, run.args.size) for scene in scenes]
    return beside(list(zip(pictures, model.decode(last.x_t))), ["drawn"] * len(scenes))
