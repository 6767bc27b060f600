r"""Your model draws: the adapters' `draw`, from a sentence to a picture.

    python -m notebooks.assignment.draw "a red circle left of a blue square"
    python -m notebooks.assignment.draw "make the circle green" --image out.png --seed 1 \
        --out out-green.png
"""
import argparse
import pathlib

import torch

from engine import command
from engine.outputs import check_outputs, save_png
from engine.pictures import open_image
from notebooks.assignment.given import Given, shipped
from notebooks.assignment.hand_in import ADAPTERS, load_adapters
from sample import latent_shape


def options(argv=None) -> argparse.Namespace:
    p = command.Parser(description=__doc__)
    p.add_argument("prompt", type=command.text)
    p.add_argument("--image", type=command.path, help="a picture to edit")
    p.add_argument("--out", type=command.path, default="out.png", help="(default: out.png)")
    p.add_argument("--seed", type=command.SEED, default=0, help="of the noise")
    p.add_argument("--steps", type=command.count(1, 1000), default=20, help="(default: 20)")
    p.add_argument("--guidance", type=command.FACTOR, default=6.5, help="(default: 6.5)")
    p.add_argument("--image-guidance", type=command.FACTOR, default=6.5, help="(default: 6.5)")
    p.add_argument("--adapters", type=command.path, default=ADAPTERS, help="(default: yours)")
    return p.parse_args(argv)


def check(args) -> None:
    """As sample.py does before it draws: one picture, and no page."""
    images = [args.image] if args.image else []
    check_outputs(argparse.Namespace(out=args.out, image=images, n=1, explain=False, ask=None))


def main() -> None:
    args = options()
    with command.one_line_errors():
        check(args)
        picture = args.image and open_image(args.image)
        adapters = load_adapters(pathlib.Path(args.adapters))
        given = Given(shipped())
        generator = torch.Generator().manual_seed(args.seed)
        eps = torch.randn(1, *latent_shape(given.config), generator=generator)
        try:
            latents = adapters.draw(given, args.prompt, picture, eps, args.steps, 3.0,
                                    args.guidance, args.image_guidance)
        except NotImplementedError:
            raise ValueError("not all of your model is written: `pytest notebooks/assignment` "
                             "says what comes next") from None
        save_png(given.decode(latents), pathlib.Path(args.out), {})
        print("wrote", args.out)


if __name__ == "__main__":
    main()
