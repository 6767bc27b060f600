"""Qwen2.5-VL by hand: the multimodal LLM that reads (arXiv 2502.13923; the left column of TBAC-UniImage's figure).

Text and pictures -> token ids, patches, positions -> ViT -> decoder -> one hidden state per depth. The ladder taps those
states; the language head answers questions. Frozen everywhere but in the toy world's own stage `mllm`.

Dimension key: B batch, S sequence, M model width, H heads, K head dim, G key heads.
Left out: video, sliding windows in the text part (the public 3B weights do not use them).
"""
import itertools
import warnings
from dataclasses import dataclass, field

import tokenizers
import torch
import torch.nn.functional as F
from torch import nn

from vit import RMSNorm, SwiGLU, ViT, ViTConfig, apply_rope, attention, frequencies, patchify

# The released code's system prompts. To draw, too, the MLLM is asked to describe: what the DiT needs is what a description would say.
DRAW = "You will be given an image or its caption. Please describe the content of the image in detail in your own words."
ASK = "You are a helpful assistant."


# ---------------------------------------------------------------------------------------------------------------- text

SPECIAL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad")


class Tokenizer:
    """A `tokenizer.json` (byte-level BPE) and the special tokens that the chat format needs."""

    def __init__(self, file):
        self.file = str(file)
        try:
            self.bpe = tokenizers.Tokenizer.from_file(self.file)
        except Exception as e:                                                  # the library raises nothing narrower
            raise ValueError(f"{file} is not a tokenizer: {e}") from None
        self.special = {n: self.bpe.token_to_id(f"<|{n}|>") for n in SPECIAL}
        if missing := [n for n, i in self.special.items() if i is None]:
            raise ValueError(f"{file}: not a Qwen tokenizer, special tokens missing: {missing}")

    def encode(self, text):
        try:
            return self.bpe.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(f"not UTF-8: {text!r}") from None

    def decode(self, ids, keep_special=False):
        return self.bpe.decode(ids, skip_special_tokens=not keep_special)

    def cut(self, text, limit):
        """The text's first `limit` tokens (what is left of a character that is cut goes). The released code cuts before it applies the template, so
        the end stays whole."""
        ids = self.encode(text)
        if len(ids) <= limit:
            return text
        warnings.warn(f"prompt cut from {len(ids)} to {limit} tokens", stacklevel=4)
        return self.decode(ids[:limit], keep_special=True).rstrip("\ufffd")


def chat(text, image_units=(), system=ASK):
    """One user turn in Qwen's chat format, up to where the assistant begins. image_units: merged units of each picture."""
    pictures = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in image_units)
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{pictures}{text}<|im_end|>\n<|im_start|>assistant\n"


def mrope_positions(ids, image_pad, grids):
    """Token ids of one row, grids (h, w) of its pictures in merged units -> (3, S) positions in time, height, width.

    Text counts all three up together. A picture stands still in time and counts rows and columns; what follows it goes on
    from the largest position so far + 1 (Qwen2-VL report, section 2.1).
    """
    parts, at, position = [], 0, 0
    for h, w in grids:
        start = ids.index(image_pad, at)
        parts.append(torch.arange(position, position + start - at).expand(3, -1))
        position += start - at
        rows, columns = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
        parts.append(torch.stack([torch.zeros_like(rows), rows, columns]) + position)
        position += max(h, w)
        at = start + h * w
    parts.append(torch.arange(position, position + len(ids) - at).expand(3, -1))
    return torch.cat(parts, 1)


# ------------------------------------------------------------------------------------------------------------- decoder

@dataclass(frozen=True)
class MLLMConfig:
    vocab_size: int = 151936
    n_layer: int = 36
    dim: int = 2048
    n_head: int = 16
    n_kv_head: int = 2
    head_dim: int = 128
    mlp_dim: int = 11008
    rope_theta: float = 1e6
    rope_sections: tuple = (16, 24, 24)  # of the K/2 channel pairs: how many turn with time, height, width
    vision: ViTConfig = field(default_factory=ViTConfig)


