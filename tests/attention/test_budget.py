"""What a mitigated run may not do: build an attention matrix, or wait for the device at every step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlmfix.attention import run

from ..duties import lab
from ..duties.table import TABLE
from ..families import build

METHODS = [pair.values[1] for pair in lab.pairs("full", capability="greedy") if pair.values[0] == "llava"]
LONG = 400
"""Prompt tokens; LONG squared is more than any activation of the tiny model holds."""

WAITING = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


class Watch(TorchDispatchMode):
    """Notes float results of some size, and operations that need a value on the host."""

    def __init__(self, least=None):
        super().__init__()
        self.least, self.floats, self.waited = least, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING:
            self.waited.append(name)
        for result in out if self.least and isinstance(out, tuple | list) else (out,):
            if self.least and isinstance(result, torch.Tensor) and result.is_floating_point():
                size = result.untyped_storage().nbytes() // result.element_size()
                if size >= self.least:
                    self.floats.append((size, name, tuple(result.shape)))
        return out


def matrices(model, run):
    """Float results of at least rows * Q * Q elements in a prefill of Q tokens: operations and shapes."""
    prefills = []

    def enter(module, args, kwargs):
        entry = kwargs.get("inputs_embeds")
        prefills.append(entry.shape[:2])

    hook = model.get_decoder().register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with Watch(LONG**2) as watch:
            run()
    finally:
        hook.remove()
    rows, length = max(prefills, key=lambda shape: shape[0] * shape[1] ** 2)
    large = [(name, shape) for size, name, shape in watch.floats if size >= rows * length**2]
    return {(name, tuple("Q" if n == length else n for n in shape)) for name, shape in large}


@pytest.fixture(scope="module")
def plain():
    """What the plain model builds: the masks of unpadded and of padded rows."""
    tiny = build("llava")
    found = set()
    for rows in ((1,), (1, 0)):
        inputs = tiny.inputs(rows, text_length=LONG)
        found |= matrices(tiny.model, lambda: tiny.model.generate(**inputs, max_new_tokens=1))  # noqa: B023
    return found


@pytest.mark.parametrize("method", METHODS)
def test_no_attention_matrix_is_built(method, plain):
    """No float tensor of Q * K elements per row, not even for all heads together, beyond those of the plain model."""
    tiny, fixed = lab.under("llava"), lab.vlm("llava", TABLE[method].full)
    inputs = tiny.inputs((1,), text_length=LONG)
    assert matrices(tiny.model, lambda: fixed.generate(**inputs, max_new_tokens=1)) - plain == set()


def test_the_watch_sees_an_attention_matrix():
    with Watch(100) as watch:
        x = torch.randn(10, 4)
        (x @ x.T).softmax(-1)
    assert {name for _, name, _ in watch.floats} == {"mm", "_softmax"}


def steps(model, run):
    """Operations that waited for a value in the forwards after the prefill."""
    counts, watches = [], []

    def enter(module, args, kwargs):
        watches.append(Watch())
        watches[-1].__enter__()

    def leave(module, args, kwargs, output):
        watch = watches.pop()
        watch.__exit__(None, None, None)
        counts.append(list(watch.waited))

    hooks = [
        model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        model.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return counts[-3:]


@pytest.mark.parametrize("rows", [(1,), (2, 1, 0)], ids=["one row", "padded"])
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_device(method, rows):
    """Beyond what transformers' own forward does; the hooks of the recipe run inside the watch."""
    tiny, fixed = build("llava"), lab.vlm("llava", TABLE[method].full)
    inputs = tiny.inputs(rows)
    padded = tiny.inputs((2, 1, 0)) if branches_are_padded(fixed, inputs) else inputs
    plain = steps(tiny.model, lambda: tiny.model.generate(**padded, max_new_tokens=4, do_sample=False))
    ours = steps(lab.under("llava").model, lambda: fixed.generate(**inputs, max_new_tokens=4))
    assert ours == plain


def branches_are_padded(fixed, inputs):
    """Whether the joint prompt has padding; transformers' mask functions ask the device about it at every step."""
    request, _ = run.open_request(fixed.parts, fixed.compiled, inputs)
    joint = request._late.joint if request._late is not None else request._branches and request._branches.joint
    return joint is not None and not bool(joint.mask.all())
