"""The registered attention function: the model's own attention, except on the rows that plans change."""

from types import SimpleNamespace

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlmfix
from vlmfix.hf import attend
from vlmfix.plan import Plan

from ..duties import lab
from ..duties.table import TABLE
from ..families import build
from . import naive

H, HKV, D = 4, 2, 8


class Fixed:
    """A request that has the same plans for every layer."""

    tail = frame = None

    def __init__(self, plans, past, queries):
        self.plans, self.past = tuple(plans), past
        self.q_pos = past + torch.arange(queries)

    def visit(self, layer, look):
        return self.plans, int(min(plan.active_from.min() for plan in self.plans)) if self.plans else 0

    def finish(self, layer, out):
        return out


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raising(batch, keys, start):
    groups = (torch.arange(keys) % 3 == 1).to(torch.uint8).expand(batch, -1)
    return Plan(groups, 2, torch.full((batch,), start), bias=torch.tensor([[[0.0, 1.5]]]))


def call(query, key, value, mask, request, module=None, **kw):
    attend.register()
    module = module or SimpleNamespace(layer_idx=0, is_causal=True, num_key_value_groups=H // HKV, training=False)
    return ALL_ATTENTION_FUNCTIONS["vlmfix"](module, query, key, value, mask, **{attend.STATE: request}, **kw)


def expected(query, key, value, plans, sees, q_pos, k_pos, scale=D**-0.5):
    return naive.attend(query, key, value, plans, sees, scale, q_pos, k_pos)[0].transpose(1, 2)


def test_masks_are_built_by_the_functions_of_the_original():
    attend.register()
    for ours in attend.NAMES.values():
        assert ours in ALL_ATTENTION_FUNCTIONS
        assert ours in AttentionMaskInterface._global_mapping
        assert "flash" not in ours  # transformers reads meaning into such names


def test_without_a_mask_function_padded_rows_would_be_wrong(monkeypatch):
    """The silent failure that the registration prevents, so that the padded batches of the duties prove something."""
    tiny = lab.under("llava")
    inputs = tiny.inputs((1, 1))
    whisper = lab.vlm("llava", TABLE["var"].whisper)
    want = lab.plain("llava", (1, 1)).logits
    assert lab.difference(lab.trace(whisper.generate, inputs).logits, want) < lab.LOGITS
    mapping = AttentionMaskInterface._global_mapping
    monkeypatch.delitem(mapping, "vlmfix")
    assert lab.difference(lab.trace(whisper.generate, inputs).logits, want) > 1e-2


@pytest.mark.parametrize("request_", [None, Fixed([], 0, 5)], ids=["no request", "no plan"])
def test_without_a_plan_the_original_runs_bit_for_bit(request_):
    q, k, v = draw(2, H, 5, D), draw(2, HKV, 5, D, seed=1), draw(2, HKV, 5, D, seed=2)
    module = SimpleNamespace(layer_idx=0, is_causal=True, num_key_value_groups=2, training=False)
    want = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, None, scaling=0.3)[0]
    assert torch.equal(call(q, k, v, None, request_, module, scaling=0.3)[0], want)


def test_a_module_without_a_layer_is_left_alone():
    """Resamplers that share the text's configuration are no layers of the decoder."""
    q, k, v = draw(1, H, 5, D), draw(1, HKV, 5, D, seed=1), draw(1, HKV, 5, D, seed=2)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
    request = Fixed([raising(1, 5, 0)], 0, 5)
    want = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, None, scaling=0.3)[0]
    assert torch.equal(call(q, k, v, None, request, module, scaling=0.3)[0], want)


def test_rows_before_the_first_active_one_are_the_originals():
    q, k, v = draw(2, H, 9, D), draw(2, HKV, 9, D, seed=1), draw(2, HKV, 9, D, seed=2)
    plan = raising(2, 9, 6)
    out, weights = call(q, k, v, None, Fixed([plan], 0, 9))
    plain = call(q, k, v, None, None)[0]
    assert weights is None
    assert out.is_contiguous()
    assert torch.equal(out[:, :6], plain[:, :6])
    torch.testing.assert_close(
        out.double(), expected(q, k, v, [plan], _causal(9, 9), range(9), range(9)), atol=2e-6, rtol=2e-6
    )
    assert not torch.allclose(out[:, 6:], plain[:, 6:], atol=1e-3)


def _causal(queries, keys):
    return lambda b, h, i, j: 0.0 if j <= i + keys - queries else None


@pytest.mark.parametrize("name", ["one step", "a chunk", "a whole prompt", "a prompt of many chunks"])
def test_an_absent_mask_means_causal_from_the_end(name):
    past, queries = {"one step": (8, 1), "a chunk": (0, 3), "a whole prompt": (0, 9)}.get(name, (0, 70))
    keys = past + queries
    heads, kv = (1, 1) if queries == 70 else (H, HKV)
    q, k, v = draw(1, heads, queries, D), draw(1, kv, keys, D, seed=1), draw(1, kv, keys, D, seed=2)
    plan = raising(1, keys, 0)
    out, _ = call(q, k, v, None, Fixed([plan], past, queries))
    want = expected(q, k, v, [plan], _causal(queries, keys), range(past, keys), range(keys))
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)


