"""Qwen2.5-VL from scratch: the multimodal LLM that reads (arXiv 2502.13923; the left column of the
paper's Fig. 2).

Text and pictures -> token ids, patches, positions -> ViT -> decoder -> one hidden state per depth.
The ladder taps those states; the language head answers questions. Frozen in the paper's three
stages.

Dimension key: B batch, S sequence, T all positions read so far, M model width, H heads, K head dim,
G key heads, U units of all pictures (vit.py).
Left out: video, sliding windows in the text part (TBAC-UniImage uses neither).
"""
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vit import RMSNorm, SwiGLU, ViT, ViTConfig, apply_rope, attention, frequencies, patchify

# The released code's system prompt. To draw, the MLLM is asked to describe: what the DiT needs is
# what a description would say.
DRAW = ("You will be given an image or its caption. "
        "Please describe the content of the image in detail in your own words.")
# That of Qwen's own chat template.
ASK = "You are a helpful assistant."


@dataclass(frozen=True)
class MLLMConfig:
    """The defaults are those of Qwen2.5-VL-3B."""
    vocab_size: int = 151936
    n_layer: int = 36
    dim: int = 2048
    n_head: int = 16
    n_kv_head: int = 2
    head_dim: int = 128
    mlp_dim: int = 11008
    rope_theta: float = 1e6
    rope_sections: tuple = (16, 24, 24)  # channel pairs that turn with time, height, width
    vision: ViTConfig = field(default_factory=ViTConfig)


# ---------------------------------------------------------------------------------------- text

SPECIAL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad")


class Tokenizer:
    """A `tokenizer.json` (byte-level BPE) and the special tokens that the chat format needs."""

    def __init__(self, file: str):
        self.file = str(file)
        self.bpe = tokenizers.Tokenizer.from_buffer(pathlib.Path(file).read_bytes())
        # The file may ask for both, for other programs: here every text is read to its end.
        self.bpe.no_truncation()
        self.bpe.no_padding()
        self.special = {name: self.bpe.token_to_id(f"<|{name}|>") for name in SPECIAL}
        # Either of these tokens ends an answer.
        self.ends = [self.special["im_end"], self.special["endoftext"]]

    @property
    def n_id(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.bpe.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        try:
            return self.bpe.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(f"not a text in UTF-8: {text!r}") from None

    def decode(self, ids: list[int], keep_special: bool = False) -> str:
        return self.bpe.decode(ids, skip_special_tokens=not keep_special)

    def truncate(self, text: str, max_len: int) -> str:
        """The text's first `max_len` tokens, with a warning if that is not all. The released code
        truncates before it applies the chat template, so the template's end stays whole."""
        ids = self.encode(text)
        if len(ids) <= max_len:
            return text
        warnings.warn(f"prompt cut from {len(ids)} to {max_len} tokens", stacklevel=2)
        # The cut may leave half a character at the end.
        return self.decode(ids[:max_len], keep_special=True).rstrip("\ufffd")


def chat(text: str, image_units: Sequence[int] = (), system: str = ASK) -> str:
    """One user turn in Qwen's chat format, up to where the assistant begins.
    image_units: how many units (tokens) each picture has."""
    pictures = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in image_units)
    return (f"<|im_start|>system\n{system}<|im_end|>\n"
            f"<|im_start|>user\n{pictures}{text}<|im_end|>\n"
            f"<|im_start|>assistant\n")


def mrope_positions(ids: list[int], image_pad: int, grids: list[tuple[int, int]]) -> Tensor:
    """Token ids of one row, grids (h, w) of its pictures in units -> (3, S) positions in time,
    height and width.

    Text counts all three up together. A picture stands still in time and counts rows and columns;
    what follows it goes on from the largest position so far + 1 (Qwen2-VL report, section 2.1).
    """
    parts = []
    done = 0            # tokens that have their positions
    position = 0        # of the next one
    for h, w in grids:
        start = ids.index(image_pad, done)
        parts.append(torch.arange(position, position + start - done).expand(3, -1))
        position += start - done
        rows = torch.arange(h).repeat_interleave(w)
        columns = torch.arange(w).repeat(h)
        parts.append(torch.stack([torch.zeros_like(rows), rows, columns]) + position)
        position += max(h, w)
        done = start + h * w
    parts.append(torch.arange(position, position + len(ids) - done).expand(3, -1))
    return torch.cat(parts, 1)


