"""The explanation as a page to touch: `python sample.py "..." --explain` writes it beside the PNG,
and in a notebook it displays itself.

One HTML file that asks for nothing else and stays below MAX_BYTES at the released sizes.
explain.html is its text, its script and, with page.css, its style; the data that they show is made
here, one JSON object: numbers as bytes with a scale, pictures as PNG or JPEG within a budget.

Dimension key: as in explain.py; M moments, A tokens of an answer.
"""
import base64
import html
import io
import json
import pathlib
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from engine.checks import printable
from engine.explain import pooled, watched_encoding
from engine.mixer import slots
from mllm import ASK

HERE = pathlib.Path(__file__).parent

# Of a whole page. What follows adds up to less, at the released sizes.
MAX_BYTES = 1_500_000
# Of pictures of each kind: how many pixels their longer side has at most, and how many bytes all of
# them together. (base64 makes four bytes of three.)
PICTURE = dict(side=512, budget=120_000)
INPUTS = dict(side=320, budget=75_000)
MOMENTS = dict(side=176, budget=144_000)
EXCHANGES = dict(side=144, budget=240_000)
# Input pictures that are shown.
MAX_INPUTS = 3
# Tokens of a prompt or an answer that are shown, and characters of a token and of a text.
MAX_WORDS = 256
MAX_ANSWER = 64
MAX_TOKEN = 40
MAX_TEXT = 2000


@dataclass
class Explanation:
    """What the page shows, as it stands in the file."""
    data: dict

    def html(self) -> str:
        return filled("explain.html", self.data)

    def _repr_html_(self) -> str:
        """For a notebook: the page in a frame of its own, so that styles do not mix."""
        page = html.escape(self.html())
        return (f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="{self.data["title"]}" '
                'style="width: 100%; height: 54rem; border: 0"></iframe>')


def filled(name: str, data: dict) -> str:
    """A page of this folder with what its script reads."""
    return template(name).replace("{{data}}", in_script(data))


def template(name: str) -> str:
    """A page of this folder, with the style that our pages share."""
    page, style = ((HERE / file).read_text(encoding="utf-8") for file in (name, "page.css"))
    return page.replace("{{style}}", style)


def in_script(data: dict) -> str:
    """JSON that can stand in a <script> element whatever its texts hold: ASCII, and no character
    that could end the element or begin a comment in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


# ------------------------------------------------------------------------- numbers and pictures

def packed(values: Tensor) -> dict:
    """Numbers from 0 on as bytes: each is its byte * scale / 255. In base64, row by row."""
    values = values.detach().float().cpu()
    scale = max(values.max().item(), 1e-12) if values.numel() else 1.0
    content = (values / scale * 255).round().byte().numpy().tobytes()
    return dict(shape=list(values.shape), scale=scale, bytes=base64.b64encode(content).decode())


def shown(images: list[Image.Image], side: int, budget: int) -> list[str]:
    """Pictures as data: addresses, made smaller where they are larger than `side`, all of them
    together within about `budget` bytes."""
    each = budget // max(1, len(images))
    return [address(smaller(image, side), each) for image in images]


def smaller(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def address(image: Image.Image, budget: int) -> str:
    """As a PNG where that is within the budget, else as the best JPEG that is."""
    attempts = [("png", dict(optimize=True))]
    attempts += [("jpeg", dict(quality=quality)) for quality in (90, 80, 70, 55, 40, 25, 10)]
    for kind, settings in attempts:
        content = content_of(image, kind, **settings)
        if len(content) <= budget:
            break
    return data_address(content, kind)


def content_of(image: Image.Image, kind: str, **settings) -> bytes:
    """Of a file of this kind."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def data_address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ------------------------------------------------------------------------------------ the tokens

def user_turn(ids: list[int], tokenizer) -> range:
    """Which tokens of a chat are what the user says, pictures included: between the second
    <|im_start|> with its "user" and the last <|im_end|>."""
    starts = [i for i, id in enumerate(ids) if id == tokenizer.special["im_start"]]
    ends = [i for i, id in enumerate(ids) if id == tokenizer.special["im_end"]]
    first = starts[1] + 1 + len(tokenizer.encode("user\n"))
    return range(first, ends[-1])


def tokens_of(batch, tokenizer) -> tuple[list[dict], list[list[int]]]:
    """A batch of one row -> the parts of its user's turn, [{text, picture}], and which tokens each
    of them stands for: a word for one, a picture (its number, from 0) for all of its own."""
    ids = batch.ids[0].tolist()
    pad, start, end = (tokenizer.special[name]
                       for name in ("image_pad", "vision_start", "vision_end"))
    parts, places = [], []
    for i in user_turn(ids, tokenizer):
        if ids[i] == pad:
            # The first of a picture.
            if ids[i - 1] != pad:
                n = sum(part["picture"] is not None for part in parts)
                parts.append(dict(text=f"picture {n + 1}", picture=n))
                places.append([])
            places[-1].append(i)
        # Not those around a picture. (A prompt may have some of its own.)
        elif ids[i:i + 2] != [start, pad] and ids[i - 1:i + 1] != [pad, end]:
            parts.append(dict(text=word(tokenizer, ids[i]), picture=None))
            places.append([i])
    return parts, places


def first_words(parts: list, places: list) -> tuple[list[dict], list[list[int]]]:
    """What a page has room for: all pictures, and the first words."""
    most = MAX_WORDS + sum(part["picture"] is not None for part in parts)
    return parts[:most], places[:most]


