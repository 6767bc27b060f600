"""Many models trained as one: of the same shapes, with a leading dimension and torch.func.vmap.

They may differ in weights, in noise and in wiring, and learn from the same examples. So what does
not depend on what learns is done once for all of them: the examples, their latents, and what the
frozen MLLM reads before the queries.

    prompts  -> read_prefix: keys and values of every layer, once              (B, G, S, K)
    queries  -> Stack.states: of all models in one batch, behind that prefix   (N, T, B, Q, M)
    states   -> Learner.rungs: A, connector                                    (N, L, B, Q, caption)
    rungs    -> DiT.project_kv -> DiT.forward                                  (N, B, C, h, w)

The numbers are those of single models but for rounding (tests/test_5_stacked.py).

Dimension key: N models, B rows, S tokens of the prompt, Q queries, M MLLM width, L rungs, T states,
G key heads, K head dim, C latent channels, h x w latent size; caption: caption_dim.
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

    def rows(self, index: Tensor) -> "Prefix":
        """Those of some prompts, in this order."""
        layers = {i: (k[index], v[index]) for i, (k, v) in self.layers.items()}
        return Prefix(layers, self.positions[:, index], self.attention_mask[index])

    def repeated(self, n: int) -> "Prefix":
        """The same rows n times, one after the other."""
        layers = {i: (k.repeat(n, 1, 1, 1), v.repeat(n, 1, 1, 1))
                  for i, (k, v) in self.layers.items()}
        return Prefix(layers, self.positions.repeat(1, n, 1), self.attention_mask.repeat(n, 1))

    def tensors(self) -> list[Tensor]:
        both = [t for pair in self.layers.values() for t in pair]
        return [*both, self.positions, self.attention_mask]


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
    order = [distinct[prompt] for prompt in prompts]
    return read.rows(torch.tensor(order, device=batch.ids.device))


def query_states(mllm: MLLM, prefix: Prefix, queries: Tensor, n_layer: int | None) -> list[Tensor]:
    """queries (B, Q, M), those of each row -> their states behind its prompt, at every depth
    (B, Q, M)."""
    B, Q = queries.shape[:2]
    x = queries.to(mllm.embed_tokens.weight.dtype)
    after = prefix.positions[:, :, -1:] + torch.arange(1, Q + 1, device=x.device)
    mask = torch.cat([prefix.attention_mask, prefix.attention_mask.new_ones(B, Q)], 1)
    cache = PrefixCache()
    cache.layers = dict(prefix.layers)
    cache.complete = True
    return mllm(x, after, mask, cache, n_layer)


# ------------------------------------------------------------------------------------ one model

class Product(nn.Module):
    """An nn.Linear, or a 1 x 1 nn.Conv2d, as one product of two matrices. Of N models that is one
    batch of N products. As they are, `vmap` repeats the weights for every row of a batch that is
    not contiguous (256 rows: 40 times the memory), and makes convolutions of N groups."""

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

    def __init__(self, ladder: Ladder, dit: DiT):
        super().__init__()
        self.ladder = ladder
        self.dit = dit
        learnt = isinstance(ladder.routes, nn.Parameter)
        self.register_buffer("A", None if learnt else ladder.matrix())              # (L, T)
        if not learnt:
            ladder.routes = None
        use_products(self)

    def forward(self, what: str, *given):
        """`functional_call` knows this method only."""
        return getattr(self, what)(*given)

    def rungs(self, states: Tensor) -> Tensor:
        """states (T, B, Q, M) -> (L, B, Q, caption_dim), as by Ladder.forward"""
        A = self.ladder.matrix() if self.A is None else self.A[:, :len(states)]
        tapped = torch.einsum("lt,tbqm->lbqm", A, states.float())
        return self.ladder.connector(tapped.to(self.dit.proj_out.weight.dtype))

    def keys_values(self, rungs: Tensor) -> list[tuple[Tensor, Tensor]]:
        return self.dit.project_kv(rungs)

    def velocity(self, x_t: Tensor, timestep: Tensor, keys_values: list) -> Tensor:
        return self.dit(x_t.to(self.dit.proj_out.weight.dtype), timestep, keys_values)

    def losses(self, states: Tensor, x_t: Tensor, timestep: Tensor, v: Tensor) -> Tensor:
        """The squared error of the velocity, (B,)."""
        found = self.velocity(x_t, timestep, self.keys_values(self.rungs(states)))
        return (found.float() - v).pow(2).flatten(1).mean(1)


# -------------------------------------------------------------------------------- a stack of them

def signature(learner: Learner) -> tuple:
    """Equal for models that one stack can hold."""
    parameters = tuple((name, p.shape) for name, p in learner.named_parameters())
    return parameters, tuple(name for name, _ in learner.named_buffers())


def map_tensors(f, nested):
    """f of every tensor in nested dicts, lists and tuples -> the same with its results."""
    if isinstance(nested, Tensor):
        return f(nested)
    if isinstance(nested, dict):
        return {name: map_tensors(f, inner) for name, inner in nested.items()}
    return type(nested)(map_tensors(f, inner) for inner in nested)


class Stack:
    """N models of one signature. params: {name: (N, ...)}, which learn.

    To `sample.denoise` it looks like a model that draws N * B pictures, model by model.
    """

    def __init__(self, config, mllm: MLLM, learners: list[Learner]):
        params, buffers = stack_module_state(learners)
        self.params = {name: nn.Parameter(p.detach()) for name, p in params.items()}
        self.buffers = buffers
        self.n = len(learners)
        # Only the layers below the last state that one of them taps.
        self.n_layer = max(max(learner.ladder.taps) for learner in learners)
        self.config = config
        self.mllm = mllm
        self.shape = copy.deepcopy(learners[0]).to("meta")
        self.captured = None

    def each(self, what: str, *given, params: dict | None = None):
        """A method of Learner for all models; given: tensors with a leading dimension N."""
        def one(params, buffers, given):
            return functional_call(self.shape, (params, buffers), (what, *given))

        all_given = (params or self.params, self.buffers, given)
        if self.n > 1:
            return vmap(one)(*all_given)
        # A model by itself: on a CPU `vmap` takes a tenth longer.
        alone = map_tensors(lambda tensor: tensor.squeeze(0), all_given)
        return map_tensors(lambda tensor: tensor[None], one(*alone))

    def states(self, prefix: Prefix) -> Tensor:
        """-> (N, T, B, Q, M). The MLLM is the same for all: its batch has N * B rows."""
        B = len(prefix.attention_mask)
        queries = self.params["ladder.queries"].repeat_interleave(B, 0)    # (N * B, Q, M)
        states = query_states(self.mllm, prefix.repeated(self.n), queries, self.n_layer)
        return torch.stack(states).unflatten(1, (self.n, B)).transpose(0, 1)

    def losses(self, prefix: Prefix, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_t and v (N, B, C, h, w), t (N, B) -> the squared error of the velocity, (N, B)."""
        given = (self.states(prefix), x_t, (1000 * t).float(), v)
        if self.captured is None:
            return self.each("losses", *given)
        return self.captured(*self.after_states().values(), *given)

    def after_states(self) -> dict[str, nn.Parameter]:
        """The parameters on which what follows the states depends."""
        return {name: p for name, p in self.params.items() if name != "ladder.queries"}

    def capture(self, prefix: Prefix, x_t: Tensor, t: Tensor, v: Tensor) -> None:
        """For a GPU: records what follows the states, forward and backward, as a CUDA graph. Its
        two thousand small kernels take longer to be asked for, one by one, than to run. From now on
        `losses` wants as many rows as here; the prefix may have any length."""
        names = list(self.after_states())

        def losses(*tensors):
            params = dict(zip(names, tensors))
            return self.each("losses", *tensors[len(names):], params=params)

        # Copies: what it is called with is copied into them. The parameters themselves may get
        # other memory from step to step (engine/state.py:MasterWeights).
        learnt = [*self.after_states().values(), self.states(prefix)]
        learnt = [tensor.detach().clone().requires_grad_() for tensor in learnt]
        given = [tensor.clone() for tensor in (x_t, (1000 * t).float(), v)]
        self.captured = torch.cuda.make_graphed_callables(losses, (*learnt, *given))

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
        prefix = read_prefix(self.mllm, ["", *prompts], self.config.max_prompt, self.n_layer)
        rungs = self.each("rungs", self.states(prefix))
        B = len(prompts)
        return rungs[:, :, [0] * B + list(range(1, B + 1))], 2

    def velocity(self, x_t: Tensor, t: Tensor, rungs: Tensor, keys_values: list) -> Tensor:
        """x_t (2 N B, C, h, w), which guidance sorts by row, then by model; t: the same for all.
        rungs and keys_values: those of `conditioning` -> velocity (2 N B, C, h, w)."""
        x = x_t.unflatten(0, (2, self.n, -1)).transpose(0, 1).flatten(1, 2)   # (N, 2 B, C, h, w)
        timestep = (1000 * t[:1]).float().to(x.device).expand(x.shape[:2])
        v = self.each("velocity", x, timestep, keys_values)
        return v.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
