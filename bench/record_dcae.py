"""Records what the public library's autoencoder gives on maps of few positions and on pictures at
the limits, for tests/test_1_dcae.py. (At 32 positions and below the library computes its linear
attention in the quadratic form.)

    pip install torch diffusers==0.34.0
    python -m bench.record_dcae tests/fixtures/tiny/sana tests/fixtures/tiny/dcae.safetensors
"""
import pathlib

import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file

from bench.odd_maps import SIZES, odd_pictures
from engine.command import Parser


def error(found, expected) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


@torch.no_grad()
def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("sana", type=pathlib.Path)
    p.add_argument("out", type=pathlib.Path)
    args = p.parse_args()
    file = args.sana / "vae" / "diffusion_pytorch_model.safetensors"
    vae = AutoencoderDC.from_config(AutoencoderDC.load_config(args.sana, subfolder="vae"))
    vae.load_state_dict(load_file(file), strict=True)
    low = AutoencoderDC.from_config(vae.config)
    low.load_state_dict(load_file(file), strict=True)
    low.to(torch.bfloat16)
    found = {}
    for size in SIZES:
        for name, x in odd_pictures(size).items():
            latents = vae.encode(x).latent
            pixels = vae.decode(latents).sample
            rough = low.encode(x.bfloat16()).latent
            again = low.decode(latents.bfloat16()).sample
            key = f"{size[0]}x{size[1]}.{name}"
            rounding = torch.tensor([error(rough, latents), error(again, pixels)])
            found |= {f"{key}.latents": latents, f"{key}.pixels": pixels,
                      f"{key}.bfloat16": rounding}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, args.out)
    print(f"{len(found)} tensors, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
