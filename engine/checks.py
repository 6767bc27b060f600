"""What a config.json may hold: the kind and range of every key in one table (CONFIG), and the rules
that join several keys in another (RULES). Nothing has a default: a key that is missing or unknown
is an error. What an older format lacks stands in ADDED. A message names file, key, value and what
is expected.

The dataclasses themselves stand in vit.py, mllm.py, dit.py, dcae.py and tbac.py.
"""
import difflib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.limits import (
    MAX_FACTOR,
    MAX_LAYERS,
    MAX_NAME_CHARACTERS,
    MAX_QUERIES,
    MAX_SIZE,
    MAX_TOKENS,
    MAX_VOCABULARY,
    MAX_WIDTH,
)
from ladder import CONNECTORS, WIRINGS

# Of config.json, raised when an older program would misread a newer folder.
FORMAT = 3
# {format: the keys that it has added, with what folders from before it mean}
ADDED = {2: {"connector": "shared"}, 3: {"guidance": 4.5}}


def shown(value) -> str:
    """What stands in a file, for a message: escaped, and cut."""
    text = repr(value)
    if len(text) > MAX_NAME_CHARACTERS:
        text = f"{text[:MAX_NAME_CHARACTERS]}..."
    return text


def printable(text, limit: int = MAX_NAME_CHARACTERS) -> str:
    """What comes from a file, for a message: control characters are escaped (they would steer a
    terminal), and what is too long is cut."""
    text = str(text)
    cut = "..." if len(text) > limit else ""
    letters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return "".join(letters) + cut


# --------------------------------------------------------------------------------------- kinds

@dataclass(frozen=True)
class Kind:
    """What a value must be: in words, as a test, and how it is kept."""
    text: str
    test: Callable[[Any], bool]
    keep: Callable[[Any], Any] = lambda value: value

    def check(self, value, where: str):
        """The value as it is kept. ValueError that begins with `where`: file and key."""
        if not self.test(value):
            raise ValueError(f"{where} = {shown(value)}, expected {self.text}")
        return self.keep(value)


def whole(low: int, high: int) -> Kind:
    # In Python, True is a number, too: isinstance(True, int).
    return Kind(f"a whole number from {low} to {high}",
                lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    # NaN fails both comparisons.
    return Kind(f"a number from {low:g} to {high:g}",
                lambda value: type(value) in (int, float) and low <= value <= high, float)


def one_of(*words: str) -> Kind:
    return Kind(f"one of {', '.join(words)}", lambda value: type(value) is str and value in words)


def several(low: int, high: int, each: Kind) -> Kind:
    """A list of `low` to `high` values, kept as a tuple."""
    count = f"{low}" if low == high else f"{low} to {high}"
    return Kind(f"a list of {count}, each {each.text}",
                lambda value: type(value) in (list, tuple) and low <= len(value) <= high
                and all(each.test(one) for one in value), tuple)


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.text}, or null", lambda value: value is None or kind.test(value))


LAYERS = whole(1, MAX_LAYERS)
WIDTH = whole(1, MAX_WIDTH)
# Each stage of the autoencoder halves the sides.
STAGES = 12

# ------------------------------------------------------------------------------------ the table

