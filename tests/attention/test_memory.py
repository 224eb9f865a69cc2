"""What a prefill keeps while it runs."""

import pytest

import vlmfix
from vlmfix.attention.layers import Layers

from ..duties.table import TABLE
from ..families import build


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=["whole", "chunks"])
def test_states_that_a_method_reads_are_kept_for_one_layer_at_a_time(options, monkeypatch):
    tiny = build("llava", fresh=True)
    kept = []
    observe = Layers.observe

    def observing(layers, layer, hidden):
        observe(layers, layer, hidden)
        kept.append(len(layers._hidden))

    monkeypatch.setattr(Layers, "observe", observing)
    with vlmfix.wrap(tiny.model, None, TABLE["var"].full, engine="hf") as vlm:
        vlm.generate(**tiny.inputs((1, 2)), max_new_tokens=2, **options)
        assert vlm.report["methods"]["var"]
    assert max(kept) == 1
