"""TBAC-UniImage, the unified model: an MLLM that reads, a ladder, a DiT that paints, an autoencoder for the pixels.

+- Conventions, each with a test -------------------------------------------------------------------------------------+
| time      t = 0 is data, t = 1 is noise; training draws t uniformly in (0, 1] (--shift bends it); fed is 1000 t     |
| path      x_t = (1 - t) x0 + t eps                                                                                  |
| target    v = eps - x0, so x0 = x_t - t v and one Euler step from t to s is x_s = x_t + (s - t) v                   |
| latents   x0 = encode(pixels) * scaling_factor, pixels in [-1, 1]                                                   |
| guidance  null + g (cond - null), on all channels; with images (gi > 1) null + gi (image - null) + g (both - image) |
+---------------------------------------------------------------------------------------------------------------------+

The route of a prompt: prompt -> ids, patches (MLLM.rows) -> packs (mllm.pack) -> the queries' hidden states (TBAC.hear) -> rungs (ladder)
-> keys and values (dit.condition) -> velocity (dit) -> latents (sample.denoise) -> picture (dcae.decode).

Dimension key: B batch, L rungs, Q queries, S sequence, M MLLM width, C latent channels, h x w latent size, H x W picture size.
"""
import json
import os
import pathlib
import shutil
import tempfile
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dcae import DCAE, DCAEConfig
from dit import DiT, DiTConfig
from ladder import Ladder
from mllm import ASK, DRAW, MLLM, KVCache, MLLMConfig, Tokenizer, pack, to_read
from vit import ViTConfig