CONFIG = {
    "format": whole(1, FORMAT),
    "mllm": {
        "vocab_size": whole(1, MAX_VOCABULARY),
        "n_layer": LAYERS,
        "dim": WIDTH,
        "n_head": WIDTH,
        "n_kv_head": WIDTH,
        "head_dim": WIDTH,
        "mlp_dim": WIDTH,
        "rope_theta": number(1.001, 1e12),
        "rope_sections": several(3, 3, whole(0, MAX_WIDTH)),
        "vision": {
            "n_layer": LAYERS,
            "dim": WIDTH,
            "n_head": WIDTH,
            "mlp_dim": WIDTH,
            "patch": whole(1, 256),
            "frames": whole(1, 16),
            "merge": whole(1, 16),
            "window": whole(1, MAX_SIZE),
            "full_attention": several(0, MAX_LAYERS, whole(0, MAX_LAYERS)),
            "area": whole(1, MAX_SIZE ** 2),
        },
    },
    "dit": {
        "n_layer": LAYERS,
        "n_head": WIDTH,
        "head_dim": WIDTH,
        "cross_n_head": WIDTH,
        "mlp_ratio": number(0.01, 100),
        "channels": WIDTH,
        "caption_dim": WIDTH,
    },
    "dcae": {
        "widths": several(1, STAGES, WIDTH),
        "encoder_layers": several(1, STAGES, whole(0, MAX_LAYERS)),
        "decoder_layers": several(1, STAGES, whole(0, MAX_LAYERS)),
        "attention_stages": whole(0, STAGES),
        # Pictures are red, green and blue.
        "in_channels": whole(3, 3),
        "latent_channels": WIDTH,
        "head_dim": WIDTH,
        "kernel": whole(1, 99),
        "scaling_factor": number(1e-4, 1e4),
    },
    "n_query": whole(1, MAX_QUERIES),
    "wiring": one_of(*WIRINGS),
    "connector": one_of(*CONNECTORS),
    "size": whole(1, MAX_SIZE),
    "guidance": number(0, MAX_FACTOR),
    "image_guidance": number(0, MAX_FACTOR),
    "max_prompt": whole(1, MAX_TOKENS),
    "dtype": one_of("float32", "float16", "bfloat16"),
}

# ------------------------------------------------------------------------------------ the rules

def attention_widths(dcae) -> tuple:
    """Of the stages that have attention: the innermost ones."""
    return dcae.widths[len(dcae.widths) - dcae.attention_stages:]


def quarters(widths: tuple) -> bool:
    """The shortcuts move 2 x 2 pixels into channels: four times one width holds the next a whole
    number of times."""
    return all(4 * outer % inner == 0 for outer, inner in zip(widths, widths[1:]))


# (key, what is expected of it, does a TBACConfig have it?)
RULES = [
    ("mllm.n_layer", "dit.n_layer or more", lambda c: c.mllm.n_layer >= c.dit.n_layer),
    ("mllm.n_head", "a multiple of mllm.n_kv_head",
     lambda c: c.mllm.n_head % c.mllm.n_kv_head == 0),
    ("mllm.head_dim", f"at most {MAX_WIDTH} / mllm.n_head",
     lambda c: c.mllm.n_head * c.mllm.head_dim <= MAX_WIDTH),
    ("mllm.rope_sections", "three numbers whose sum is half of mllm.head_dim",
     lambda c: 2 * sum(c.mllm.rope_sections) == c.mllm.head_dim),
    ("mllm.vision.dim", "a multiple of 4 mllm.vision.n_head",
     lambda c: c.mllm.vision.dim % (4 * c.mllm.vision.n_head) == 0),
    ("mllm.vision.dim", f"at most {MAX_WIDTH} / mllm.vision.merge^2",
     lambda c: c.mllm.vision.dim * c.mllm.vision.merge ** 2 <= MAX_WIDTH),
    ("mllm.vision.window", "a multiple of mllm.vision.patch * mllm.vision.merge",
     lambda c: c.mllm.vision.window % (c.mllm.vision.patch * c.mllm.vision.merge) == 0),
    ("mllm.vision.full_attention", "layers below mllm.vision.n_layer, each once, in order",
     lambda c: list(c.mllm.vision.full_attention)
     == sorted({i for i in c.mllm.vision.full_attention if i < c.mllm.vision.n_layer})),
    ("mllm.vision.area", "(mllm.vision.patch * mllm.vision.merge)^2 or more",
     lambda c: c.mllm.vision.area >= (c.mllm.vision.patch * c.mllm.vision.merge) ** 2),
    ("dit.head_dim", f"at most {MAX_WIDTH} / dit.n_head", lambda c: c.dit.dim <= MAX_WIDTH),
    ("dit.cross_n_head", "a divisor of dit.n_head * dit.head_dim",
     lambda c: c.dit.dim % c.dit.cross_n_head == 0),
    ("dit.mlp_ratio", "more than 1 / (dit.n_head * dit.head_dim)",
     lambda c: c.dit.dim * c.dit.mlp_ratio >= 1),
    ("dit.channels", "dcae.latent_channels, which the DiT paints",
     lambda c: c.dit.channels == c.dcae.latent_channels),
    ("dcae.encoder_layers", "as many numbers as dcae.widths",
     lambda c: len(c.dcae.encoder_layers) == len(c.dcae.widths)),
    ("dcae.decoder_layers", "as many numbers as dcae.widths",
     lambda c: len(c.dcae.decoder_layers) == len(c.dcae.widths)),
    ("dcae.attention_stages", "at most as many as dcae.widths",
     lambda c: c.dcae.attention_stages <= len(c.dcae.widths)),
    ("dcae.widths", "widths of which each divides 4 times the one before",
     lambda c: quarters(c.dcae.widths)),
    ("dcae.latent_channels", "a divisor of the last of dcae.widths",
     lambda c: c.dcae.widths[-1] % c.dcae.latent_channels == 0),
    ("dcae.head_dim", "a divisor of the last dcae.attention_stages of dcae.widths",
     lambda c: all(width % c.dcae.head_dim == 0 for width in attention_widths(c.dcae))),
    ("dcae.kernel", "an odd number", lambda c: c.dcae.kernel % 2 == 1),
    ("size", "a multiple of 2^(stages - 1), where dcae.widths has the stages",
     lambda c: c.size % c.dcae.factor == 0),
]

