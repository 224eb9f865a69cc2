"""Contrastive methods run on every family whose row allows branches, and are refused by name on the others."""

import pytest
import torch

import vlmfix
from vlmfix.api import wrap
from vlmfix.hf.families import CROSSING, UNBRANCHED
from vlmfix.hf.families import FAMILIES as TABLE

from ..families import FAMILIES, build

RECIPES = {
    "vcd": "vcd(alpha=0.5,beta=0)",
    "m3id": "m3id(beta=0,forget_rate=0.05)",
    "icd": "icd(alpha=0.5,beta=0,disturbance_ids=(40,41,42))",
    "avisc": "avisc(alpha=0.5,beta=0)",
}
WHOLE_PICTURES = ("chameleon",)
"""Families whose decoder reads pictures itself, so that a branch that waits for the prefill cannot be wiped."""


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_run_where_the_table_says_so(family):
    tiny = build(family, fresh=True)
    inputs = tiny.inputs([1, 1], text_length=5)
    options = {"max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    plain = torch.stack(tiny.model.generate(**inputs, **options).logits)
    for name, recipe in RECIPES.items():
        refused = family in UNBRANCHED or (name == "avisc" and family in (*CROSSING, *WHOLE_PICTURES))
        assert (family in UNBRANCHED) == TABLE[family].branches.startswith("no")
        if refused:
            with pytest.raises(vlmfix.Refusal, match=family):
                wrap(tiny.model, None, recipe).generate(**inputs, **options)
            continue
        with wrap(tiny.model, None, recipe) as fixed:
            got = torch.stack(fixed.generate(**inputs, **options).logits)
            assert fixed.report["branches"] == 1, name
            assert fixed.report["methods"][name]["rows"] == 2, name
        assert got.isfinite().any(-1).all()
        moved = (got.log_softmax(-1) - plain.log_softmax(-1))[0]
        assert moved[moved.isfinite()].abs().max() > 1e-3, name
