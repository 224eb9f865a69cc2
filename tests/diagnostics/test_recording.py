"""Recording changes no token, and what it records is what eager attention would show."""

import pytest
import torch

import vlmfix
from tests import families
from tests.decoders.running import CHUNKS, OPTIONS, RECENT, gap
from vlmfix.api import wrap
from vlmfix.decoders.var import sink_score
from vlmfix.diagnostics.measures import image_centric
from vlmfix.errors import UsageError

ALL = ("visual_mass", "text_mass", "sink_share", "vhd", "lse", "map")
SINKS = {"sink_dims": (3, 4), "tau": 1.02}


@torch.no_grad()
def run(tiny, inputs, new=4, **options):
    return tiny.model.generate(**inputs, do_sample=False, max_new_tokens=new, **OPTIONS, **options)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3", "gemma4", "qwen3_5", "instructblip"])
def test_tokens_and_logits_stay_the_same(family):
    tiny = families.build(family)
    inputs = tiny.inputs(list(tiny.rows))
    plain = run(tiny, inputs)
    with vlmfix.record(tiny.model, None, ALL, **SINKS) as rec:
        recorded = run(tiny, inputs)
    after = run(tiny, inputs)
    assert gap(plain, recorded) == gap(plain, after) == 0
    assert rec.visual_mass.shape[:3] == (4, len(tiny.rows), len(rec.layers))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_numbers_are_those_of_eager_attention(family):
    tiny = families.build(family, fresh=True)
    inputs = tiny.inputs(list(tiny.rows))
    with vlmfix.record(tiny.model, None, ALL, **SINKS) as rec:
        result = run(tiny, inputs)
    tiny.model.set_attn_implementation("eager")
    full = torch.cat([inputs["attention_mask"], torch.ones(len(tiny.rows), 4, dtype=torch.long)], 1)[:, :-1]
    again = {**inputs, "input_ids": result.sequences[:, :-1], "attention_mask": full}
    out = tiny.model(**again, output_attentions=True, output_hidden_states=True, use_cache=False)
    length = inputs["input_ids"].shape[1]
    visual = tiny.expected_visual(inputs)
    seen = visual.any(1)
    for i, layer in enumerate(rec.layers):
        rows = out.attentions[layer][:, :, length - 1 :].transpose(0, 2).transpose(1, 2)  # [S, B, H, K]
        mass = (rows[..., :length] * visual[None, :, None]).sum(-1)
        torch.testing.assert_close(rec.visual_mass[:, seen, i], mass[:, seen], atol=2e-6, rtol=0)
        assert rec.visual_mass[:, ~seen, i].isnan().all()
        torch.testing.assert_close(rec.map[:, :, i], rows[..., :length].mean(2), atol=2e-6, rtol=0)
        sinks = visual & (sink_score(out.hidden_states[layer][:, :length], SINKS["sink_dims"]) > SINKS["tau"])
        on_sinks = (rows[..., :length] * sinks[None, :, None]).sum(-1)
        share = on_sinks / (mass + 1e-6 * visual.sum(1)[None, :, None])
        torch.testing.assert_close(rec.sink_share[:, seen, i], share[:, seen], atol=2e-5, rtol=0)
        text = rows[..., :length].sum(-1) - mass - rec.first_mass[:, :, i]
        torch.testing.assert_close(rec.text_mass[:, :, i], text, atol=2e-6, rtol=0)
    assert image_centric(rec.sink_share, rec.visual_mass).dtype == torch.bool
    dominance = rec.dominance()
    assert dominance.mdi.shape == (len(tiny.rows), len(rec.layers))
    assert dominance.mdi[seen].isfinite().all()


