"""The same numbers with less work: `fast.enable(model)`, one line after loading.

    what is read      plain (tbac.py, mllm.py)            here
    equal rows        each by itself                      once
    equal pictures    each by itself                      once, and those of one size in one batch
    a common start    in every row (system prompt, ...)   once: rows share a sequence ("pack")
    training          a graph through all positions       a graph from the first query on only
    pixels to latents all pictures at once                512 x 512 pixels at a time, channels last

Values change by rounding only, gradients likewise (tests/test_5_fast.py). What each part buys, in
operations and in time, stands in bench/README.md.

Dimension key: B rows, P packs, S tokens of a pack, Q queries, M MLLM width, U units (vit.py).
"""
import functools
import itertools
import time
import warnings

import torch
from torch import Tensor

from mllm import DRAW, MLLM, Batch, KVCache, Prompt, matching_images
from vit import patchify


def enable(model):
    """Switches the fast path of a whole model on -> the model."""
    model.query_states = functools.partial(packed_query_states, model)
    model.mllm.encode_images = functools.partial(encode_images_once, model.mllm)
    # All channels of a position lie side by side in memory: faster convolutions.
    model.dcae.to(memory_format=torch.channels_last)
    model.dcae.encode = functools.partial(encode_in_parts, model.dcae)
    return model


def disable(model):
    """Back to the plain path -> the model."""
    for module, name in ((model, "query_states"), (model.mllm, "encode_images"),
                         (model.dcae, "encode")):
        vars(module).pop(name, None)
    model.dcae.to(memory_format=torch.contiguous_format)
    return model


# ------------------------------------------------------------------------- equal things are one

def tokenize_once(mllm: MLLM, texts, images, **how) -> list[Prompt]:
    """MLLM.tokenize before the padding; equal pictures become patches once, the same object."""
    patches, prompts = {}, []
    for text, row in zip(texts, matching_images(texts, images)):
        pictures = []
        for image in row:
            image = image.convert("RGB")
            key = image.size, image.tobytes()
            if key not in patches:
                patches[key] = patchify(image, mllm.config.vision)
            pictures.append(patches[key])
        prompts.append(mllm.prompt(text, pictures, **how))
    return prompts


def pictures_key(prompt: Prompt) -> tuple:
    return tuple(id(patches) for patches, _ in prompt.pictures)


def prompt_key(prompt: Prompt) -> tuple:
    """Equal for prompts that read the same."""
    return tuple(prompt.ids), pictures_key(prompt)


def encode_images_once(mllm: MLLM, pictures: list) -> Tensor:
    """MLLM.encode_images: each distinct picture once, those of one grid in one batch."""
    table = mllm.embed_tokens.weight
    by_grid, tokens = {}, {}
    for patches, grid in pictures:
        by_grid.setdefault(grid, {})[id(patches)] = patches
    for grid, distinct in by_grid.items():
        batch = torch.stack(list(distinct.values())).to(table.device, table.dtype)
        tokens |= dict(zip(distinct, mllm.vision(batch, grid)))
    return torch.cat([tokens[id(patches)] for patches, _ in pictures])


# ------------------------------------------------------------------------------------- packing

def common_prefix_len(prompts: list[Prompt]) -> int:
    """How many tokens the prompts begin with in common."""
    columns = zip(*(prompt.ids for prompt in prompts))      # ends with the shortest
    equal = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return sum(1 for _ in equal)


def pack(prompts, n_query: int, max_pack_len: int) -> list[list[Prompt]]:
    """Prompts -> packs: prompts with the same pictures, to be read as one sequence of about
    `max_pack_len` tokens, the n_query queries of each included."""
    groups = {}
    for prompt in prompts:
        groups.setdefault(pictures_key(prompt), []).append(prompt)
    packs = []
    for group in groups.values():
        # A pack holds the common start once, then the rest of each prompt with its queries.
        start = length = common_prefix_len(group)
        current = []
        for prompt in group:
            cost = len(prompt.ids) - start + n_query
            if current and length + cost > max_pack_len:
                packs.append(current)
                current, length = [], start
            current.append(prompt)
            length += cost
        packs.append(current)
    return packs


def padded_tokens(packs: list[list[Prompt]], n_query: int) -> int:
    """Tokens of all packs, padding to the longest one included."""
    lengths = []
    for prompts in packs:
        saved = (len(prompts) - 1) * common_prefix_len(prompts)
        lengths.append(sum(len(prompt.ids) + n_query for prompt in prompts) - saved)
    return len(packs) * max(lengths)


def join_packs(mllm: MLLM, packs: list[list[Prompt]], n_query: int) -> tuple[Batch, Tensor]:
    """Packs -> a Batch with one pack in each row, and the mask (P, 1, S, S) of who attends to whom.

    What the prompts of a pack begin with stands there once: attention is causal, so it is the same
    for all of them. Then comes the rest of each prompt, and at the end n_query placeholders for
    each, which the queries replace. A token attends to what precedes it in its own prompt and in
    that common start, and to nothing of other prompts.
    """
    joined, owners = [], []
    for prompts in packs:
        prompt, owner = join(prompts, n_query, mllm.tokenizer.special["endoftext"])
        joined.append(prompt)
        owners.append(owner)
    batch = mllm.left_pad(joined)
    return batch, pack_mask(owners, batch.ids)


def pack_mask(owners: list[list[int]], ids: Tensor) -> Tensor:
    """Whose each token of a pack is (0: everybody's), and the padded ids (P, S) -> the mask
    (P, 1, S, S): a token attends to what precedes it, of its own and of everybody's."""
    S = ids.shape[1]
    padded = [[-1] * (S - len(owner)) + owner for owner in owners]               # -1: padding
    owner = torch.tensor(padded, device=ids.device)                              # (P, S)
    same = owner[:, :, None] == owner[:, None]
    return (same | (owner[:, None] == 0)).tril()[:, None]


