"""Which layer is the first to give other numbers? For those who change something.

    python -m bench.first_difference --record before.safetensors      then change the code, and
    python -m bench.first_difference --against before.safetensors

All layers of the plain path are compared, in the order in which they run: encoding a picture and a
prompt, two steps of a sampler with guidance, an edit's conditioning, decoding. Recorded are up to
4096 values of each output, evenly spaced. On one machine, the same code with the same number of
threads gives the same bits. Two precisions, or a CPU and a GPU, are compared in the same way:

    python -m bench.first_difference --record float32.safetensors
    python -m bench.first_difference --against float32.safetensors --dtype bfloat16 --above 0.05
"""
import pathlib

import torch
from safetensors.torch import load_file, save_file

import sample
from bench.work import CAPTION, ORDER, distance, picture
from engine.command import Parser
from engine.pictures import to_pixels
from sample import TOY_FOLDER
from tbac import TBAC

N_VALUES = 4096


# ------------------------------------------------------------------------------------ the trace

def tensors_in(output):
    """The floating-point tensors of what a layer returns."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, list | tuple):
        return [t for item in output for t in tensors_in(item)]
    return []


def some_values(t, n=N_VALUES):
    """n values of a tensor, evenly spaced, or all if it has fewer."""
    t = t.detach().flatten()
    step = max(1, len(t) // n)
    return t[::step][:n].float().cpu().clone()


class Trace:
    """Within `with`: values {"00012 dit.blocks.0.attn": the output of a layer}, numbered from 0 in
    the order of the calls. Of several outputs the last."""

    def __init__(self, model):
        self.model = model
        self.values = {}

    def __enter__(self):
        self.handles = []
        for name, module in self.model.named_modules():
            hook = self.hook(name or "whole")
            self.handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def hook(self, name):
        def keep(module, args, output):
            for t in tensors_in(output)[-1:]:
                self.add(name, t)
        return keep

    def add(self, name, t):
        self.values[f"{len(self.values):05d} {name}"] = some_values(t)


@torch.no_grad()
def trace(model, steps=2):
    """Every part of the model once -> {call: values}, in the order of the calls."""
    device, dtype = model.ladder.queries.device, model.ladder.queries.dtype
    size = model.config.size
    image = picture(size)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(1, *sample.latent_shape(model.config), generator=generator)
    with Trace(model) as found:
        found.add("latents of a picture", model.dcae.encode(to_pixels([image], device, dtype)))
        for name, order, images in (("picture", CAPTION, None), ("edit", ORDER, [[image]])):
            for i, state in enumerate(model.query_states([order], images)):
                found.add(f"{name}: state {i}", state)
            for step in sample.denoise(model, [order], images, steps=steps, eps=eps):
                found.add(f"{name}: latents after step {step.i + 1}", step.x_t)
        found.add("pixels", model.dcae.decode(step.x_t.to(dtype)))
    return found.values


# ------------------------------------------------------------------------------- the comparison

def differences(found, recorded):
    """Yields (call, relative error). ValueError where not the same layers ran, or with other
    shapes."""
    # A file does not keep their order; their numbers do.
    for mine, theirs in zip(sorted(found), sorted(recorded)):
        if mine != theirs or found[mine].shape != recorded[theirs].shape:
            raise ValueError(f"call {mine} {tuple(found[mine].shape)} was {theirs} "
                             f"{tuple(recorded[theirs].shape)}: other layers run than were "
                             "recorded, or a layer has another size")
        yield mine, distance(found[mine], recorded[theirs])
    if len(found) != len(recorded):
        raise ValueError(f"{len(found)} calls of layers, {len(recorded)} were recorded")


def report(found, recorded, above):
    """Prints the first call with a larger difference, those that follow it, and the results."""
    rows = list(differences(found, recorded))
    wrong = [(call, error) for call, error in rows if not error <= above]
    if wrong:
        print(f"first difference above {above:g}, of {len(rows)} calls of layers:")
        for call, error in wrong[:5]:
            print(f"  {call}: {error:.1e}")
    else:
        print(f"no difference above {above:g} in {len(rows)} calls of layers")
    print("at the ends:")
    for call, error in rows:
        if call.endswith(("latents of a picture", "pixels")) or ": " in call:
            print(f"  {call}: {error:.1e}")
    return bool(wrong)


def options(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--model", type=pathlib.Path, default=TOY_FOLDER,
                   help="a model folder (default: the toy)")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--above", type=float, default=0.0, help="relative errors up to this are none")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=pathlib.Path, metavar="FILE", help="write what is found")
    what.add_argument("--against", type=pathlib.Path, metavar="FILE",
                      help="compare with what was recorded; status 1 where it differs")
    return p.parse_args(argv)


def main(args=None):
    args = args or options()
    try:
        model = TBAC.load(args.model, args.device, getattr(torch, args.dtype))
        found = trace(model)
        if args.record:
            save_file(found, args.record)
            print(f"wrote {len(found)} calls of layers to {args.record}")
        elif report(found, load_file(args.against), args.above):
            raise SystemExit(1)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