class KVCache:
    """layers: {layer: keys, values (B, G, S, K)} of the positions read so far; real (B, S): which of those are not padding. Once `full` is set,
    what is read sees all of it but is not added: nothing comes after it (and a layer may be run again for its gradient)."""

    def __init__(self):
        self.layers, self.real, self.full = {}, None, False

    def extend(self, layer, k, v):
        if layer in self.layers:
            k, v = torch.cat([self.layers[layer][0], k], 2), torch.cat([self.layers[layer][1], v], 2)
        if not self.full:
            self.layers[layer] = k, v
        return k, v


def causal_mask(real, n):
    """real (B, S) -> (B, 1, n, S): the last n positions see real ones up to themselves, and padding sees itself (no NaN)."""
    S = real.shape[1]
    own = torch.arange(S - n, S, device=real.device)[:, None]
    key = torch.arange(S, device=real.device)
    return ((key <= own) & real[:, None, None]) | (key == own)


class Attention(nn.Module):
    """Grouped-query attention: n_head / n_kv_head query heads share one key and value head."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q = nn.Linear(c.dim, c.n_head * c.head_dim)
        self.k = nn.Linear(c.dim, c.n_kv_head * c.head_dim)
        self.v = nn.Linear(c.dim, c.n_kv_head * c.head_dim)
        self.out = nn.Linear(c.n_head * c.head_dim, c.dim, bias=False)

    def forward(self, x, angle, mask, cache, layer):
        heads = lambda t: t.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))                   # (B, H, S, K), k and v with fewer heads
        q, k = apply_rope(q, angle), apply_rope(k, angle)
        if cache:
            k, v = cache.extend(layer, k, v)                                             # all positions read so far
        x = attention(q, k, v, mask)                                                     # (B, H, S, K)
        return self.out(x.transpose(1, 2).flatten(2))                                    # (B, S, M)


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.attn = RMSNorm(c.dim), Attention(c)
        self.norm2, self.mlp = RMSNorm(c.dim), SwiGLU(c.dim, c.mlp_dim, bias=False)

    def forward(self, x, angle, mask, cache, layer):
        x = x + self.attn(self.norm1(x), angle, mask, cache, layer)
        return x + self.mlp(self.norm2(x))


@dataclass
class Row:
    """One prompt, tokenized: ids, positions (3, S), pictures as [(patches, grid)]."""
    ids: list
    positions: torch.Tensor
    pictures: list

    def key(self):
        """Equal for rows that read the same. Pictures by id: `MLLM.rows` makes patches of equal pictures once."""
        return tuple(self.ids), tuple(id(patches) for patches, _ in self.pictures)


def shared(rows):
    """How many tokens the rows begin with in common: the length of their shared prefix."""
    columns = zip(*(row.ids for row in rows))                               # ends with the shortest row
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def pack(rows, more, room):
    """Sequence packing: rows -> packs, lists of rows with the same pictures, each to be read as one sequence of about `room` tokens. To each
    row belong `more` tokens that come later."""
    groups, out = {}, []
    for row in rows:
        groups.setdefault(row.key()[1], []).append(row)
    for group in groups.values():
        n, used = shared(group), room                                       # as if the pack before were full
        for row in group:
            cost = len(row.ids) - n + more
            if used + cost > room:
                out.append([])
                used = n                                                    # what they begin with stands in a pack once
            out[-1].append(row)
            used += cost
    return out


def to_read(packs, more):
    """Tokens of all packs, padding to the longest one included."""
    return len(packs) * max(sum(len(row.ids) + more for row in rows) - (len(rows) - 1) * shared(rows) for rows in packs)


@dataclass
class Batch:
    """Prompts ready to read: ids (B, S) left-padded, real (B, S), positions (3, B, S), pictures as [(patches, grid)]."""
    ids: torch.Tensor
    real: torch.Tensor
    positions: torch.Tensor
    pictures: list


class MLLM(nn.Module):
    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.vision = ViT(config.vision, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim)

    def init_weights(self, generator=None):
        """A start for training from nothing: normal, 1/sqrt(inputs); what writes to the residual stream is smaller the deeper the
        stack. (The usual 0.02 is 1/sqrt(2048). At the toy's width of 128 it is four times too small, and shapes stay unlearnt.)"""
        for name, p in self.named_parameters():
            depth = self.config.vision.n_layer if name.startswith("vision.") else self.config.n_layer
            if p.dim() > 1:
                last = name.endswith(("attn.out.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=(p.shape[1] * (2 * depth if last else 1)) ** -0.5, generator=generator)
            else:
                nn.init.constant_(p, 1.0 if "norm" in name else 0.0)

    def rows(self, texts, images=None, system=ASK, then="", limit=None):
        """Prompts (list of str) and pictures (None, or per prompt a list of PIL images) -> a Row each. A picture that stands in several places
        becomes patches once. `then` opens the assistant's turn; limit: tokens of a text that are read, if not all. ValueError for no prompt, or
        for lists that do not fit."""
        if isinstance(texts, str) or not texts:
            raise ValueError(f"expected a list of prompts, got {texts!r}")
        images = [[] for _ in texts] if images is None else images
        if len(images) != len(texts):
            raise ValueError(f"{len(texts)} prompts but {len(images)} lists of images")
        pad, merge, known, rows = self.tokenizer.special["image_pad"], self.config.vision.merge, {}, []
        for text, row in zip(texts, images):
            row = [image.convert("RGB") for image in row]
            keys = [(image.size, image.tobytes()) for image in row]
            known |= {key: patchify(image, self.config.vision) for key, image in zip(keys, row) if key not in known}
            pictures = [known[key] for key in keys]
            grids = [(h // merge, w // merge) for _, (h, w) in pictures]
            text = text if limit is None else self.tokenizer.cut(text, limit)
            ids = self.tokenizer.encode(chat(text, [h * w for h, w in grids], system) + then)
            if ids.count(pad) != sum(h * w for h, w in grids):
                raise ValueError(f"the prompt must not contain image tokens itself: {text!r}")
            rows.append(Row(ids, mrope_positions(ids, pad, grids), pictures))
        return rows

    def prepare(self, texts, images=None, system=ASK, then=""):
        """`rows` as one Batch on this model's device."""
        return self.pad(self.rows(texts, images, system, then))

    def pad(self, rows):
        """Rows of different length -> one Batch; padding goes to the left, so that the last token is every row's last."""
        S, dev = max(len(row.ids) for row in rows), self.embed.weight.device
        ids = torch.full((len(rows), S), self.tokenizer.special["endoftext"])
        real, places = torch.zeros(len(rows), S, dtype=torch.bool), torch.ones(3, len(rows), S, dtype=torch.long)
        for b, row in enumerate(rows):
            start = S - len(row.ids)
            ids[b, start:], real[b, start:], places[:, b, start:] = torch.tensor(row.ids), True, row.positions
        return Batch(ids.to(dev), real.to(dev), places.to(dev), [picture for row in rows for picture in row.pictures])

    def pad_packs(self, packs, more):
        """Packs from `pack` -> one Batch, a pack in each of its rows, and the mask (packs, 1, S, S) of who sees whom.

        What the rows of a pack begin with (the system prompt, the pictures) stands there once: attention is causal, so it is the same for all of
        them. Then comes what is left of each row, and in the end `more` fillers for each of them, where `TBAC.hear` puts the queries. A token sees
        what is before it in its own row and that beginning, and nothing of other rows.
        """
        laid, owners = [], []                                                  # owner of a token: 0 the beginning, k the k-th row
        for rows in packs:
            n, each = shared(rows), list(enumerate(rows, 1))
            ids, places, owner = rows[0].ids[:n], [rows[0].positions[:, :n]], [0] * n
            for k, row in each:
                ids, owner = ids + row.ids[n:], owner + [k] * len(row.ids[n:])
                places.append(row.positions[:, n:])
            for k, row in each:
                ids, owner = ids + [self.tokenizer.special["endoftext"]] * more, owner + [k] * more
                places.append(row.positions[:, -1:] + torch.arange(1, more + 1))                       # counted as text
            laid.append(Row(ids, torch.cat(places, 1), rows[0].pictures)), owners.append(torch.tensor(owner))
        batch = self.pad(laid)
        owner = torch.stack([F.pad(o, (batch.ids.shape[1] - len(o), 0), value=-1) for o in owners])    # (packs, S), -1 padding
        mask = ((owner[:, :, None] == owner[:, None]) | (owner[:, None] == 0)).tril()
        return batch, mask[:, None].to(batch.ids.device)

    def see(self, pictures):
        """[(patches, grid)] -> (all units of all pictures, M). Each distinct picture once; those of one grid go through the ViT together."""
        weight, tokens = self.embed.weight, {}
        distinct = {id(patches): (patches, grid) for patches, grid in pictures}
        for grid in dict.fromkeys(grid for _, grid in pictures):
            same = {i: patches for i, (patches, g) in distinct.items() if g == grid}
            tokens |= dict(zip(same, self.vision(torch.stack(list(same.values())).to(weight.device, weight.dtype), grid)))
        return torch.cat([tokens[id(patches)] for patches, _ in pictures])

    def read(self, batch):
        """Batch -> input embeddings (B, S, M): a row of the table per token, the ViT's output where a picture stands."""
        x = self.embed(batch.ids)
        if batch.pictures:
            x = x.masked_scatter((batch.ids == self.tokenizer.special["image_pad"])[..., None], self.see(batch.pictures).to(x.dtype))
        return x

    def forward(self, x, positions, real, cache=None, n_layer=None, mask=None):
        """x (B, S, M) embeddings, positions (3, B, S), real (B, S) -> the hidden states, a list: states[i] *enters* layer i.

        All layers give n_layer + 1 states, the last one after the final norm. A smaller `n_layer` stops there, and its last
        state is the raw residual stream. With a cache, x continues what the cache has read. mask: who sees whom, if not
        each token all real ones up to itself.
        """
        c = self.config
        if cache:
            real = cache.real = real if cache.real is None else torch.cat([cache.real, real], 1)
        mask = causal_mask(real, x.shape[1]) if mask is None else mask
        axis = torch.tensor([i for i, n in enumerate(c.rope_sections) for _ in range(n)], device=x.device)          # (K/2,)
        angle = positions[axis].permute(1, 2, 0) * frequencies(c.head_dim // 2, c.rope_theta, x.device)  # (B, S, K/2)
        states = [x]
        for i, layer in enumerate(self.layers[:n_layer]):
            states.append(layer(states[-1], angle[:, None], mask, cache, i))
        if len(states) == c.n_layer + 1:
            states[-1] = self.norm(states[-1])
        return states

    def logits(self, x):
        """The head is the embedding table itself (tied)."""
        return F.linear(x, self.embed.weight)

    @torch.no_grad()
    def generate(self, batch, max_new_tokens=64, temperature=0.0, generator=None):
        """Batch -> a list of token ids per row, up to <|im_end|>; greedy at temperature 0."""
        cache, stop = KVCache(), [self.tokenizer.special[n] for n in ("im_end", "endoftext")]
        ends = torch.tensor(stop, device=self.embed.weight.device)
        x, positions, real, out = self.read(batch), batch.positions, batch.real, []
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(max_new_tokens):
            logits = self.logits(self(x, positions, real, cache)[-1][:, -1]).float()                 # (B, vocab)
            token = logits.argmax(-1) if temperature == 0 else \
                torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]
            out.append(token)
            done |= torch.isin(token, ends)
            if done.all():
                break
            x, real = self.embed(token)[:, None], torch.ones_like(real[:, :1])
            positions = positions.amax((0, 2), keepdim=True).expand(3, -1, 1) + 1                    # (3, B, 1)
        rows = torch.stack(out, 1).tolist()
        return [row[:next((i for i, t in enumerate(row) if t in stop), len(row))] for row in rows]
