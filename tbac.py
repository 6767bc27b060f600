"""TBAC-UniImage, the unified model: an MLLM that reads, a ladder, a DiT that paints, an autoencoder
for the pixels.

+- Conventions, each with a test -----------------------------------------------------------------+
| time      t = 0 is data, t = 1 is noise; training draws t uniformly in (0, 1] (train.py --shift |
|           bends it); the network is fed 1000 t (a sampler drops its fraction)                   |
| path      x_t = (1 - t) x0 + t eps                                                              |
| target    v = eps - x0, so x0 = x_t - t v, and an Euler step from t to s: x_s = x_t + (s - t) v |
| latents   x0 = dcae.encode(pixels), which multiplies by scaling_factor; pixels in [-1, 1]       |
| guidance  null + g (cond - null), on all channels;                                              |
|           with images (gi > 1): null + gi (image - null) + g (both - image)                     |
+-------------------------------------------------------------------------------------------------+

The route of a prompt: words and pictures -> ids, patches, positions (MLLM.tokenize) -> one sequence
that the queries close (TBAC.query_states) -> the queries' states at every depth (MLLM.forward)
-> rungs (Ladder.forward) -> keys and values of each block (DiT.project_kv) -> velocity
(DiT.forward) -> latents (sample.denoise) -> picture (DCAE.decode).

Dimension key: B batch, L rungs, Q queries, S tokens before them, M MLLM width, C latent channels,
h x w latent size, H x W picture size.
"""
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from PIL import Image
from torch import Tensor, nn

from dcae import DCAE, DCAEConfig
from dit import DiT, DiTConfig
from engine.checks import FORMAT, check_config, check_rules
from engine.device import check as check_device
from engine.files import read_json, replacing, write_shards
from engine.int8 import in_dtype
from engine.loading import load_weights, prepare, read_tokenizer
from engine.low_memory import take_turns
from engine.pictures import to_images
from ladder import Ladder
from mllm import ASK, DRAW, MLLM, MLLMConfig, Tokenizer
from vit import ViTConfig


