"""LCD's vectors: the arithmetic of the released processor, and which tokens its language model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from vlmfix.decoders import lcd
from vlmfix.decoders.lcd import LCD
from vlmfix.layout import Kind
from vlmfix.method import Step
from vlmfix.view import RowText
from vlmfix.views.text import WithoutPictures

from .. import mutants
from ..cases import ATTENTION, close, same

MUTANTS = {
    **mutants.of_decoding(LCD, dropping={"step shifted"}),
    "plausible set dropped": lambda patch: patch.setattr(lcd, "keep", lambda scores, allowed: scores),
    "entropy in bits": lambda patch: patch.setattr(lcd, "text_weight", _in_bits(lcd.text_weight)),
}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    method, step = LCD(**case["hyper"], variant="reference"), Step(1, (arrays["logits_lm"],), (), _no_early)
    close(method.scores(arrays["logits"], step), arrays["scores"], ATTENTION, "scores", rtol=1e-5)
    missing = arrays["logits"].shape[1] - arrays["logits_lm"].shape[1]
    if missing == 0 and float(arrays["lm_entropy"].min()) > lcd.LEAST_ENTROPY:
        ours = LCD(**case["hyper"]).scores(arrays["logits"], step)
        close(ours, arrays["scores"], ATTENTION, "scores of the paper's variant", rtol=1e-5)
    if case["arch"] == "llava":  # the other architectures hand the processor the answer alone
        for row, read in zip(arrays["sequence"].tolist(), arrays["lm_input"].tolist(), strict=True):
            kinds = [Kind.VISUAL if token == case["image_token_id"] else Kind.QUERY for token in row]
            kept = WithoutPictures().text(RowText(row, kinds, [False] * len(row)))
            same([row[i] for i in kept if isinstance(i, int)], read, "tokens the language model reads")


def _no_early(norm: bool) -> Tensor:
    raise AssertionError("not asked for")


def _in_bits(original: Any) -> Any:
    return lambda text, alpha, floor: original(text, alpha, floor) * 0.6931