# ----------------------------------------------------------------------------------- the checks

def check_keys(found, kinds: dict | Kind, where: str, path: str = ""):
    """Every value of a config.json (or of a part of it, `path`), as it is kept. ValueError for the
    first key that is unknown or missing, or whose value is not of its kind."""
    at = f"{where}: {path}"
    if isinstance(kinds, Kind):
        return kinds.check(found, at)
    if not isinstance(found, dict):
        raise ValueError(f"{at} = {shown(found)}, expected an object with the keys {[*kinds]}")
    prefix = f"{path}." if path else ""
    for key in found:
        if key not in kinds:
            near = difflib.get_close_matches(key[:MAX_NAME_CHARACTERS], kinds, 1)
            hint = f"is {near[0]} meant?" if near else f"known are {', '.join(kinds)}"
            raise ValueError(f"{where} has an unknown key {shown(prefix + key)}: {hint}")
    for key in kinds:
        if key not in found:
            raise ValueError(f"{where} has no {prefix}{key}")
    return {key: check_keys(found[key], kind, where, prefix + key)
            for key, kind in kinds.items()}


def upgraded(found: dict, since: int) -> dict:
    """A config of format `since` as one of this format."""
    for number, keys in ADDED.items():
        if since < number:
            found = keys | found
    return found


def check_config(found, where: str) -> dict:
    """The content of a config.json with every value checked, lists as tuples. ValueError also for
    that of another program, or of another version of this one."""
    if not isinstance(found, dict) or not {"mllm", "dit", "dcae"} <= found.keys():
        raise ValueError(f"{where} lacks mllm, dit or dcae: not a folder of this project "
                         "(public weights: weights_convert.py)")
    if "format" not in found:
        raise ValueError(f"{where} has no format. Folders from before version 0.2.0 have none, and "
                         'are otherwise those of format 1: add the line "format": 1, to it')
    number = found["format"] if type(found["format"]) is int else 0
    if number > FORMAT:
        raise ValueError(f"{where} has format {shown(number)}, and this version reads formats up "
                         f"to {FORMAT}: use a newer version of this project")
    found = upgraded(found, number)
    checked = check_keys(found, CONFIG, where)
    del checked["format"]
    return checked


def check_rules(config, where: str) -> None:
    """ValueError for the first rule that a TBACConfig breaks."""
    for key, expected, holds in RULES:
        if not holds(config):
            value = operator.attrgetter(key)(config)
            raise ValueError(f"{where}: {key} = {shown(value)}, expected {expected}")
