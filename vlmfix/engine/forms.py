"""Forms in which the decoder runs within a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vlmfix.engine.compiling import Blocks
from vlmfix.hf.fusing import Fused
from vlmfix.hf.parts import Parts


@dataclass(frozen=True)
class Form:
    """One form.

    Args:
        name: in reports.
        around: the block in which the decoder has it.
        uncaptured: whether it serves where steps are not captured.
        gradients: whether gradients can run through it.
    """

    name: str
    around: Callable[[], contextlib.AbstractContextManager[None]]
    uncaptured: bool = True
    gradients: bool = True


COMPILED = "compiled"
"""Name of the form that a caller asks for; the others are chosen unasked."""

AS_IT_IS = Form("as it is", contextlib.nullcontext)


def forms(parts: Parts, compile: bool) -> tuple[Form, ...]:
    """Forms of a model, the preferred one first.

    Args:
        parts: the model.
        compile: whether its blocks may be compiled.
    """
    fused = Fused(parts)
    eager = Form("fused", fused.applied, uncaptured=False)
    if not compile:
        return (eager,)
    blocks = Blocks(parts)

    @contextlib.contextmanager
    def compiled() -> Iterator[None]:
        with fused.applied(products=True), blocks.compiled():
            yield

    return Form(COMPILED, compiled, gradients=False), eager