def word(tokenizer, id: int) -> str:
    return printable(tokenizer.decode([id], keep_special=True), MAX_TOKEN)


def per_part(weights: Tensor, places: list[list[int]]) -> Tensor:
    """Attention to tokens (..., T) -> to what is shown (..., parts)."""
    if not places:
        return weights[..., :0]
    return torch.stack([weights[..., place].sum(-1) for place in places], -1)


def over_pictures(weights: Tensor, model, batch, parts, places) -> list[dict]:
    """Attention to tokens (..., T) -> for each of the first pictures a map (..., h, w) of its
    units."""
    merge = model.config.mllm.vision.merge
    of_pictures = [place for part, place in zip(parts, places) if part["picture"] is not None]
    maps = []
    for place, (_, (h, w)) in zip(of_pictures[:MAX_INPUTS], batch.pictures):
        maps.append(packed(pooled(weights[..., place].unflatten(-1, (h // merge, w // merge)))))
    return maps


# ------------------------------------------------------------------------------------- the pages

# Of a request, what is named beneath the prompt.
SETTINGS = ("steps", "solver", "guidance", "image_guidance", "negative")


def drawing(model, request: dict, seed: int, picture: Image.Image, drawn,
            exchanges: tuple | None = None) -> Explanation:
    """Of a drawing or an edit. request: what `denoise` was given, one prompt with its images;
    drawn: what explain.Drawn kept; exchanges: another prompt, and (name, picture) of
    mixer.single_exchanges, one after the other."""
    prompt, images = request["prompts"][0], request["images"][0]
    batch, read = watched_encoding(model, prompt, images)
    parts, places = first_words(*tokens_of(batch, model.mllm.tokenizer))
    data = dict(
        kind="edit" if images else "drawing",
        title="How this picture came about",
        prompt=printable(prompt, MAX_TEXT),
        settings=[f"seed {seed}", *settings_of(request)],
        picture=shown([picture], **PICTURE)[0],
        inputs=shown(images[:MAX_INPUTS], **INPUTS),
        ladder=ladder_of(model),
        moments=moments_of(model, drawn),
        attention=packed(torch.stack([attention for attention, _ in drawn.maps])),
        added=packed(torch.stack([added for _, added in drawn.maps])),
        tokens=parts,
        read=packed(per_part(read, places)),
        looks=over_pictures(read, model, batch, parts, places),
        mixer=mixer_of(exchanges),
    )
    return Explanation(data)


def settings_of(request: dict) -> list[str]:
    """An image guidance is none without an image, and nothing negative is nothing."""
    names = [name for name in SETTINGS if name != "image_guidance" or request["images"][0]]
    return [f"{name.replace('_', ' ')} {printable(request[name])}" for name in names
            if request[name] != ""]


def ladder_of(model) -> dict:
    """routes: for each rung which states it is made of, [[state, weight], ...]; slots: the first
    and the last query of each."""
    routes = []
    for row in model.ladder.matrix():
        routes.append([[i, round(row[i].item(), 4)] for i in row.nonzero()[:, 0].tolist()])
    queries = [[slot[0], slot[-1]] for slot in slots(model.config.n_query)]
    return dict(layers=model.config.mllm.n_layer, routes=routes, slots=queries)


def moments_of(model, drawn) -> list[dict]:
    pictures = [picture for pair in drawn.decoded(model) for picture in pair]
    addresses = shown(pictures, **MOMENTS)
    return [dict(step=step.i + 1, t=round(step.t, 4), x_t=x_t, x0=x0)
            for step, x_t, x0 in zip(drawn.steps, addresses[::2], addresses[1::2])]


def mixer_of(exchanges: tuple | None) -> dict | None:
    if exchanges is None:
        return None
    other, pictures = exchanges
    # Made small as they come: of large ones, all would be too many to hold.
    small = {name: smaller(picture, EXCHANGES["side"]) for name, picture in pictures}
    addresses = shown(list(small.values()), **EXCHANGES)
    return dict(other=printable(other, MAX_TEXT), pictures=dict(zip(small, addresses)))


def answer(model, question: str, images: list, ids: list[int], seen: list) -> Explanation:
    """Of an answer. ids, seen: what explain.watched_answer gave."""
    tokenizer = model.mllm.tokenizer
    batch = model.mllm.tokenize([question], [images], ASK)
    parts, places = tokens_of(batch, tokenizer)
    n = batch.ids.shape[1]
    # Of the question; what came after it is the answer so far.
    weights = torch.stack([w[:n] for w in seen[:MAX_ANSWER]])              # (A, T)
    words = [word(tokenizer, id) for id in ids] + ["(end)"]
    # Of those that are not shown, too.
    said = [i for part, place in zip(parts, places) if part["picture"] is None for i in place]
    parts, places = first_words(parts, places)
    data = dict(
        kind="answer",
        title="How this answer came about",
        prompt=printable(question, MAX_TEXT),
        answer=words[:len(weights)],
        inputs=shown(images[:MAX_INPUTS], **INPUTS),
        tokens=parts,
        read=packed(per_part(weights, places)),
        on_words=[round(share, 4) for share in weights[:, said].sum(1).tolist()],
        looks=over_pictures(weights, model, batch, parts, places),
    )
    return Explanation(data)