@dataclass(frozen=True)
class TBACConfig:
    """The defaults are the released sizes (Qwen2.5-VL-3B, SANA-1.6B 512 px, DC-AE f32c32): 5.68e9
    parameters."""
    mllm: MLLMConfig = field(default_factory=MLLMConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    dcae: DCAEConfig = field(default_factory=DCAEConfig)
    n_query: int = 64
    wiring: str = "ladder"              # which MLLM state feeds which DiT block: ladder.WIRINGS
    connector: str = "shared"           # by all rungs: ladder.CONNECTORS
    size: int = 512                     # default side of a picture, in pixels
    guidance: float = 4.5               # default: how closely a picture follows its text
    image_guidance: float = 1.5         # default: how closely an edit keeps to its picture
    max_prompt: int = 256               # tokens of the prompt that are read when drawing
    dtype: str = "float32"              # default: to compute in

    def build_ladder(self) -> Ladder:
        """A ladder of these sizes, its weights not yet set."""
        return Ladder(self.n_query, self.mllm.dim, self.dit.caption_dim, self.mllm.n_layer,
                      self.dit.n_layer, self.wiring, self.connector)

    def to_dict(self) -> dict:
        """The content of config.json."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_dict(cls, d: dict, file="config.json") -> "TBACConfig":
        """The inverse. ValueError for whatever is missing, unknown, or makes no sense:
        engine/checks.py lists what each key may be."""
        d = check_config(d, file)
        vision = ViTConfig(**d["mllm"].pop("vision"))
        parts = dict(
            mllm=MLLMConfig(**d.pop("mllm"), vision=vision),
            dit=DiTConfig(**d.pop("dit")),
            dcae=DCAEConfig(**d.pop("dcae")),
        )
        config = cls(**d, **parts)
        check_rules(config, file)
        return config


def flow_matching(x0: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Data x0 (B, C, h, w), times t (B,), noise eps -> the point x_t between them, and the velocity
    v there, from data to noise."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x0 + t * eps, eps - x0


class TBAC(nn.Module):
    """Frozen: mllm, dcae. Trained in the paper's three stages: ladder (queries and connector) and
    dit; `trainable()` lists exactly those parameters."""

    def __init__(self, config: TBACConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        check_rules(config, "config")
        self.config = c = config
        self.mllm = MLLM(c.mllm, tokenizer).requires_grad_(False)
        self.ladder = c.build_ladder()
        self.dit = DiT(c.dit)
        self.dcae = DCAE(c.dcae).requires_grad_(False)

    def trainable(self) -> list[nn.Parameter]:
        return [*self.ladder.parameters(), *self.dit.parameters()]

    # ---- drawing

    def encode(self, prompts: list[str], images: list[list[Image.Image]] | None = None) -> Tensor:
        """Prompts and, for each, a list of PIL images (maybe empty)
        -> rungs (L, B, Q, caption_dim).

        Only the layers below the last tapped state run. Prompts beyond `max_prompt` tokens are cut
        with a warning. ValueError for no prompt, or for lists that do not fit.
        """
        states = self.query_states(prompts, images, max(self.ladder.taps))
        return self.ladder(states)

    def query_states(self, prompts: list[str], images: list[list[Image.Image]] | None = None,
                     n_layer: int | None = None) -> list[Tensor]:
        """-> the queries' hidden states at every depth up to `n_layer`, each (B, Q, M).

        The prompt ends where the assistant begins a picture, with <|vision_start|>; the queries
        stand where that picture's tokens would. (engine/fast.py replaces this method by one that
        gives the same with less work.)
        """
        B, Q = len(prompts), len(self.ladder.queries)
        batch = self.mllm.tokenize(prompts, images, DRAW, "<|vision_start|>",
                                   self.config.max_prompt)
        x = self.mllm.embed(batch)                                         # (B, S, M)
        queries = self.ladder.queries.to(x.dtype).expand(B, -1, -1)        # (B, Q, M)
        x = torch.cat([x, queries], 1)                                     # (B, S + Q, M)
        # The queries' positions go on counting, as for text; none of them is padding.
        after = batch.positions[:, :, -1:] + torch.arange(1, Q + 1, device=x.device)
        positions = torch.cat([batch.positions, after], 2)                 # (3, B, S + Q)
        mask = torch.cat([batch.attention_mask, batch.attention_mask.new_ones(B, Q)], 1)
        states = self.mllm(x, positions, mask, n_layer=n_layer)            # (B, S + Q, M) each
        return [state[:, -Q:] for state in states]

    def velocity(self, x_t: Tensor, t: Tensor, rungs: Tensor,
                 keys_values: list | None = None) -> Tensor:
        """x_t (B, C, h, w), t (B,) in [0, 1], rungs from `encode` -> velocity (B, C, h, w), from
        data to noise. keys_values: dit.project_kv(rungs), which all steps of a picture share; the
        rungs themselves are then not read."""
        if keys_values is None:
            keys_values = self.dit.project_kv(rungs)
        timestep = (1000 * t).float().to(x_t.device)
        return self.dit(x_t.to(self.dit.proj_out.weight.dtype), timestep, keys_values)

    def loss(self, x0: Tensor, prompts: list[str], images: list[list[Image.Image]] | None = None,
             t: Tensor | None = None, eps: Tensor | None = None,
             generator: torch.Generator | None = None) -> Tensor:
        """Flow matching for latents x0 (B, C, h, w) = dcae.encode(pixels): each row's mean squared
        error of the velocity, (B,), with a graph to queries, connector and DiT.

        t (B,) and eps (B, C, h, w) are drawn where not given (train.py gives them, drawn row by
        row).
        """
        x0 = x0.float()
        if t is None:
            t = 1 - torch.rand(len(x0), generator=generator).to(x0.device)       # in (0, 1]
        if eps is None:
            eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        rungs = self.encode(prompts, images)
        x_t, v = flow_matching(x0, t, eps)
        error = self.velocity(x_t, t, rungs).float() - v
        return error.pow(2).flatten(1).mean(1)                             # (B,)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) -> PIL pictures. (Not the inverse of `encode`, which reads prompts.)
        """
        return to_images(self.dcae.decode(latents.to(self.dcae.decoder.conv_in.weight.dtype)))

    # ---- understanding

    def ask(self, question: str, images: list[Image.Image] | None = None,
            max_new_tokens: int = 64) -> str:
        """A question and a list of PIL images (or None) -> the answer, greedy."""
        return self.ask_all([question], [images or []], max_new_tokens)[0]

    def stream_answer(self, question: str, images: list[Image.Image] | None = None,
                      max_new_tokens: int = 64) -> Iterator[str]:
        """`ask`, piece by piece, each as soon as it is known."""
        batch = self.mllm.tokenize([question], [images or []], ASK)
        ids = []
        text = said = ""
        for token in self.mllm.next_tokens(batch, max_new_tokens):
            ids.append(token.item())
            text = self.mllm.tokenizer.decode(ids).strip()
            # A character may be several tokens: half of one waits for the rest.
            if not text.endswith("\ufffd"):
                yield text[len(said):]
                said = text
        yield text[len(said):]

    def ask_all(self, questions: list[str], images: list[list[Image.Image]] | None = None,
                max_new_tokens: int = 64) -> list[str]:
        """`ask` for many: questions and, for each, a list of images -> answers."""
        batch = self.mllm.tokenize(questions, images, ASK)
        answers = self.mllm.generate(batch, max_new_tokens)
        return [self.mllm.tokenizer.decode(ids).strip() for ids in answers]

    # ---- files

    def save(self, folder: str | pathlib.Path, dtype: torch.dtype | None = None,
             tensors: Iterable[tuple[str, Tensor]] | None = None) -> None:
        """Writes config.json, tokenizer.json and model*.safetensors: the model's own tensors or
        these (name, tensor) pairs, in `dtype` if given. What is there already is replaced as a
        whole, or left as it is if anything goes wrong."""
        tensors = tensors or self.state_dict().items()
        with replacing(folder) as new:
            (new / "config.json").write_text(json.dumps(self.config.to_dict(), indent=1))
            shutil.copyfile(self.mllm.tokenizer.file, new / "tokenizer.json")
            write_shards(new, ((name, in_dtype(t.detach(), dtype)) for name, t in tensors))

    @classmethod
    def load(cls, folder: str | pathlib.Path, device: str = "cpu",
             dtype: torch.dtype | dict | None = None, *, int8: bool = False,
             low_memory: bool = False) -> "TBAC":
        """The model in a folder written by `save` or weights_convert.py. dtype: default the
        config's (half precision is bfloat16 or float16, as the GPU has it); or a dict for some of
        the parts, by regular expressions, {"dit": torch.float32}. int8: most weights in 8 bits
        (engine/int8.py); low_memory: parts are in memory only while they work
        (engine/low_memory.py).

        Parameters are made without memory and filled one by one, straight on the device. ValueError
        names the tensor or file for anything missing, left over, mis-shaped, non-finite or damaged.
        """
        folder = pathlib.Path(folder)
        check_device(device)
        file = folder / "config.json"
        config = TBACConfig.from_dict(read_json(file), file)
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        with torch.device("meta"):
            model = cls(config, tokenizer)
        # Names, shapes and dtypes; no numbers are read yet.
        files = prepare(model, folder, dtype, device, int8)
        fill = take_turns if low_memory else load_weights
        fill(model, files, device)
        return model
