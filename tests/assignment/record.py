"""Makes notebooks/assignment/recorded.safetensors: for each problem what goes in, what the
repository's own functions make of it, and what comes out of common mistakes.

    python -m tests.assignment.record
"""
import math
import types

import torch
from safetensors.torch import save
from torch import Tensor

from notebooks.assignment import adapters as empty
from notebooks.assignment import (
    test_1_flow,
    test_2_sampling,
    test_3_reading,
    test_4_dit,
    test_5_ladder,
)
from tests.assignment import adapters as right
from tests.assignment.mistakes import MISTAKES
from tests.conftest import ROOT

FILE = ROOT / "notebooks" / "assignment" / "recorded.safetensors"
PARTS = (test_1_flow, test_2_sampling, test_3_reading, test_4_dit, test_5_ladder)
NAMES = [name for name in vars(empty) if isinstance(vars(empty)[name], types.FunctionType)]


def recorded_tests() -> dict:
    """"1a_flow_matching" -> its test, in order; those whose outputs are recorded."""
    return {name.removeprefix("test_"): test for part in PARTS
            for name, test in vars(part).items() if hasattr(test, "answer")}


def plugged(**changed) -> types.SimpleNamespace:
    """The repository's own functions, some of them replaced."""
    names = {name: getattr(right, name) for name in NAMES}
    return types.SimpleNamespace(**names | changed)


# ------------------------------------------------------------------------------------- inputs

class Draw:
    """Random tensors, always the same."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, n_in: int, n_out: int, bias: bool = True) -> dict[str, Tensor]:
        weights = {f"{name}.weight": self(n_out, n_in, scale=n_in ** -0.5)}
        return weights | ({f"{name}.bias": self(n_out, scale=0.3)} if bias else {})

    def cross(self, dim: int) -> dict[str, Tensor]:
        names = ("q", "k", "v", "out")
        return {key: t for name in names for key, t in self.linear(name, dim, dim).items()}

    def ffn(self, dim: int, hidden: int) -> dict[str, Tensor]:
        return {
            "inverted.weight": self(2 * hidden, dim, 1, 1, scale=dim ** -0.5),
            "inverted.bias": self(2 * hidden, scale=0.3),
            "depthwise.weight": self(2 * hidden, 1, 3, 3, scale=0.5),
            "depthwise.bias": self(2 * hidden, scale=0.3),
            "pointwise.weight": self(dim, hidden, 1, 1, scale=hidden ** -0.5),
        }

    def projection(self, n_in: int, n_out: int) -> dict[str, Tensor]:
        """Connector, or caption projection."""
        gain = {"3.weight": 1 + self(n_out, scale=0.3)}
        return self.linear("0", n_in, n_out) | self.linear("2", n_out, n_out) | gain


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in weights.items()}


def flow_inputs() -> dict:
    draw = Draw(1)
    latents = dict(x0=draw(4, 3, 5, 4), eps=draw(4, 3, 5, 4),
                   t=torch.tensor([0.9, 0.6, 0.3337, 0.05]))
    moving = dict(x_t=draw(2, 3, 4, 4), v=draw(2, 3, 4, 4))
    return {"1a_flow_matching": latents, "1b_loss": latents, "1c_schedule": {},
            "1d_clean_latents": moving, "1e_euler": moving}


def sampling_inputs() -> dict:
    draw = Draw(2)

    def latents(*names):
        return {name: draw(2, 4, 3, 3) for name in names}

    return {
        "2a_guide": latents("null", "cond"),
        "2b_guide_with_image": latents("null", "image", "both"),
        "2c_dpm_2m": latents("x", "x0", "x0_prev") | {"times": right.schedule(5, 3.0)},
        "2d_denoise": latents("eps"),
    }


def reading_inputs() -> dict:
    draw = Draw(3)
    windows, pictures = {}, {}
    for name, (h, w, side) in test_3_reading.PICTURES.items():
        n = math.ceil(h / side) * math.ceil(w / side)
        windows[f"windows of {name}"] = draw(n, side ** 2, 5)
        pictures[name] = draw(h * w, 5)
    return {"3a_one_picture": {}, "3b_two_pictures": {}, "3c_to_windows": pictures,
            "3d_from_windows": windows}


def dit_inputs() -> dict:
    draw = Draw(4)
    attention = [dict(q=draw(2, 3, n, 4), k=draw(2, 3, n, 4), v=draw(2, 3, n, 4)) for n in (6, 9)]
    for case in attention:
        # A query that has nothing in common with any key.
        case["q"][0, 0, 1] = -case["q"][0, 0, 1].abs()
    ffn = dict(x=draw(2, 12, 8), weights=draw.ffn(8, 12))
    cross = dict(x=draw(2, 6, 12), rung=draw(2, 5, 12), weights=draw.cross(12))
    names = ("attn.q", "attn.k", "attn.v")
    parts = [draw.linear(name, 12, 12, bias=False) for name in names]
    parts += [draw.linear("attn.out", 12, 12), under("cross", draw.cross(12))]
    parts += [under("ffn", draw.ffn(12, 8)), {"scale_shift_table": draw(6, 12, scale=0.5)}]
    weights = {name: tensor for part in parts for name, tensor in part.items()}
    # Three heads of 4 in the linear attention, two of 6 in the cross-attention. The x is so small
    # that the norm's eps shows.
    block = dict(x=0.2 + draw(2, 6, 12, scale=0.1), modulation=draw(2, 6, 12),
                 keys=draw(2, 2, 5, 6), values=draw(2, 2, 5, 6), weights=weights)
    return {
        "4a_attention_n_by_n": attention[0],
        "4b_linear_attention": attention[1],
        # Small enough: the rounding of an angle grows with it.
        "4d_timestep_embedding": {"time": torch.tensor([250.0, 40.0, 3.0])},
        "4e_cross_attention": cross,
        "4f_mix_ffn": ffn,
        "4g_adaln_block": block,
    }


def quiet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A projection whose second layer gives so little that the norm's eps can be told."""
    return {name: 0.01 * w if name.startswith("2.") else w for name, w in weights.items()}


