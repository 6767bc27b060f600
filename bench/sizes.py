"""Models of random weights: four sizes, made where they are needed, without a download or a disk.

    tiny    for rehearsals: seconds on a CPU
    mid     121M parameters: for comparisons on a CPU
    wide    the released widths, few layers, 1.3e9 parameters: for parity at real shapes
    full    the released sizes, 5.7e9 parameters
"""
import dataclasses
import pathlib

import torch

from dcae import DCAEConfig
from dit import DiTConfig
from mllm import MLLMConfig, Tokenizer
from tbac import TBAC, TBACConfig
from vit import ViTConfig

ROOT = pathlib.Path(__file__).parent.parent
# In the public layout, with a small vocabulary.
QWEN_FILES = ROOT / "tests" / "fixtures" / "tiny" / "qwen"
TOKENIZER = QWEN_FILES / "tokenizer.json"

SIZES = {
    "tiny": TBACConfig(
        mllm=MLLMConfig(vocab_size=2048, n_layer=4, dim=64, n_head=4, n_kv_head=2, head_dim=16,
                        mlp_dim=128, rope_sections=(2, 3, 3),
                        vision=ViTConfig(n_layer=2, dim=64, n_head=4, mlp_dim=96,
                                         full_attention=(1,))),
        dit=DiTConfig(n_layer=2, n_head=4, cross_n_head=4, caption_dim=64),
        dcae=DCAEConfig(widths=(8, 8, 16, 32, 32, 32), encoder_layers=(1, 1, 1, 1, 1, 1),
                        decoder_layers=(1, 1, 1, 1, 1, 1)),
        n_query=8, size=64),
    "mid": TBACConfig(
        mllm=MLLMConfig(vocab_size=8192, n_layer=18, dim=512, n_head=8, n_kv_head=2, head_dim=64,
                        mlp_dim=1408, rope_sections=(8, 12, 12),
                        vision=ViTConfig(n_layer=8, dim=320, n_head=4, mlp_dim=856,
                                         full_attention=(3, 7))),
        dit=DiTConfig(n_layer=10, n_head=14, cross_n_head=4, caption_dim=512),
        dcae=DCAEConfig(widths=(32, 64, 128, 128, 256, 256))),
    "wide": TBACConfig(
        mllm=MLLMConfig(vocab_size=8192, n_layer=6,
                        vision=ViTConfig(n_layer=9, full_attention=(7,))),
        dit=DiTConfig(n_layer=4)),
    "full": TBACConfig(),
}


def size_of(config: TBACConfig) -> str | None:
    """The name of a size, or None for another model."""
    same = [name for name, own in SIZES.items()
            if own == dataclasses.replace(config, dtype=own.dtype)]
    return same[0] if same else None


def empty_model(config: TBACConfig, device="meta", dtype=torch.float32) -> TBAC:
    """A model of these sizes; its weights are not set."""
    with torch.device("meta"):
        model = TBAC(config, Tokenizer(TOKENIZER)).to(dtype)
    return model if device == "meta" else model.to_empty(device=device)


@torch.no_grad()
def set_random(name: str, p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fills a parameter: normal with std 0.02, gains of norms 1, that of the connector as the paper
    has it, so that states keep their scale from layer to layer."""
    if name == "ladder.connector.3.weight":
        return p.fill_(5.5 ** 0.5)
    is_gain = p.dim() == 1 and name.endswith("weight") and "norm" in name
    if is_gain or name == "dit.caption.3.weight":
        return p.fill_(1)
    return p.normal_(std=0.02, generator=generator)


def random_model(config: TBACConfig, device="cpu", dtype=torch.float32, seed=0) -> TBAC:
    """A model of these sizes and random weights, made on the device itself."""
    model = empty_model(config, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        set_random(name, p, generator)
    return model


def random_tensors(config: TBACConfig, dtype=torch.float32, seed=0):
    """Yields (name, tensor) for every parameter of such a model, one at a time."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in empty_model(config).named_parameters():
        yield name, set_random(name, torch.empty(p.shape, dtype=dtype), generator)
