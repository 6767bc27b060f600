"""What you do not write: the frozen parts of the shipped model, and its tensors.

    given = Given(shipped())
    ids, grids = given.tokenize("a red circle")
    x = given.embed(ids)
    states = given.read(x, positions)

Dimension key: S tokens, Q queries, M MLLM width, U units of a picture, P patches (4 a unit),
W windows.
"""
import functools
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from engine.device import set_threads
from mllm import DRAW
from sample import TOY_FOLDER
from tbac import TBAC
from vit import patchify


@functools.cache
def shipped() -> TBAC:
    model = TBAC.load(TOY_FOLDER).eval().requires_grad_(False)
    set_threads(model)
    return model


class Given:
    """config: all sizes (tbac.py:TBACConfig), such as config.n_query and config.dit.head_dim.
    ladder, dit: tensors by name, "queries", "connector.0.weight", ...; "patch_embed.weight", ...
    """

    def __init__(self, model: TBAC):
        self.model = model
        self.config = model.config
        self.ladder = {name: tensor.clone() for name, tensor in model.ladder.state_dict().items()}
        self.dit = {name: tensor.clone() for name, tensor in model.dit.state_dict().items()}
        self.image_token = model.mllm.tokenizer.special["image_pad"]
        vision = model.config.mllm.vision
        # Of a window, in units.
        self.side = vision.window // vision.merge // vision.patch

    def tokenize(self, text: str, picture: Image.Image | None = None) -> tuple[list[int], list]:
        """-> the ids of the whole prompt, up to where the queries begin, and the grids (h, w) of
        its pictures in units: none or one."""
        vision = self.config.mllm.vision
        pictures = [] if picture is None else [patchify(picture, vision)]
        prompt = self.model.mllm.prompt(text, pictures, DRAW, "<|vision_start|>",
                                        self.config.max_prompt)
        return prompt.ids, [(h // vision.merge, w // vision.merge) for _, (h, w) in pictures]

    @torch.no_grad()
    def embed(self, ids: list[int], picture: Image.Image | None = None,
              to_windows: Callable | None = None, from_windows: Callable | None = None) -> Tensor:
        """-> (S, M): a row of the table for each token; where a picture stands, what the ViT makes
        of it, by way of your windows."""
        ids = torch.tensor(ids)
        x = self.model.mllm.embed_tokens(ids)
        if picture is not None:
            x[ids == self.image_token] = self.look(picture, to_windows, from_windows)
        return x

    def look(self, picture: Image.Image, to_windows: Callable, from_windows: Callable) -> Tensor:
        """The ViT, with your windows -> (U, M), a token for each unit."""
        vit = self.model.mllm.vision
        patches, grid = patchify(picture, vit.config)
        n = vit.config.merge ** 2
        h, w = (length // vit.config.merge for length in grid)

        def windowed(t: Tensor) -> tuple[Tensor, Tensor]:
            """(P, ...) -> (W, P of a window, ...), and which of these are there."""
            units = t.unflatten(0, (-1, n)).flatten(1)
            windows, valid = to_windows(units, h, w, self.side)
            return windows.unflatten(2, (n, -1)).flatten(1, 2), valid.repeat_interleave(n, 1)

        x, valid = windowed(vit.patch_embed(patches))
        angle, _ = windowed(vit.angles(grid, patches.device))
        for i, block in enumerate(vit.blocks):
            if i in vit.config.full_attention:
                parts = (t.flatten(0, 1)[None] for t in (x, angle, valid))
                x = block(*parts).view_as(x)
            else:
                x = block(x, angle, valid)
        tokens = vit.merger(x.unflatten(1, (-1, n)))                   # (W, units, M)
        return from_windows(tokens, h, w, self.side)

    @torch.no_grad()
    def read(self, x: Tensor, positions: Tensor) -> list[Tensor]:
        """The frozen decoder: x (S + Q, M), positions (3, S + Q) -> n_mllm + 1 states (S + Q, M).
        states[i] enters layer i; the last one is the normed end."""
        mask = torch.ones(1, len(x), dtype=torch.bool)
        return [state[0] for state in self.model.mllm(x[None], positions[:, None], mask)]

    def decode(self, latents: Tensor) -> Image.Image:
        """(1, C, h, w) -> the picture."""
        return self.model.decode(latents)[0]
