"""How an answer is compared with what was recorded, and what is said where it differs.

recorded.safetensors holds, for each problem, what goes in, what must come out, and what comes out
of common mistakes: an answer that equals one of those is called by its name.
"""
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

RECORDED = pathlib.Path(__file__).parent / "recorded.safetensors"
# Of the largest number expected. What another order of the sums changes is a tenth of this.
TOLERANCE = 2e-5


# Kinds of numbers that an answer must have; any float will do for a float32.
DTYPES = {torch.bool: "True and False (bool)", torch.int64: "whole numbers (int64)",
          torch.float64: "float64"}


class Wrong(AssertionError):
    """An answer is not right. The message is for the student, so no traceback goes with it."""


class OwnAttention(TorchFunctionMode):
    """While it is entered, PyTorch's own attention is refused, however it was imported."""
    others = {F.scaled_dot_product_attention, F.multi_head_attention_forward}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.others:
            raise Wrong(f"{function.__name__} was called: attention is what you write here "
                        "(handout.md, What is allowed).")
        return function(*args, **(kwargs or {}))


@dataclass
class Case:
    """What was recorded of one problem. Weights stand in a dict of their own in `inputs`; a
    mistake has what comes out of it, as `outputs` have what is right."""
    name: str
    inputs: dict[str, Tensor | dict[str, Tensor]]
    outputs: dict[str, Tensor]
    mistakes: dict[str, dict[str, Tensor]]


def recorded(name: str) -> Case:
    """Read anew each time, so that no answer can spoil it for another. Names in the file are
    "problem/in/x", "problem/in/weights/q.bias", "problem/out/y", "problem/wrong/no_relu/y"."""
    case = Case(name, {}, {}, {})
    for key, tensor in load_file(RECORDED).items():
        problem, kind, *rest = key.split("/")
        if problem != name:
            continue
        place = {"in": case.inputs, "out": case.outputs, "wrong": case.mistakes}[kind]
        for inner in rest[:-1]:
            place = place.setdefault(inner, {})
        place[rest[-1]] = tensor
    return case


def worth(points: int) -> Callable:
    """Marks a test `test_1a_what` as problem 1a with these points."""
    return pytest.mark.problem(points)


def problem(points: int, **mistakes: str) -> Callable:
    """The test of a problem whose outputs are recorded. It decorates a function of the adapters and
    the recorded inputs that gives the outputs by name. mistakes: what to say of each recorded
    mistake."""
    def decorate(answer: Callable) -> Callable:
        name = answer.__name__.removeprefix("test_")

        @worth(points)
        def test(adapters):
            __tracebackhide__ = True
            case, before = recorded(name), recorded(name).inputs
            answers = answer(adapters, case.inputs)
            check_untouched(case.name, case.inputs, before)
            compare(answers, case, mistakes)

        # Not functools.wraps: pytest would look for the fixtures of what is wrapped.
        test.__name__ = answer.__name__
        test.answer = answer
        test.mistakes = mistakes
        return test

    return decorate


def compare(answers: dict, case: Case, mistakes: dict[str, str]) -> None:
    """Wrong for the first output, in the order of `answers`, that is not the recorded one."""
    __tracebackhide__ = True
    mine = {output: as_tensor(value, f"{title(case.name)}, {output}", case.outputs[output])
            for output, value in answers.items()}
    for output, answer in mine.items():
        what, right = f"{title(case.name)}, {output}", case.outputs[output]
        if not close(answer, right):
            made = which(mine, case.mistakes) or which({output: answer}, case.mistakes)
            raise Wrong(message(what, answer, right, [mistakes[name] for name in made]))
        if right.dtype in DTYPES and answer.dtype != right.dtype:
            raise Wrong(f"{what}: not right.\n  The values are, but they should be "
                        f"{DTYPES[right.dtype]}. Yours are {answer.dtype}.")


def title(name: str) -> str:
    """1a_flow_matching -> 1a flow_matching"""
    return name.replace("_", " ", 1)


