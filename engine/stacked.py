"""Many models trained as one: of the same shapes, with a leading dimension and torch.func.vmap.

They may differ in weights, in noise and in wiring, and learn from the same examples. So what does
not depend on what learns is done once for all of them: the examples, their latents, and what the
frozen MLLM reads before the queries.

    prompts  -> read_prefix: keys and values of every layer, once            (B, G, S, K)
    queries  -> Learner.rungs: their states behind that prefix, A, connector (N, L, B, Q, caption)
    rungs    -> DiT.project_kv -> DiT.forward                                (N, B, C, h, w)

The numbers are those of single models but for rounding (tests/test_5_stacked.py).

Dimension key: N models, B rows, S tokens of the prompt, Q queries, M MLLM width, L rungs, T states.
"""
import copy
import types
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from dit import DiT
from engine.fast import PrefixCache
from ladder import Ladder
from mllm import DRAW, MLLM, KVCache

# ---------------------------------------------------------------------------- read once for all


@dataclass
class Prefix:
    """What the MLLM has read of some prompts: keys and values of each layer, (B, G, S, K) each;
    positions (3, B, S); attention_mask (B, S), False for padding."""
    layers: dict[int, tuple[Tensor, Tensor]]
    positions: Tensor
    attention_mask: Tensor

    def rows(self, index: list[int]) -> "Prefix":
        """Those of some prompts, in this order."""
        layers = {i: (k[index], v[index]) for i, (k, v) in self.layers.items()}
        return Prefix(layers, self.positions[:, index], self.attention_mask[index])


@torch.no_grad()
def read_prefix(mllm: MLLM, prompts: list[str], max_prompt: int,
                n_layer: int | None = None) -> Prefix:
    """Attention is causal and the queries come last: nothing here depends on them. Equal prompts
    are read once."""
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    batch = mllm.tokenize(list(distinct), None, DRAW, "<|vision_start|>", max_prompt)
    cache = KVCache()
    mllm(mllm.embed(batch), batch.positions, batch.attention_mask, cache, n_layer)
    read = Prefix(cache.layers, batch.positions, batch.attention_mask)
    return read.rows([distinct[prompt] for prompt in prompts])


def query_states(mllm: MLLM, prefix: Prefix, queries: Tensor, n_layer: int | None) -> list[Tensor]:
    """queries (Q, M) -> their states behind each prompt, at every depth (B, Q, M)."""
    B, Q = len(prefix.attention_mask), len(queries)
    x = queries.to(mllm.embed_tokens.weight.dtype).expand(B, -1, -1)
    after = prefix.positions[:, :, -1:] + torch.arange(1, Q + 1, device=x.device)
    mask = torch.cat([prefix.attention_mask, prefix.attention_mask.new_ones(B, Q)], 1)
    cache = PrefixCache()
    cache.layers = dict(prefix.layers)
    cache.complete = True
    return mllm(x, after, mask, cache, n_layer)


# ------------------------------------------------------------------------------------ one model

class Product(nn.Module):
    """An nn.Linear, or a 1 x 1 nn.Conv2d, as one product of two matrices. Of N models that is one
    batch of N products; as they are, `vmap` would repeat the weights for every row of a batch, and
    make convolutions of N groups."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.channels = 1 if isinstance(layer, nn.Conv2d) else -1

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.channels, -1)
        rows = x.flatten(0, -2)                                            # (all others, in)
        weight = self.weight.flatten(1).T                                  # (in, out)
        y = rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)
        return y.unflatten(0, x.shape[:-1]).movedim(-1, self.channels)


def use_products(module: nn.Module) -> None:
    """Puts `Product` in place of every layer that is one."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            flat = isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1)
            if flat or isinstance(child, nn.Linear):
                setattr(parent, name, Product(child))