def join(prompts: list[Prompt], n_query: int, placeholder: int) -> tuple[Prompt, list[int]]:
    """One pack -> its tokens as one Prompt, and whose each token is: 0 the common start's,
    k the k-th prompt's."""
    start = common_prefix_len(prompts)
    ids = prompts[0].ids[:start]
    owner = [0] * start
    positions = [prompts[0].positions[:, :start]]
    for k, prompt in enumerate(prompts, 1):
        rest = prompt.ids[start:]
        ids = ids + rest
        owner = owner + [k] * len(rest)
        positions.append(prompt.positions[:, start:])
    for k, prompt in enumerate(prompts, 1):
        ids = ids + [placeholder] * n_query
        owner = owner + [k] * n_query
        # The queries' positions go on counting, as for text.
        positions.append(prompt.positions[:, -1:] + torch.arange(1, n_query + 1))
    return Prompt(ids, torch.cat(positions, 1), prompts[0].pictures), owner


# --------------------------------------------------------------------------- reading the packs

class PrefixCache(KVCache):
    """Once `complete`, what is read attends to the prefix but is not added to it: nothing comes
    after it, and a layer may run again for its gradient (--grad-checkpoint)."""
    complete = False

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        prefix = dict(self.layers)
        k, v = super().extend(layer, k, v)
        if self.complete:
            self.layers = prefix
        return k, v


def packed_query_states(model, prompts, images=None, n_layer=None,
                        max_pack_len: int = 512) -> list[Tensor]:
    """TBAC.query_states -> of each depth (B, Q, M). Sequences have about max_pack_len tokens, or
    1/2, 1/4, 1/8 of that: whichever leaves the fewest to read, padding included."""
    n_query = len(model.ladder.queries)
    every = tokenize_once(model.mllm, prompts, images, system=DRAW,
                          answer_start="<|vision_start|>", max_len=model.config.max_prompt)
    distinct = {prompt_key(prompt): prompt for prompt in every}
    candidates = [pack(distinct.values(), n_query, max_pack_len // part) for part in (1, 2, 4, 8)]
    packs = min(candidates, key=lambda packs: padded_tokens(packs, n_query))
    states = read_packs(model, packs, n_layer)
    packed = [prompt_key(prompt) for prompts in packs for prompt in prompts]
    place = {key: i for i, key in enumerate(packed)}
    order = [place[prompt_key(prompt)] for prompt in every]
    return [state[order] for state in states]


def read_packs(model, packs: list[list[Prompt]], n_layer: int | None) -> list[Tensor]:
    """-> the queries' states at every depth, (prompts, Q, M) each, in the order of the packs.

    Attention is causal and the queries come last, so what precedes them does not depend on them:
    where gradients are wanted, it is read first, without a graph.
    """
    mllm, Q = model.mllm, len(model.ladder.queries)
    batch, mask = join_packs(mllm, packs, Q)
    ends = [Q * len(prompts) for prompts in packs]          # tokens of a pack that are queries
    embedded = mllm.embed(batch)
    queries = model.ladder.queries.to(embedded.dtype)
    x = []
    for row, n in zip(embedded, ends):
        x.append(torch.cat([row[:-n], queries.repeat(n // Q, 1)]))
    x = torch.stack(x)                                      # (P, S, M)

    cache = PrefixCache()
    before = x.shape[1] - max(ends) if torch.is_grad_enabled() else 0
    if before:
        with torch.no_grad():
            mllm(x[:, :before], batch.positions[..., :before], mask[..., :before, :before],
                 cache, n_layer)
    cache.complete = True
    states = mllm(x[:, before:], batch.positions[..., before:], mask[..., before:, :],
                  cache, n_layer)
    return [split_queries(state, ends, Q) for state in states]


def split_queries(state: Tensor, ends: list[int], n_query: int) -> Tensor:
    """state (P, S, M) -> (prompts, Q, M): the queries at the end of each pack, prompt by prompt."""
    rows = [row[-n:].unflatten(0, (-1, n_query)) for row, n in zip(state, ends)]
    return torch.cat(rows)


# --------------------------------------------------------------------------------- autoencoder

def encode_in_parts(dcae, pixels: Tensor) -> Tensor:
    """DCAE.encode, at most 512 x 512 pixels at a time: the outer stages hold 128 values and more
    for each pixel, which few pictures keep within a CPU's cache."""
    height, width = pixels.shape[-2:]
    n = max(1, 512 ** 2 // (height * width))
    encode = type(dcae).encode
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    return torch.cat([encode(dcae, part) for part in pixels.split(n)])


# ------------------------------------------------------------------------------------- compile

def compile_parts(model, warm_up) -> None:
    """torch.compile for the DiT step and the autoencoder's decoder (on a GPU with CUDA graphs).
    warm_up() draws a picture, so that compiling happens now and not in the first real one. Where it
    fails (no compiler, an old card) there is a warning, and the model stays as it was."""
    parts, start = (model.dit, model.dcae.decoder), time.perf_counter()
    mode = "reduce-overhead" if model.ladder.queries.is_cuda else "default"
    for part in parts:
        part.compile(mode=mode)
    try:
        warm_up()
        print(f"compiled in {time.perf_counter() - start:.1f} s")
    # What torch.compile raises when it cannot compile derives from this.
    except RuntimeError as e:
        for part in parts:
            part._compiled_call_impl = None                 # undoes part.compile
        reason = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        warnings.warn(f"--compile: goes on without, {reason}", stacklevel=2)