@dataclass
class Prompt:
    """One prompt, tokenized: ids (S), positions (3, S), pictures as patchify gives them."""
    ids: list[int]
    positions: Tensor
    pictures: list[tuple[Tensor, tuple[int, int]]]


@dataclass
class Batch:
    """Prompts padded to one length: ids (B, S), attention_mask (B, S) (False for padding),
    positions (3, B, S), the pictures of all rows in order as [(patches, grid)]."""
    ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    pictures: list[tuple[Tensor, tuple[int, int]]]


# ------------------------------------------------------------------------------------- decoder

def causal_mask(attention_mask: Tensor, n: int) -> Tensor:
    """attention_mask (B, T) -> (B, 1, n, T): each of the last n positions attends to all real ones
    up to itself. Padding attends to itself, so that its softmax is not empty (NaN)."""
    T = attention_mask.shape[1]
    q = torch.arange(T - n, T, device=attention_mask.device)[:, None]  # positions that attend
    k = torch.arange(T, device=attention_mask.device)                  # that are attended to
    return ((k <= q) & attention_mask[:, None, None]) | (k == q)


class KVCache:
    """Keys and values (B, G, T, K) of all that was read so far, for each layer."""

    def __init__(self):
        self.layers = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of new positions -> those of all."""
        if layer in self.layers:
            past_k, past_v = self.layers[layer]
            k = torch.cat([past_k, k], 2)
            v = torch.cat([past_v, v], 2)
        self.layers[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Grouped-query attention: n_head / n_kv_head query heads share one key and value head."""

    def __init__(self, c: MLLMConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q = nn.Linear(c.dim, c.n_head * c.head_dim)
        self.k = nn.Linear(c.dim, c.n_kv_head * c.head_dim)
        self.v = nn.Linear(c.dim, c.n_kv_head * c.head_dim)
        self.out = nn.Linear(c.n_head * c.head_dim, c.dim, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(B, S, H * K) -> (B, H, S, K)"""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, angle: Tensor, mask: Tensor, cache: KVCache | None,
                layer: int) -> Tensor:
        """x (B, S, M), angle (B, 1, S, K/2), mask (B, 1, S, T), False where s must not see t;
        layer: the cache's entry -> (B, S, M)"""
        q = apply_rope(self.heads(self.q(x)), angle)         # (B, H, S, K)
        k = apply_rope(self.heads(self.k(x)), angle)         # (B, G, S, K)
        v = self.heads(self.v(x))                            # (B, G, S, K)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                 # (B, G, T, K)
        y = attention(q, k, v, mask)                         # (B, H, S, K)
        return self.out(y.transpose(1, 2).flatten(2))        # (B, S, M)


class DecoderLayer(nn.Module):
    def __init__(self, c: MLLMConfig):
        super().__init__()
        self.norm1 = RMSNorm(c.dim)
        self.attn = Attention(c)
        self.norm2 = RMSNorm(c.dim)
        self.mlp = SwiGLU(c.dim, c.mlp_dim, bias=False)

    def forward(self, x: Tensor, angle: Tensor, mask: Tensor, cache: KVCache | None,
                layer: int) -> Tensor:
        x = x + self.attn(self.norm1(x), angle, mask, cache, layer)
        return x + self.mlp(self.norm2(x))


class MLLM(nn.Module):
    def __init__(self, config: MLLMConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        if tokenizer and tokenizer.n_id > config.vocab_size:
            raise ValueError(f"{tokenizer.file} has ids up to {tokenizer.n_id - 1}, the embedding "
                             f"table has {config.vocab_size} rows (vocab_size)")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.vision = ViT(config.vision, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Starting values for training from nothing: normal, standard deviation 1/sqrt(inputs);
        what writes to the residual stream is smaller the deeper the stack. (The usual 0.02 is
        1/sqrt(2048). At the toy's width of 128 it is four times too small, and circles and squares
        are never told apart.)"""
        for name, p in self.named_parameters():
            in_vision = name.startswith("vision.")
            depth = self.config.vision.n_layer if in_vision else self.config.n_layer
            if p.dim() == 1:
                nn.init.constant_(p, 1.0 if "norm" in name else 0.0)
            elif name.endswith(("attn.out.weight", "mlp.down.weight")):
                nn.init.normal_(p, std=(p.shape[1] * 2 * depth) ** -0.5, generator=generator)
            else:
                nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=generator)

    # ---- from words and pictures to input embeddings

    def prompt(self, text: str, pictures: list, system: str = ASK, answer_start: str = "",
               max_len: int | None = None) -> Prompt:
        """One text and its pictures, [(patches, grid)] -> Prompt. answer_start: how the assistant's
        turn begins; max_len: tokens of the text that are read. ValueError for image tokens in the
        text."""
        if max_len is not None:
            text = self.tokenizer.truncate(text, max_len)
        merge = self.config.vision.merge
        grids = [(h // merge, w // merge) for _, (h, w) in pictures]       # in units
        units = [h * w for h, w in grids]
        ids = self.tokenizer.encode(chat(text, units, system) + answer_start)
        image_pad = self.tokenizer.special["image_pad"]
        if ids.count(image_pad) != sum(units):
            raise ValueError(f"the prompt must not contain image tokens itself: {text!r}")
        return Prompt(ids, mrope_positions(ids, image_pad, grids), pictures)

    def tokenize(self, texts: list[str], images: list[list[Image.Image]] | None = None,
                 system: str = ASK, answer_start: str = "", max_len: int | None = None) -> Batch:
        """Texts and, for each, a list of PIL images (maybe empty) -> Batch on this device (the
        pictures wait on the CPU). ValueError for no text, or for lists that do not fit."""
        images = matching_images(texts, images)
        prompts = []
        for text, row in zip(texts, images):
            pictures = [patchify(image, self.config.vision) for image in row]
            prompts.append(self.prompt(text, pictures, system, answer_start, max_len))
        return self.left_pad(prompts)

    def left_pad(self, prompts: list[Prompt]) -> Batch:
        """Prompts of any lengths -> one Batch. Padding goes to the left, so that the last column
        holds a real token in every row. Padding has position 1, as in the released code."""
        B, S = len(prompts), max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((B, S), self.tokenizer.special["endoftext"])
        attention_mask = torch.zeros(B, S, dtype=torch.bool)
        positions = torch.ones(3, B, S, dtype=torch.long)
        for b, prompt in enumerate(prompts):
            start = S - len(prompt.ids)
            ids[b, start:] = torch.tensor(prompt.ids)
            attention_mask[b, start:] = True
            positions[:, b, start:] = prompt.positions
        device = self.embed_tokens.weight.device
        pictures = [picture for prompt in prompts for picture in prompt.pictures]
        return Batch(ids.to(device), attention_mask.to(device), positions.to(device), pictures)

    def encode_images(self, pictures: list) -> Tensor:
        """[(patches, grid)] -> the tokens of all pictures in order, (U, M)."""
        table = self.embed_tokens.weight
        tokens = []
        for patches, grid in pictures:
            patches = patches[None].to(table.device, table.dtype)          # (1, P, ...)
            tokens.append(self.vision(patches, grid)[0])                   # (U of one picture, M)
        return torch.cat(tokens)

    def embed(self, batch: Batch) -> Tensor:
        """Batch -> input embeddings (B, S, M): a row of the table for each token, the ViT's output
        where a picture stands."""
        x = self.embed_tokens(batch.ids)
        if batch.pictures:
            is_image = batch.ids == self.tokenizer.special["image_pad"]    # (B, S)
            tokens = self.encode_images(batch.pictures).to(x.dtype)        # (U, M)
            x = x.masked_scatter(is_image[..., None], tokens)
        return x

    # ---- the decoder

    def rope_angles(self, positions: Tensor) -> Tensor:
        """positions (3, B, S) -> (B, 1, S, K/2). M-RoPE: the first channel pairs turn with the
        position in time, the next with height, the last with width (config.rope_sections)."""
        c, device = self.config, positions.device
        axis = [i for i, n in enumerate(c.rope_sections) for _ in range(n)]
        per_pair = positions[axis].permute(1, 2, 0)                        # (B, S, K/2)
        angle = per_pair * frequencies(c.head_dim // 2, c.rope_theta, device)
        return angle[:, None]

    def forward(self, x: Tensor, positions: Tensor, attention_mask: Tensor,
                cache: KVCache | None = None, n_layer: int | None = None) -> list[Tensor]:
        """x (B, S, M) embeddings, positions (3, B, S) -> the hidden states, (B, S, M)
        each: states[i] *enters* layer i.

        There is one more than there are layers, the last one after the final norm. The argument
        `n_layer` runs fewer layers: the last state is then the raw residual stream. With a cache, x
        continues what was read before. attention_mask: (B, T), False for padding, of all positions
        including those in the cache; or (B, 1, S, T), which position attends to which.
        """
        mask = attention_mask
        if mask.dim() == 2:
            mask = causal_mask(mask, x.shape[1])
        angle = self.rope_angles(positions)
        states = [x]
        for i, layer in enumerate(self.layers[:n_layer]):
            states.append(layer(states[-1], angle, mask, cache, i))
        if len(states) == self.config.n_layer + 1:
            states[-1] = self.norm(states[-1])
        return states

    def logits(self, x: Tensor) -> Tensor:
        """x (..., M) -> (..., vocab_size). The head is the embedding table itself (tied)."""
        return F.linear(x, self.embed_tokens.weight)

    @torch.no_grad()
    def next_tokens(self, batch: Batch, max_new_tokens: int = 64) -> Iterator[Tensor]:
        """Batch -> the likeliest next token of each row, (B,), again and again, until every row has
        come to its end, or `max_new_tokens` times: then with a warning."""
        cache = KVCache()
        x = self.embed(batch)                                              # (B, S, M)
        positions, mask = batch.positions, batch.attention_mask
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(max_new_tokens):
            last = self(x, positions, mask, cache)[-1][:, -1]              # (B, M)
            token = self.logits(last).float().argmax(-1)                   # (B,)
            yield token
            done |= torch.isin(token, torch.tensor(self.tokenizer.ends, device=token.device))
            if done.all():
                return
            # The next input is the token itself, one position further on.
            x = self.embed_tokens(token)[:, None]                          # (B, 1, M)
            positions = positions[:, :, -1:] + 1                           # (3, B, 1)
            mask = F.pad(mask, (0, 1), value=True)
        warnings.warn(f"answer cut at {max_new_tokens} tokens", stacklevel=3)

    def generate(self, batch: Batch, max_new_tokens: int = 64) -> list[list[int]]:
        """`next_tokens` to the end -> each row's answer as token ids, up to its end token."""
        rows = torch.stack(list(self.next_tokens(batch, max_new_tokens)), 1).tolist()
        return [up_to_end(row, self.tokenizer.ends) for row in rows]


def matching_images(texts: list[str], images: list | None) -> list[list]:
    """A list of images for each text. ValueError where the lists do not fit."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"expected a list of prompts, got {texts!r}")
    if images is None:
        return [[] for _ in texts]
    if len(images) != len(texts):
        raise ValueError(f"{len(texts)} prompts but {len(images)} lists of images")
    if not all(isinstance(row, list | tuple) for row in images):
        raise ValueError("expected a list of images for each prompt, such as [[picture]]")
    return images


def up_to_end(row: list[int], ends: list[int]) -> list[int]:
    for i, token in enumerate(row):
        if token in ends:
            return row[:i]
    return row
