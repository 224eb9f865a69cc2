"""Measures of a finished sequence equal those of eager attention and its gradient."""

import pytest
import torch

from tests import families
from tests.decoders.running import generate
from vlmfix.diagnostics import flow, measures, offline
from vlmfix.errors import Refusal


def finished(tiny, rows, new=3):
    inputs = tiny.inputs(rows)
    tokens = generate(tiny, "greedy", inputs, new=new).sequences[:, inputs["input_ids"].shape[1] :]
    return inputs, tokens


def eager(tiny, inputs, tokens):
    """Attention weights by layer with their graph, and logits."""
    steps = tokens.shape[1]
    pad = torch.nn.functional.pad
    whole = {k: pad(v, (0, steps)) if k.endswith("token_type_ids") else v for k, v in inputs.items()}
    whole["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    whole["attention_mask"] = pad(inputs["attention_mask"], (0, steps), value=1)
    tiny.model.set_attn_implementation("eager")
    return tiny.model(**whole, output_attentions=True, use_cache=False)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_flow_equals_that_of_whole_matrices(family):
    tiny = families.build(family, fresh=True)
    inputs, tokens = finished(tiny, [1, 2])
    length = inputs["input_ids"].shape[1]
    rolled = offline.rollout(tiny.model, inputs, tokens, step=1)
    later = offline.rollout(tiny.model, inputs, tokens, step=1, start=2)
    relied = offline.relevance(tiny.model, inputs, tokens, step=1)
    out = eager(tiny, inputs, tokens)
    weights = list(out.attentions)
    means = [w.detach().mean(1) for w in weights]
    real = inputs["attention_mask"].bool()
    for got, start in ((rolled, 0), (later, 2)):
        want = flow.rollout_row(means, length, start)[:, :length]
        torch.testing.assert_close(got[real], want[real], atol=2e-6, rtol=1e-4)
    chosen = out.logits[:, length].gather(1, tokens[:, 1:2]).sum()
    slopes = torch.autograd.grad(chosen, weights)
    want = flow.relevance([w.detach() for w in weights], slopes)[:, length, :length]
    torch.testing.assert_close(relied[real], want[real], atol=1e-4, rtol=1e-3)
    assert relied[~real].abs().max() == 0


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_5"])
def test_divergence_of_a_prompt_without_pictures_is_undefined_and_else_positive(family):
    tiny = families.build(family)
    inputs, tokens = finished(tiny, list(tiny.rows))
    found = offline.vision_divergence(tiny.model, inputs, tokens)
    with_pictures = torch.tensor(tiny.rows) > 0
    assert found[:, ~with_pictures].isnan().all()
    assert (found[:, with_pictures] >= 0).all()
    assert measures.t_vhd(found, top=2).shape == (3, len(tiny.rows))


def test_families_whose_sequence_is_not_whole_are_refused():
    tiny = families.build("instructblip")
    inputs = tiny.inputs([1])
    with pytest.raises(Refusal, match="instructblip"):
        offline.rollout(tiny.model, inputs, torch.ones(1, 2, dtype=torch.long))