def test_prefill_into_an_empty_static_cache_is_upper_left():
    """Keys beyond the sequence are slots not filled yet; without a mask nobody may see them."""
    q, k, v = draw(1, H, 4, D), draw(1, HKV, 9, D, seed=1), draw(1, HKV, 9, D, seed=2)
    plan = raising(1, 4, 0)
    want = expected(q, k, v, [plan], lambda b, h, i, j: 0.0 if j <= i else None, range(4), range(9))
    out, _ = call(q, k, v, None, Fixed([plan], 0, 4))
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)


def test_a_decoding_step_with_a_static_cache():
    q, k, v = draw(1, H, 1, D), draw(1, HKV, 9, D, seed=1), draw(1, HKV, 9, D, seed=2)
    plan = raising(1, 4, 0)
    mask = (torch.arange(9) <= 5)[None, None, None]
    want = expected(q, k, v, [plan], lambda b, h, i, j: 0.0 if j <= 5 else None, [5], range(9))
    out, _ = call(q, k, v, mask, Fixed([plan], 5, 1))
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)


def test_a_sliding_layer_holds_the_last_keys():
    """K < S: key j is slot S - K + j."""
    q, k, v = draw(1, H, 1, D), draw(1, HKV, 4, D, seed=1), draw(1, HKV, 4, D, seed=2)
    plan = raising(1, 9, 0)
    want = expected(q, k, v, [plan], lambda *place: 0.0, [9], range(6, 10))
    out, _ = call(q, k, v, None, Fixed([plan], 9, 1))
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)


def test_values_may_have_another_size_and_scaling_may_be_absent():
    q, k, v = draw(1, H, 3, D), draw(1, HKV, 3, D, seed=1), draw(1, HKV, 3, 5, seed=2)
    plan = raising(1, 3, 0)
    out, _ = call(q, k, v, None, Fixed([plan], 0, 3), scaling=None)
    assert out.shape == (1, 3, H, 5)
    want = expected(q, k, v, [plan], _causal(3, 3), range(3), range(3))
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)


def test_non_contiguous_queries_are_fine():
    q = draw(2, 3, H, D).transpose(1, 2)
    k, v = draw(2, HKV, 3, D, seed=1), draw(2, HKV, 3, D, seed=2)
    request = Fixed([raising(2, 3, 0)], 0, 3)
    torch.testing.assert_close(call(q, k, v, None, request)[0], call(q.contiguous(), k, v, None, request)[0])


def test_gradients_flow():
    q, k, v = (draw(1, n, 3, D, seed=n).requires_grad_() for n in (H, HKV, HKV))
    call(q, k, v, None, Fixed([raising(1, 3, 0)], 0, 3))[0].square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))


DECODERS = {
    "gemma2": {"query_pre_attn_scalar": 16, "head_dim": 16, "attn_logit_softcapping": 2.0, "sliding_window": 8},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
    "mistral": {"sliding_window": 8, "head_dim": 16},
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decoders_with_softcap_sinks_and_windows(decoder, implementation):
    """What acts without changing anything equals the model's own attention, whichever that is."""
    if decoder != "mistral" and implementation == "sdpa":
        pytest.skip(f"transformers' sdpa cannot do the attention of {decoder}")
    text = {"model_type": decoder, **DECODERS[decoder]}
    tiny = build("llava", fresh=True, text_config=text)
    tiny.model.set_attn_implementation({"text_config": implementation})
    inputs = tiny.inputs((1, 2))
    want = lab.trace(tiny.model.generate, inputs)
    with vlmfix.wrap(tiny.model, None, TABLE["var"].whisper) as fixed:
        assert fixed.compiled.facts.softcap == (decoder == "gemma2")
        lab.assert_same(lab.trace(fixed.generate, inputs), want)
    with vlmfix.wrap(tiny.model, None, TABLE["var"].full) as fixed:
        assert lab.difference(lab.trace(fixed.generate, inputs).logits, want.logits) > 1e-3
    assert tiny.model.config.text_config._attn_implementation == implementation
    if decoder == "gemma2":
        with pytest.raises(vlmfix.Refusal, match=r"which gemma2 soft-caps|which llava soft-caps"):
            vlmfix.wrap(tiny.model, None, "pai")


def test_attention_that_cannot_be_delegated_to_is_refused():
    tiny = build("llava", fresh=True)
    tiny.model.config.text_config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(vlmfix.Refusal, match=r"flash_attention_2.*load the model with attn_implementation='sdpa'"):
        vlmfix.wrap(tiny.model, None, "var")