def check_untouched(name: str, inputs: dict, before: dict) -> None:
    """Wrong where an answer was written into what it was given."""
    __tracebackhide__ = True
    for key, value in inputs.items():
        if isinstance(value, dict):
            check_untouched(name, value, before[key])
        elif not torch.equal(value, before[key]):
            raise Wrong(f"{title(name)}: `{key}`, which it is given, is not what it was: it was "
                        "changed in place. Make a new tensor.")


def two(value, what: str, names: str) -> tuple[Tensor, Tensor]:
    """Two tensors that an answer gives, before they are unpacked."""
    __tracebackhide__ = True
    if isinstance(value, list | tuple) and [isinstance(t, Tensor) for t in value] == [True, True]:
        return tuple(value)
    hint = " Is there a `return`?" if value is None else ""
    raise Wrong(f"{what}: expected two tensors, {names}; got {type(value).__name__}"
                f"{length(value)}.{hint}")


def check_times(time, x: Tensor, what: str) -> None:
    """For what the network is fed."""
    __tracebackhide__ = True
    if not isinstance(time, Tensor) or time.shape != x.shape[:1]:
        raise Wrong(f"{what}: the network is fed a tensor of times, one for each row, (B,).")


def length(value) -> str:
    return f" of {len(value)}" if isinstance(value, list | tuple) else ""


def check_shape(tensor: Tensor, shape: tuple, what: str) -> None:
    """For what is handed on to another function before it is compared."""
    __tracebackhide__ = True
    if tuple(tensor.shape) != shape:
        lines = f"{what}: not right.", looks_like(tensor, torch.empty(shape))
        raise Wrong("\n  ".join(lines))


def which(mine: dict[str, Tensor], mistakes: dict) -> list[str]:
    """The mistakes that give exactly these outputs."""
    return [name for name, wrong in mistakes.items()
            if all(close(mine[output], wrong[output]) for output in mine)]


def as_tensor(value, what: str, right: Tensor) -> Tensor:
    if isinstance(value, list | tuple | int | float):
        value = torch.tensor(value, dtype=torch.float64 if right.dtype == torch.float64 else None)
    if not isinstance(value, Tensor):
        hint = " Is there a `return`?" if value is None else ""
        shape = f"a tensor of shape {tuple(right.shape)}"
        raise Wrong(f"{what}: expected {shape}, got {type(value).__name__}.{hint}")
    return value.detach()


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    """The same shape, and every number within `tolerance` of the largest one of b. What is not
    finite must be so at the same places."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return False
    a, b = a[finite], b[finite]
    return not len(b) or bool((a - b).abs().max() <= tolerance * b.abs().max())


def message(what: str, mine: Tensor, right: Tensor, said: list[str]) -> str:
    """What is wrong: by its name, where it is one of the known mistakes, else by how it looks."""
    lines = [f"{what}: not right.", *(said or [looks_like(mine, right)])]
    if mine.shape == right.shape:
        lines.append(largest_difference(mine, right))
    return "\n  ".join(lines)


def looks_like(mine: Tensor, right: Tensor) -> str:
    """What can be said of a wrong answer without knowing how it was made."""
    if mine.shape != right.shape:
        text = f"Its shape is {tuple(mine.shape)}, expected {tuple(right.shape)}."
        if sorted(mine.shape) == sorted(right.shape):
            text += " The same axes in another order: is a transpose missing?"
        return text
    if not mine.isfinite().all():
        return "It has numbers that are not finite: something is divided by 0, or log(0) is taken."
    a, b = mine.double().flatten(), right.double().flatten()
    factor = (a @ b / (b @ b)).item()
    if close(a, factor * b):
        if abs(factor + 1) < TOLERANCE:
            return "It is the negative of what is expected."
        return f"It is {factor:.6g} times what is expected, everywhere."
    if close(a.sort().values, b.sort().values):
        return "The right numbers, in another order: is an axis transposed, or split wrongly?"
    return "No mistake that is known here gives these numbers. Compare with the handout."


def largest_difference(mine: Tensor, right: Tensor) -> str:
    difference = (mine.double() - right.double()).abs().nan_to_num(torch.inf)
    place = torch.unravel_index(difference.argmax(), difference.shape)
    where = [int(i) for i in place]
    at = f"At {where} expected" if where else "Expected"
    return f"{at} {right[place].item():.6g}, got {mine[place].item():.6g}."