def ladder_inputs() -> dict:
    draw = Draw(5)
    weights = under("caption", draw.projection(10, 10))
    # As wide as the rungs, so that a projection left out goes unnoticed.
    for j in range(3):
        weights |= under(f"blocks.{j}.cross", draw.cross(10))
    # What is read after a picture: more tokens than positions.
    positions = right.mrope_positions([1, 2, 9, 9, 9, 9, 3], 9, [(2, 2)])
    return {
        "5a_tap_layers": {},
        "5b_connector": dict(states=draw(3, 4, 10, scale=2),
                             weights=quiet(draw.projection(10, 10))),
        "5c_append_queries": dict(x=draw(7, 6), positions=positions, queries=draw(3, 6)),
        "5d_rungs": dict(states=draw(6, 9, 10), weights=draw.projection(10, 10)),
        "5e_condition": dict(rungs=draw(3, 2, 4, 10), weights=weights),
    }


def all_inputs() -> dict:
    return (flow_inputs() | sampling_inputs() | reading_inputs() | dit_inputs()
            | ladder_inputs())


# ------------------------------------------------------------------------------------- outputs

def flat(name: str, kind: str, tensors: dict) -> dict[str, Tensor]:
    """Names as `grading.recorded` reads them."""
    found = {}
    for key, value in tensors.items():
        if isinstance(value, dict):
            found |= flat(f"{name}/{kind}", key, value)
        else:
            found[f"{name}/{kind}/{key}"] = torch.as_tensor(value).detach().clone().contiguous()
    return found


def fresh(inputs: dict) -> dict:
    """A copy, which an answer may change."""
    return {name: fresh(value) if isinstance(value, dict) else value.clone()
            for name, value in inputs.items()}


def make() -> dict[str, Tensor]:
    """All that stands in the file."""
    found, tests = {}, recorded_tests()
    inputs = all_inputs()
    for name, test in tests.items():
        found |= flat(name, "in", inputs[name])
        found |= flat(name, "out", test.answer(plugged(), fresh(inputs[name])))
        for mistake, changed in MISTAKES[name].items():
            wrong = test.answer(plugged(**changed), fresh(inputs[name]))
            found |= flat(f"{name}/wrong", mistake, wrong)
    return found


def main() -> None:
    FILE.write_bytes(save(make()))
    print(f"{FILE.relative_to(ROOT)}: {FILE.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