class Learner(nn.Module):
    """What learns of a model, and the matrix A of its wiring, where that does not learn: so one
    stack holds models of different wirings."""

    def __init__(self, ladder: Ladder, dit: DiT, n_state: int):
        super().__init__()
        self.ladder = ladder
        self.dit = dit
        self.last = max(ladder.taps)
        learnt = isinstance(ladder.routes, nn.Parameter)
        self.register_buffer("A", None if learnt else ladder.matrix(n_state))       # (L, T)
        if not learnt:
            ladder.routes = None
        use_products(self)

    def forward(self, what: str, *given):
        """`functional_call` knows this method only."""
        return getattr(self, what)(*given)

    def rungs(self, mllm: MLLM, prefix: Prefix, n_layer: int) -> Tensor:
        """-> (L, B, Q, caption_dim), as by Ladder.forward"""
        queries = self.ladder.queries
        states = torch.stack(query_states(mllm, prefix, queries, n_layer))   # (T, B, Q, M)
        A = self.ladder.matrix(len(states)) if self.A is None else self.A[:, :len(states)]
        tapped = torch.einsum("lt,tbqm->lbqm", A.float(), states.float())
        return self.ladder.connector(tapped.to(queries.dtype))

    def keys_values(self, rungs: Tensor) -> list[tuple[Tensor, Tensor]]:
        return self.dit.project_kv(rungs)

    def velocity(self, x_t: Tensor, time: Tensor, keys_values: list) -> Tensor:
        return self.dit(x_t.to(self.dit.proj_out.weight.dtype), time, keys_values)


# -------------------------------------------------------------------------------- a stack of them

def signature(learner: Learner) -> tuple:
    """Equal for models that one stack can hold."""
    parameters = tuple((name, p.shape) for name, p in learner.named_parameters())
    return parameters, tuple(name for name, _ in learner.named_buffers())


class Stack:
    """N models of one signature. params: {name: (N, ...)}, which learn.

    To `sample.denoise` it looks like a model that draws N * B pictures, model by model.
    """

    def __init__(self, config, mllm: MLLM, learners: list[Learner]):
        params, buffers = stack_module_state(learners)
        self.params = {name: nn.Parameter(p.detach()) for name, p in params.items()}
        self.buffers = buffers
        self.n = len(learners)
        self.n_layer = max(learner.last for learner in learners)
        self.config, self.mllm = config, mllm
        self.shape = copy.deepcopy(learners[0]).to("meta")

    def each(self, what: str, *given, shared=()):
        """A method of Learner for all models: given: with a leading dimension N; shared: without,
        these come first."""
        def one(params, buffers, given):
            return functional_call(self.shape, (params, buffers), (what, *shared, *given))

        return vmap(one)(self.params, self.buffers, given)

    def rungs(self, prefix: Prefix) -> Tensor:
        """-> (N, L, B, Q, caption_dim)"""
        return self.each("rungs", shared=(self.mllm, prefix, self.n_layer))

    def losses(self, prefix: Prefix, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_t and v (N, B, C, h, w), t (N, B) -> the squared error of the velocity, (N, B)."""
        keys_values = self.each("keys_values", self.rungs(prefix))
        found = self.each("velocity", x_t, (1000 * t).float(), keys_values)
        return (found.float() - v).pow(2).flatten(2).mean(2)

    # ---- as a model that draws

    @property
    def ladder(self):
        return types.SimpleNamespace(queries=self.params["ladder.queries"])

    @property
    def dit(self):
        return types.SimpleNamespace(project_kv=lambda rungs: self.each("keys_values", rungs))

    @torch.no_grad()
    def conditioning(self, prompts: list[str]) -> tuple[Tensor, int]:
        """As `sample.encode_for_guidance`, for all models: rungs (N, L, 2 B, Q, caption_dim), those
        of the null prompt first; and 2, the rows that guidance compares."""
        distinct = read_prefix(self.mllm, ["", *prompts], self.config.max_prompt, self.n_layer)
        rungs = self.rungs(distinct)
        B = len(prompts)
        return rungs[:, :, [0] * B + list(range(1, B + 1))], 2

    def velocity(self, x_t: Tensor, t: Tensor, rungs: Tensor, keys_values: list) -> Tensor:
        """x_t (2 N B, C, h, w), which guidance sorts by row, then by model; t: the same for all.
        rungs and keys_values: those of `conditioning` -> velocity (2 N B, C, h, w)."""
        x = x_t.unflatten(0, (2, self.n, -1)).transpose(0, 1).flatten(1, 2)   # (N, 2 B, C, h, w)
        time = (1000 * t[:1]).float().to(x.device).expand(x.shape[:2])
        v = self.each("velocity", x, time, keys_values)
        return v.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
