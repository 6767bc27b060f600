"""Answers to the notebooks' exercises, one way each; try them yourself first. tests/test_a_notebooks.py puts them into the given checks.

Answer i of a notebook goes where it says `answer_i = None`.
"""
import math


# ---- 1_flow

def both_ends(x_t, t, v):
    """x_t = (1 - t) x0 + t eps = x0 + t v, and eps = x0 + v."""
    x0 = x_t - t * v
    return x0, x0 + v


def heun(velocity, x, t, s):
    v = velocity(x, t)
    return x + (s - t) * (v + velocity(x + (s - t) * v, s)) / 2


def shift_for_copies(n):
    """The mean's ratio of noise to data is t' / (1 - t') / sqrt(n). It is t / (1 - t) if the schedule multiplies that by sqrt(n)."""
    return math.sqrt(n)


# ---- 6_weights

def needed_to_draw(name, n_layer):
    """No pictures are read and none encoded; the last state tapped enters the last layer, so that layer and the norm behind it never run."""
    unused = ("model.mllm_backbone.visual.", f"model.mllm_backbone.model.layers.{n_layer - 1}.", "model.mllm_backbone.model.norm.", "vae.encoder.")
    return not name.startswith(unused)


def training_bytes(frozen, trained):
    """bfloat16 is 2 bytes; a trained number is four float32: itself, its gradient, AdamW's two moments."""
    return 2 * frozen + 16 * trained


BROKEN_LAYER = 1                        # states 0 and 1 agree, from state 2 on they differ: states[i] enters layer i


ANSWERS = {
    "1_flow": [both_ends, heun, shift_for_copies],
    "6_weights": [needed_to_draw, training_bytes, BROKEN_LAYER],
}
