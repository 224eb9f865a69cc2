"""Factor rules in two forms: PyTorch, the definition, and a Triton function inlined in grouped attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmfix.kernels.rules.reference import POOLED, RULES


@dataclass(frozen=True)
class FusedRule:
    """A factor rule by name, usable as `Plan.rule`: called it runs in PyTorch; the kernels inline its Triton form.

    Args:
        name: key of `vlmfix.kernels.rules.reference.RULES`.
        arguments: [B, n] float32, the rule's numbers for each row.

    Raises:
        KeyError: no rule of that name.
    """

    name: str
    arguments: Tensor

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise KeyError(f"no factor rule {self.name!r}; known: {', '.join(sorted(RULES))}")

    def __call__(self, masses: Tensor) -> Tensor:
        """Factors [B, H, Q, G] of masses [B, H, Q, G]."""
        return RULES[self.name](masses, self.arguments)

    @property
    def fused(self) -> FusedRule:
        """Itself: any rule with such an attribute is inlined by the kernels."""
        return self

    @property
    def pools_heads(self) -> bool:
        """Whether the rule needs the masses of all heads at once."""
        return self.name in POOLED


def fused_form(rule: object) -> FusedRule | None:
    """The fused form of a rule that has one, as its attribute `fused`."""
    fused = getattr(rule, "fused", None)
    return fused if isinstance(fused, FusedRule) else None