@torch.no_grad()
def test_local_divergence_is_that_of_the_two_groups():
    """M ||o_V - o_T|| from the weights, in the layer without any picture behind it."""
    tiny = families.build("llava", fresh=True)
    inputs = tiny.inputs([1], keys=[2])
    with vlmfix.record(tiny.model, None, ["vhd", "visual_mass"]) as rec:
        run(tiny, inputs, new=1)
    attention = next(m for m in tiny.model.modules() if getattr(m, "layer_idx", None) == 1)
    seen = {}
    handle = attention.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    tiny.model.set_attn_implementation("eager")
    out = tiny.model(**inputs, output_attentions=True, use_cache=False)
    handle.remove()
    hidden = seen["hidden_states"]
    value = attention.v_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    value = value.repeat_interleave(attention.num_key_value_groups, 1)[0]
    row, visual = out.attentions[1][0, :, -1], tiny.expected_visual(inputs)[0]
    mass = row[:, visual].sum(-1, keepdim=True)
    one = torch.einsum("hk,hkd->hd", row[:, visual], value[:, visual]) / mass
    two = torch.einsum("hk,hkd->hd", row[:, ~visual], value[:, ~visual]) / (1 - mass)
    torch.testing.assert_close(rec.vhd[0, 0, 1], mass[:, 0] * (one - two).norm(dim=-1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["pai", "vhr", "gift(saliency_layers=(2,),layers=(1,2,3))", "vcd(beta=0)+vaf"])
def test_under_a_recipe_its_results_stay_and_slopes_show(recipe):
    tiny = families.build("llava")
    inputs = tiny.inputs([2, 1, 0])
    with wrap(tiny.model, None, recipe) as vlm:
        plain = vlm.generate(**inputs, max_new_tokens=3, **OPTIONS)
        with vlmfix.record(vlm, what=ALL, **SINKS) as rec:
            recorded = vlm.generate(**inputs, max_new_tokens=3, **OPTIONS)
    assert gap(plain, recorded) == 0
    assert rec.visual_mass.shape == (3, 3, 4, 4)
    with vlmfix.record(tiny.model) as untouched:
        run(tiny, inputs, new=3)
    changed = (rec.visual_mass - untouched.visual_mass)[0, :2].abs().max()
    assert changed > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("mode", [{"use_cache": False}, {"cache_implementation": "static"}, CHUNKS])
def test_modes_record_the_same(mode):
    tiny = families.build("llava")
    inputs = tiny.inputs([2, 1, 0])
    with vlmfix.record(tiny.model, None, ALL, **SINKS) as rec:
        run(tiny, inputs)
        run(tiny, inputs, **mode)
    for name in ALL:
        one, two = (getattr(result, name) for result in rec.runs)
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4, equal_nan=True)


@RECENT
@torch.no_grad()
@pytest.mark.parametrize("recipe", ["greedy", "pai+vcd(beta=0)", "vasparse_attention(beta=3)"])
def test_statistics_of_the_sequences_that_a_beam_search_returns(recipe):
    """They equal those of the same tokens fed one by one."""
    tiny = families.build("llava")
    inputs = tiny.inputs([1, 2])
    with wrap(tiny.model, None, recipe) as vlm:
        with vlmfix.record(vlm) as rec:
            found = vlm.generate(**inputs, max_new_tokens=4, num_beams=3, num_return_sequences=3, **OPTIONS)
        followed = rec.follow(found.beam_indices)
        for row in range(6):
            alone = dict(tiny.inputs([(1, 2)[row // 3]], keys=[row // 3]))
            length, tokens = alone["input_ids"].shape[1], found.sequences[row, -4:]

            def forced(batch, ids, tokens=tokens, length=length):
                return [int(tokens[min(ids.shape[-1] - length, 3)])]

            with vlmfix.record(vlm) as single:
                vlm.generate(**alone, max_new_tokens=4, prefix_allowed_tokens_fn=forced, **OPTIONS)
            torch.testing.assert_close(followed.visual_mass[:, row], single.visual_mass[:, 0], atol=1e-5, rtol=0)


def test_saved_arrays_come_back(tmp_path):
    from safetensors import safe_open

    tiny = families.build("llava")
    with vlmfix.record(tiny.model, None, ["visual_mass"], layers=[1, 3]) as rec:
        run(tiny, tiny.inputs([1]), new=2)
    rec.save(tmp_path / "rec.safetensors", model="tiny")
    with safe_open(str(tmp_path / "rec.safetensors"), "pt") as file:
        assert file.metadata() == {"layers": "[1, 3]", "model": "tiny"}
        torch.testing.assert_close(file.get_tensor("visual_mass"), rec.visual_mass)


def test_wrong_names_and_empty_records_are_said():
    tiny = families.build("llava")
    with pytest.raises(UsageError, match="visual_mass"), vlmfix.record(tiny.model, what=["visual_mas"]):
        pass
    with (
        vlmfix.record(tiny.model, what=["visual_mass"]) as rec,
        pytest.raises(UsageError, match="nothing was generated"),
    ):
        rec.visual_mass  # noqa: B018
    with vlmfix.record(tiny.model, what=["visual_mass"]) as rec:
        run(tiny, tiny.inputs([1]), new=1)
    with pytest.raises(UsageError, match="vhd was not recorded"):
        rec.vhd  # noqa: B018
    with pytest.raises(AttributeError):
        rec.nothing  # noqa: B018
