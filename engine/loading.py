"""From the files of a folder to a model whose parameters have no memory yet (the meta device):
which tensor is kept in which dtype, and where it goes.

    tokenizer = read_tokenizer(file)         of Qwen's kind, or an error that says what it lacks
    files = prepare(model, folder, ...)      what is kept how: decided and checked by headers alone
    load_weights(model, files, device)       all numbers, one tensor at a time
                                             (low_memory.take_turns: part by part, when needed)
"""
import re

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import float16
from engine import int8 as eight_bits
from engine.device import usable
from engine.files import check_finite, check_readable, check_stored, read_tensors
from engine.limits import MAX_TOKENIZER_BYTES
from mllm import Tokenizer

# A byte-level tokenizer gives every text back unchanged: tried on Latin, Chinese and an emoji.
ANY_TEXT = "größe, 5 字 and 🦒"


def read_tokenizer(file) -> Tokenizer:
    """ValueError for what is no tokenizer, lacks one of the chat format's special tokens, or loses
    characters."""
    check_readable(file, MAX_TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer(file)
    except OSError:
        raise
    # The library raises nothing narrower.
    except Exception as e:
        raise ValueError(f"{file} is not a tokenizer: {str(e)[:200]}") from None
    special = tokenizer.special.items()
    lost = [name for name, id in special if tokenizer.encode(f"<|{name}|>") != [id]]
    if lost:
        raise ValueError(f"{file}: not a Qwen tokenizer, special tokens missing: {lost}")
    if tokenizer.decode(tokenizer.encode(ANY_TEXT)) != ANY_TEXT:
        raise ValueError(f"{file}: not byte-level, it loses characters of {ANY_TEXT!r}")
    return tokenizer


def belongs(name: str, parts) -> bool:
    """Is this tensor, or module, of one of the parts? These are names such as "dit", as regular
    expressions."""
    return any(re.match(rf"{part}\.", f"{name}.") for part in parts)


def check_learnable(model, parts) -> None:
    """ValueError where something that is to learn is in 8 bits."""
    for name, module in model.named_modules():
        if isinstance(module, eight_bits.Int8) and belongs(name, parts):
            raise ValueError(f"{name} is in 8 bits and cannot learn: start from a folder in "
                             "bfloat16 or float32, or leave it out (--train ladder)")


def prepare(model, folder, dtype: torch.dtype | dict | None, device, int8: bool) -> list:
    """Gives every parameter the dtype that it is kept in; int8: layers in 8 bits (a folder may hold
    such layers already) -> the folder's weight files. dtype: default the model's own, on a GPU what
    it can do; or one for some of the parts, {"dit": torch.float32}.

    ValueError where the files lack a tensor, or have one that the model does not, or another shape.
    """
    eight_bits.enable(model, eight_bits.stored_layers(folder))
    files = check_stored(model, folder)
    if int8:
        eight_bits.enable(model)
    own = getattr(torch, model.config.dtype)
    of_part = dtype if isinstance(dtype, dict) else {}
    default = own if of_part else dtype or usable(own, device)
    for name, p in model.named_parameters():
        special = [d for part, d in of_part.items() if belongs(name, [part])]
        p.data = p.data.to(special[0] if special else default)
    # What trains decides by itself what it computes in.
    if default == torch.float16 and not of_part:
        float16.enable(model)
    return files


def put(model, name: str, tensor: Tensor, device, file, copy: bool = True) -> None:
    """Puts a stored tensor into its place on `device`, in the dtype of what stands there.
    ValueError for values that are not finite. copy: on a CPU, False leaves a view of the mapped
    file where the dtype is the stored one."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, eight_bits.Int8):
        int8, scale = eight_bits.quantize(check_finite(tensor.to(device), file, name))
        module.int8, module.scale = int8, scale
        return
    old = getattr(module, leaf)
    new = tensor.to(device, old.dtype)
    if copy and new.data_ptr() == tensor.data_ptr():
        # The copy lets go of the mapped file.
        new = new.clone()
    check_finite(new, file, name)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, leaf, new)


def load_weights(model, files: list, device) -> None:
    """All weights, one tensor at a time, straight to the device."""
    n = sum(file.stat().st_size for file in files)
    with tqdm(total=n, desc="load", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for file in files:
            for name, tensor in read_tensors(file, device):
                put(model, name, tensor, device, file)
                bar.update(tensor.nbytes)
