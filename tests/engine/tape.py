"""A stand-in for CUDA graphs on a CPU: operations are recorded once and run again over the same addresses."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "lift_fresh", "_unique2", "is_nonzero")
"""Operations that read a value on the host, size their output by values, or bring a tensor from the host."""


class WaitError(RuntimeError):
    """An operation that no graph can hold."""


class Tape(TorchDispatchMode):
    """Records operations while it is entered.

    A replay repeats none of the Python in between, as a CUDA graph does: outputs go where they went before, and what
    Python worked out at recording stays as it was.
    """

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise WaitError(name)
        if name == "_to_copy" and torch.device(kwargs.get("device") or args[0].device) != args[0].device:
            raise WaitError("copy between devices")
        out = func(*args, **kwargs)
        taken = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        fresh = [t.untyped_storage().data_ptr() not in taken for t in outs]
        writes = func._schema.is_mutable
        if writes or any(fresh):
            self.steps.append((func, args, kwargs, outs, fresh, writes))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, outs, fresh, _ in self.steps:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for old, new, own in zip(outs, again, fresh, strict=True):
                if own and old.numel():
                    old.copy_(new)


def record(step, restore, device):
    """What `vlmfix.engine.sessions.cuda_graph` does, on a CPU."""
    step()
    restore()
    with Tape() as tape:
        step()
    restore()
    return tape.replay