# PyTorch asks MKL for matrix products where it has it. Without MKL they are oneDNN's already, or another library's.
ONEDNN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """nn.Linear. On a CPU many rows in float32 go through a 1x1 convolution, the same sums in another order: there oneDNN does them, on AMD's
    processors twice as fast as the matrix product of MKL (bench/README.md)."""

    def forward(self, x):
        rows = x.numel() // x.shape[-1]
        if not ONEDNN or rows < 64 or x.dtype != torch.float32 or x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        y = F.conv2d(x.reshape(1, rows, 1, -1).permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def fast(module):
    """The module, every nn.Linear in it now a Linear: the same weights under the same names. So the files of the parts need not know of this."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
    return module


@dataclass(frozen=True)
class TBACConfig:
    """The defaults are the released sizes (Qwen2.5-VL-3B, SANA-1.6B 512 px, DC-AE f32c32): 5.68e9 parameters."""
    mllm: MLLMConfig = field(default_factory=MLLMConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    dcae: DCAEConfig = field(default_factory=DCAEConfig)
    n_query: int = 64
    wiring: str = "top"                 # which MLLM state feeds which DiT block: ladder.rungs
    size: int = 512                     # pixels, side of a picture drawn without another wish
    image_guidance: float = 1.5         # how much an edit holds on to its picture, without another wish
    max_prompt: int = 256               # tokens of the prompt that are read when drawing
    dtype: str = "float32"              # to compute in, unless `load` is told otherwise

    def ladder(self):
        """A ladder of these sizes, its weights not yet set."""
        return fast(Ladder(self.n_query, self.mllm.dim, self.dit.caption_dim, self.mllm.n_layer, self.dit.n_layer, self.wiring))

    @classmethod
    def from_dict(cls, d):
        """The inverse of dataclasses.asdict, from JSON (where tuples have become lists)."""
        def build(kind, d, **nested):
            return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in d.items()} | nested)
        if not isinstance(d, dict) or not {"mllm", "dit", "dcae"} <= d.keys():
            raise ValueError("config.json lacks mllm, dit or dcae: not a folder of this project (public weights: weights_convert.py)")
        try:
            mllm = build(MLLMConfig, d["mllm"], vision=build(ViTConfig, d["mllm"]["vision"]))
            config = build(cls, d, mllm=mllm, dit=build(DiTConfig, d["dit"]), dcae=build(DCAEConfig, d["dcae"]))
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"config.json: {type(e).__name__}: {e}") from None
        if config.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"config.json: dtype {config.dtype!r}, expected float32, float16 or bfloat16")
        return config


class TBAC(nn.Module):
    """Frozen: mllm, dcae. Trained: ladder (queries and connector) and dit; `trainable()` lists exactly those parameters."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        c = self.config = config
        if c.dit.channels != c.dcae.latent_channels:
            raise ValueError(f"the DiT paints {c.dit.channels} channels, the autoencoder has {c.dcae.latent_channels}")
        self.mllm = MLLM(c.mllm, tokenizer).requires_grad_(False)
        self.ladder = c.ladder()
        self.dit = DiT(c.dit)
        self.dcae = DCAE(c.dcae).requires_grad_(False)
        fast(self)

    def trainable(self):
        return [*self.ladder.parameters(), *self.dit.parameters()]

    # ---- drawing

    def encode(self, prompts, images=None, room=512):
        """prompts: list of str; images: None, or per prompt a list (maybe empty) of PIL images -> rungs (L, B, Q, caption_dim).

        Equal rows are one row. Rows with the same pictures are packed into sequences of about `room` tokens, or 1/2, 1/4, 1/8 of that: whichever
        leaves the fewest tokens to read, padding included. Layers above the last tap do not run. Prompts beyond `max_prompt` tokens are cut with
        a warning. ValueError for no prompt, or for lists that do not fit.
        """
        every = self.mllm.rows(prompts, images, DRAW, then="<|vision_start|>", limit=self.config.max_prompt)    # queries: the answer's picture
        distinct, n = {row.key(): row for row in every}.values(), self.config.n_query
        packs = min((pack(distinct, n, room // part) for part in (1, 2, 4, 8)), key=lambda packs: to_read(packs, n))
        where = {row.key(): b for b, row in enumerate(sum(packs, []))}                              # of each different row its place in the packs
        states = self.hear(packs)                                                                   # of each depth (different rows, Q, M)
        return self.ladder(states)[:, [where[row.key()] for row in every]]                          # (L, B, Q, caption_dim)

    def hear(self, packs):
        """The queries' hidden states at every depth after each row of each pack, a list of (rows, Q, M). Attention is causal and the queries
        come last, so what is read before does not depend on them: where gradients are wanted it is read first, without a graph."""
        mllm, queries, cache = self.mllm, self.ladder.queries.to(self.mllm.embed.weight.dtype), KVCache()
        batch, mask = mllm.pad_packs(packs, more=len(queries))
        ends = [len(queries) * len(rows) for rows in packs]                                         # so many tokens are queries
        x = torch.stack([torch.cat([line[:-n], queries.repeat(n // len(queries), 1)]) for line, n in zip(mllm.read(batch), ends)])

        def run(part, seen):
            return mllm(x[:, part], batch.positions[..., part], batch.real[:, part], cache, max(self.ladder.taps), mask[..., part, seen])
        before = x.shape[1] - max(ends) if torch.is_grad_enabled() else 0
        if before:
            with torch.no_grad():
                run(slice(before), slice(before))
        cache.full = True
        states = run(slice(before, None), slice(None))                                              # of each depth (packs, S - before, M)
        return [torch.cat([line[-n:].unflatten(0, (-1, len(queries))) for line, n in zip(state, ends)]) for state in states]

    def velocity(self, x_t, t, rungs):
        """x_t (B, C, h, w), t (B,) in [0, 1], rungs from `encode` -> velocity (B, C, h, w), pointing from data to noise."""
        return self.dit(x_t.to(self.dit.proj_out.weight.dtype), 1000 * t, self.dit.condition(rungs))

    def loss(self, pixels, prompts, images=None, t=None, eps=None, generator=None):
        """Flow matching: the mean squared error of the velocity. pixels (B, 3, H, W) in [-1, 1]; t (B,) and eps (B, C, h, w)
        are drawn where not given. -> scalar, with a graph to queries, connector and DiT."""
        with torch.no_grad():
            x0 = self.dcae.encode(pixels)
        if t is None:
            t = 1 - torch.rand(len(x0), device=x0.device, generator=generator)                      # uniform in (0, 1]
        if eps is None:
            eps = torch.randn(x0.shape, device=x0.device, generator=generator)
        return self.flow_losses(x0, self.encode(prompts, images), t, eps).mean()

    def flow_losses(self, x0, rungs, t, eps):
        """`loss` from latents x0 (B, C, h, w) and rungs on, for each row by itself. -> (B,)"""
        x0, s = x0.float(), t.view(-1, 1, 1, 1)
        v = self.velocity((1 - s) * x0 + s * eps, t, rungs)
        return (v.float() - (eps - x0)).pow(2).flatten(1).mean(1)

    # ---- understanding

    def ask(self, question, images=None, max_new_tokens=64):
        """A question and a list of PIL images (or None) -> the answer, greedy."""
        return self.ask_all([question], [images or []], max_new_tokens)[0]

    def ask_all(self, questions, images=None, max_new_tokens=64):
        """`ask` for many: a list of questions, None or a list of lists of images -> a list of answers."""
        batch = self.mllm.prepare(questions, images, ASK)
        return [self.mllm.tokenizer.decode(ids).strip() for ids in self.mllm.generate(batch, max_new_tokens)]

    # ---- files

    def save(self, folder, dtype=None, tensors=None):
        """config.json, tokenizer.json and model*.safetensors: the model's own tensors or these (name, tensor) pairs, in `dtype` if given.
        A file that is there already is replaced as a whole, or left as it is if anything goes wrong."""
        with replacing(folder) as new:
            (new / "config.json").write_text(json.dumps(asdict(self.config), indent=1))
            shutil.copyfile(self.mllm.tokenizer.file, new / "tokenizer.json")
            write_shards(new, ((k, t.detach().to(dtype=dtype)) for k, t in tensors or self.state_dict().items()))

    @classmethod
    def load(cls, folder, device="cpu", dtype=None):
        """The model in a folder written by `save` or weights_convert.py. dtype: torch.dtype, default the config's; or one for
        some of the parts, {"dit": torch.float32}.

        Parameters are made without memory and filled one file at a time, straight to the device. Raises ValueError that names
        the tensor or file for anything missing, left over, mis-shaped, non-finite or damaged.
        """
        folder = pathlib.Path(folder)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as e:             # no such device, or a PyTorch without it
            raise ValueError(f"device {device}: {str(e).splitlines()[0]}") from None
        config = TBACConfig.from_dict(read_json(folder / "config.json"))
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json")
        with torch.device("meta"):
            model = cls(config, Tokenizer(folder / "tokenizer.json"))
        own, missing = getattr(torch, config.dtype), model.state_dict()
        kinds = dtype if isinstance(dtype, dict) else dict.fromkeys(("mllm", "ladder", "dit", "dcae"), dtype or own)
        for file in weight_files(folder):
            found = {}
            for name, t in read_tensors(file, device):
                expect(missing, name, t, file, name)
                found[name] = t.to(kinds.get(name.split(".")[0], own), copy=t.device.type == "cpu")  # not a view of the file
            model.load_state_dict(found, strict=False, assign=True)
        if missing:
            raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first ones {list(missing)[:3]}")
        model.dcae.to(memory_format=torch.channels_last)                                             # faster convolutions: DCAE.encode
        return model


# --------------------------------------------------------------------------------------- files: safetensors only, never a pickle

def read_json(file):
    try:
        return json.loads(pathlib.Path(file).read_text())
    except OSError:
        raise ValueError(f"{file} is missing: not a model folder") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{file} is not JSON: {e}") from None


def weight_files(folder):
    """Without the hub's second copies in half precision, NAME.fp16.safetensors."""
    if files := sorted(f for f in pathlib.Path(folder).glob("*.safetensors") if ".fp16" not in f.suffixes):
        return files
    raise ValueError(f"{folder} has no *.safetensors (pickled weights are not read)")


def read_tensors(file, device="cpu"):
    """Yields (name, tensor) of one file, one at a time. ValueError names a file that is cut short or damaged."""
    try:
        with safe_open(file, "pt") as f:
            names = list(f.keys())
        for name in names:                                      # a mapping of the file for each, which goes when the tensor has been converted
            with safe_open(file, "pt", device=str(device)) as f:
                t = f.get_tensor(name)
            yield name, t
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file} cannot be read as safetensors, is it whole? {e}") from None


def expect(missing, name, t, file, public):
    """Takes a tensor's name out of {name: tensor} that are still missing. ValueError, with the name in the file, if it does not belong there."""
    if name not in missing:
        raise ValueError(f"{file}: tensor {public} is not part of this model, or stands there twice")
    if t.shape != missing[name].shape:
        raise ValueError(f"{file}: tensor {public} has shape {tuple(t.shape)}, expected {tuple(missing[name].shape)}")
    if not t.isfinite().all():
        raise ValueError(f"{file}: tensor {public} has values that are not finite")
    del missing[name]


def sync(folder):
    """Waits until a folder and its files are on the disk itself. (Windows cannot sync what is open for reading only.)"""
    for path in () if os.name == "nt" else [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle), os.close(handle)


class replacing:
    """A scratch folder whose files move into `folder` only when the block ends well, so that a half-written one is never seen.
    Any other model*.safetensors*, of an older, differently sharded save, go away then. ValueError if `folder` is a file."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} exists and is not a folder")

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".new-*"):                 # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.new = pathlib.Path(tempfile.mkdtemp(dir=self.folder, prefix=".new-"))
        return self.new

    def __exit__(self, kind, *_):
        if kind is None:
            sync(self.new)
            names = {f.name for f in self.new.iterdir()}
            for file in self.new.iterdir():
                os.replace(file, self.folder / file.name)
            for old in self.folder.glob("model*.safetensors*"):
                if old.name not in names:
                    old.unlink()
        shutil.rmtree(self.new)


def write_shards(folder, tensors, limit=1 << 30):
    """Writes (name, tensor) pairs to model.safetensors, or to numbered shards of about `limit` bytes, holding one at a time.
    -> {tensor name: file name}."""
    folder, shards, shard, size = pathlib.Path(folder), [], {}, 0

    def flush():
        save_file(shard, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
    for name, t in tensors:
        if shard and size + t.nbytes > limit:
            flush()
            shard, size = {}, 0
        shard[name], size = t.contiguous(), size + t.nbytes
    flush()
    n, where = len(shards), {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        os.replace(folder / f"part-{i}", folder / file)
        (folder / file).chmod(0o644)                            # save_file lets nobody else read it
        where |= dict.fromkeys(names, file)
    return where
