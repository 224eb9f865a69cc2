"""Ways in which transformers goes wrong silently, each closed."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import vlmfix
from vlmfix.hf import settings

from ..duties import lab
from ..duties.table import TABLE
from ..families import MAIN, build

LONGER = "icd(alpha=0.5,beta=0,disturbance_ids=(40,41,42,43,44))"
BRANCHED = ("vcd(alpha=0.5,beta=0)", "m3id(beta=0,forget_rate=0.05)", LONGER)
"""Branches of the prompt's length, shorter and longer."""


# --- branches have the positions and the pictures of a prompt of their own -------------------------------------------


def plain_scores(tiny, inputs, tokens):
    """Last logits of a plain model that reads a whole prompt without a cache, for each of the tokens that follow."""
    out, ids, mask = [], inputs["input_ids"], inputs["attention_mask"]
    for step in range(tokens.shape[1]):
        new = tokens[:, :step]
        grown = {**inputs, "input_ids": torch.cat([ids, new], 1), "attention_mask": torch.cat([mask, new * 0 + 1], 1)}
        for key in ("mm_token_type_ids", "token_type_ids"):
            if key in grown:
                grown[key] = torch.cat([inputs[key], torch.zeros_like(new)], 1)
        position_ids = None
        if hasattr(tiny.model, "_prepare_position_ids_for_generation"):
            rest = {k: v for k, v in grown.items() if k != "input_ids"}
            position_ids = tiny.model._prepare_position_ids_for_generation(grown["input_ids"], rest)
        with torch.no_grad():
            out.append(tiny.model(**grown, position_ids=position_ids).logits[:, -1])
    return torch.stack(out)


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize("rows", [(1,), (2, 1)])
def test_a_text_branch_is_the_text_read_alone(family, rows):
    """M3ID's scores equal those of two plain models, one of which never saw a picture or its frame."""
    tiny = build(family)
    inputs = tiny.inputs(rows)
    trace = lab.trace(lab.vlm(family, "m3id(beta=0,forget_rate=0.05)").generate, inputs)
    own = plain_scores(tiny, inputs, trace.tokens).log_softmax(-1)
    structure = set(lab.vlm(family, "greedy").parts.structure_ids)
    for row in range(len(rows)):
        visual = tiny.expected_visual(inputs)[row]
        keep = [
            i
            for i, t in enumerate(inputs["input_ids"][row].tolist())
            if t != 0 and not visual[i] and t not in structure
        ]
        ids = inputs["input_ids"][row, keep][None]
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inputs:
            text["mm_token_type_ids"] = torch.zeros_like(ids)
        other = plain_scores(tiny, text, trace.tokens[row : row + 1]).log_softmax(-1)[:, 0]
        for t in range(trace.logits.shape[0]):
            weight = torch.tensor(0.05 * (t + 1)).expm1()
            want = own[t, row] + weight * (own[t, row] - other[t])
            assert lab.difference(trace.logits[t, row], want) <= lab.LOGITS


@pytest.mark.parametrize("family", MAIN)
def test_a_picture_branch_is_the_noised_prompt_read_alone(family):
    """VCD's scores equal those of the plain model on the prompt, and on the prompt with its pictures noised."""
    from vlmfix.hf.hooks import installed
    from vlmfix.hf.inputs import change_pixels, read
    from vlmfix.views.noise import Noised

    tiny = build(family)
    inputs = tiny.inputs((2, 1))
    trace = lab.trace(lab.vlm(family, "vcd(alpha=0.5,beta=0)").generate, inputs)
    other = build(family, fresh=True)
    with installed(other.model) as parts:
        noised = {**inputs, **change_pixels(parts, read(parts, inputs), Noised(500, 0))}
    assert not torch.equal(noised["pixel_values"], inputs["pixel_values"])
    x, y = (plain_scores(tiny, prompt, trace.tokens) for prompt in (inputs, noised))
    assert lab.difference(trace.logits, 1.5 * x - 0.5 * y) <= lab.LOGITS


@pytest.mark.parametrize("recipe", BRANCHED)
@pytest.mark.parametrize("family", MAIN)
def test_a_forward_shows_the_callers_prompt_only(family, recipe):
    """Logits and hidden states of the caller's rows and positions, whatever length the branches have."""
    tiny = lab.under(family)
    inputs = tiny.inputs((1, 2))
    with torch.no_grad():
        want = build(family).model(**inputs, output_hidden_states=True)
        with vlmfix.applied(tiny.model, None, recipe):
            got = tiny.model(**inputs, output_hidden_states=True)
    assert got.logits.shape == want.logits.shape
    valid = inputs["attention_mask"].bool()
    assert lab.difference(got.logits[:, :-1][valid[:, :-1]], want.logits[:, :-1][valid[:, :-1]]) <= lab.LOGITS
    assert lab.difference(got.logits[:, -1], want.logits[:, -1]) > 1e-3
    for ours, plain in zip(got.hidden_states, want.hidden_states, strict=True):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours[valid], plain[valid], atol=1e-4, rtol=1e-4)


# --- M-RoPE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", ["vcd(alpha=0.5,beta=0)", "m3id(beta=0,forget_rate=0.05)", LONGER, TABLE["var"].full]
)
def test_rope_deltas_survive_a_run(recipe):
    """A decode that relies on the positions its prefill left in the module goes on undisturbed."""
    tiny = lab.under("qwen2_5_vl")
    inputs, other = tiny.inputs((2,)), tiny.inputs((1, 2, 0), seed=5)
    fixed = lab.vlm("qwen2_5_vl", recipe)

    def decode(between):
        with torch.no_grad():
            out = tiny.model(**inputs, use_cache=True)
            between()
            return tiny.model(out.logits[:, -1].argmax(-1)[:, None], past_key_values=out.past_key_values).logits

    want = decode(lambda: None)
    assert torch.equal(decode(lambda: fixed.generate(**other, max_new_tokens=2)), want)


@pytest.mark.parametrize("recipe", BRANCHED)
def test_steps_without_positions_follow_the_prompt(recipe):
    """Inside a context, a bare decode step has the positions of its rows, branches included."""
    tiny = lab.under("qwen2_5_vl")
    inputs = tiny.inputs((2, 1))
    want = lab.trace(lab.vlm("qwen2_5_vl", recipe).generate, inputs, max_new_tokens=3)
    with torch.no_grad(), vlmfix.applied(tiny.model, None, recipe):
        out = tiny.model(**inputs, use_cache=True)
        logits = [out.logits[:, -1]]
        for _ in range(2):
            out = tiny.model(logits[-1].argmax(-1)[:, None], past_key_values=out.past_key_values)
            logits.append(out.logits[:, -1])
    assert lab.difference(torch.stack(logits), want.logits) <= lab.LOGITS


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_ready_made_mask_is_kept(kind):
    """4D masks reach the attention as they are; branch rows cannot have one, and say so."""
    tiny = lab.under("llava")
    inputs = tiny.inputs((1,))
    length = inputs["input_ids"].shape[1]
    seen = torch.ones(length, length).tril().bool()
    seen[-1, 1:3] = False
    mask = seen[None, None] if kind == torch.bool else torch.zeros(1, 1, length, length).masked_fill(~seen, -1e9)
    with torch.no_grad():
        want = build("llava").model(**{**inputs, "attention_mask": mask}).logits
        with vlmfix.applied(tiny.model, None, TABLE["var"].whisper):
            got = tiny.model(**{**inputs, "attention_mask": mask}).logits
        assert lab.difference(got, want) <= lab.LOGITS
        with vlmfix.applied(tiny.model, None, "vcd"), pytest.raises(vlmfix.Refusal, match="4D attention_mask"):
            tiny.model(**{**inputs, "attention_mask": mask})


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def opinionated():
    """A checkpoint whose generation_config brings opinions of its own."""
    tiny = build("llava", seed=2)
    before = tiny.model.generation_config
    tiny.model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=3, top_p=0.5, repetition_penalty=5.0, num_beams=2, pad_token_id=0
    )
    yield tiny
    tiny.model.generation_config = before


@pytest.mark.parametrize("recipe", ["greedy", TABLE["var"].whisper, "vcd(alpha=1e-12,beta=0)"])
def test_greedy_means_greedy_whatever_the_checkpoint_says(recipe, opinionated):
    inputs = opinionated.inputs((1, 1))
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
    want = opinionated.model.generate(**inputs, max_new_tokens=6, do_sample=False, **neutral)
    with vlmfix.wrap(opinionated.model, None, recipe) as vlm:
        for given in ({"max_new_tokens": 6}, {"generation_config": GenerationConfig(max_new_tokens=6)}):
            assert torch.equal(vlm.generate(**inputs, **given), want)
            overridden = vlm.report["overridden_generation_config"]
            assert overridden["temperature"] == 0.3
            assert set(overridden) == {"do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams"}
        penalised = vlm.generate(**inputs, max_new_tokens=6, repetition_penalty=5.0)
        assert "repetition_penalty" not in vlm.report["overridden_generation_config"]
    assert torch.equal(
        penalised,
        opinionated.model.generate(
            **inputs, max_new_tokens=6, do_sample=False, **neutral | {"repetition_penalty": 5.0}
        ),
    )


def test_sampling_leaves_truncation_to_the_caller(opinionated):
    """do_sample=True means the model's own distribution: no top-k of 50 or of the checkpoint."""
    filled, overridden = settings.plain(opinionated.model.generation_config, {"do_sample": True})
    assert (filled["top_k"], filled["top_p"], filled["temperature"]) == (0, 1.0, 1.0)
    assert overridden["top_k"] == 3
    filled, _ = settings.plain(GenerationConfig(), {"do_sample": True})
    assert filled["top_k"] == 0
    assert settings.plain(GenerationConfig(), {})[1] == {}


def test_a_static_cache_may_come_from_the_checkpoint():
    tiny = build("llava", seed=2)
    inputs = tiny.inputs((1, 1))
    with vlmfix.wrap(tiny.model, None, "vcd(beta=0)") as vlm:
        want = lab.trace(vlm.generate, inputs)
        tiny.model.generation_config.cache_implementation = "static"
        try:
            lab.assert_same(lab.trace(vlm.generate, inputs), want)
            config = GenerationConfig(cache_implementation="static", max_new_tokens=lab.NEW, pad_token_id=0)
            assert torch.equal(vlm.generate(**inputs, generation_config=config)[:, -lab.NEW :], want.tokens)
        finally:
            tiny.model.generation_config.cache_implementation = None


def test_lengths_may_be_given_in_every_way():
    tiny = lab.under("llava")
    inputs = tiny.inputs((1, 1))
    length = inputs["input_ids"].shape[1]
    for recipe in ("greedy", "vcd", TABLE["var"].full):
        vlm = lab.vlm("llava", recipe)
        want = vlm.generate(**inputs, max_new_tokens=4)
        assert torch.equal(vlm.generate(**inputs, max_length=length + 4), want)
        assert torch.equal(vlm.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=4)), want)
        assert torch.equal(vlm.generate(inputs["input_ids"], **_without(inputs, "input_ids"), max_new_tokens=4), want)


def _without(inputs, *names):
    return {k: v for k, v in inputs.items() if k not in names}


REFUSED = {
    "assistant_model": (object(), "assisted decoding"),
    "prompt_lookup_num_tokens": (3, "prompt-lookup decoding"),
    "custom_generate": (lambda *a, **k: None, "custom decoding loop"),
    "guidance_scale": (1.5, "classifier-free guidance"),
    "penalty_alpha": (0.6, "contrastive search"),
    "pixel_values_videos": (torch.zeros(1), "videos"),
    "cache_implementation": ("paged", "continuous batching"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("recipe", [TABLE["var"].full, "vcd"])
def test_ways_of_decoding_that_a_recipe_cannot_follow_are_refused(name, recipe):
    value, reason = REFUSED[name]
    inputs = lab.under("llava").inputs((1,))
    with pytest.raises(vlmfix.Refusal, match=reason):
        lab.vlm("llava", recipe).generate(**inputs, **{name: value}, max_new_tokens=2)
    if name in ("prompt_lookup_num_tokens", "guidance_scale", "penalty_alpha"):
        config = GenerationConfig(**{name: value})
        with pytest.raises(vlmfix.Refusal, match=reason):
            lab.vlm("llava", recipe).generate(**inputs, generation_config=config, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"past_key_values": DynamicCache()}, "do not pass past_key_values"),
        ({"prefill_chunk_size": 4}, "leave prefill_chunk_size unset"),
        ({"cache_implementation": "quantized"}, "'dynamic' or 'static'"),
        ({"cache_implementation": "offloaded"}, "'dynamic' or 'static'"),
    ],
)
def test_branches_refuse_what_they_cannot_ride_in(options, reason):
    inputs = lab.under("llava").inputs((1,))
    with pytest.raises(vlmfix.Refusal, match=reason):
        lab.vlm("llava", "vcd").generate(**inputs, **options, max_new_tokens=2)


def test_a_neutral_guidance_scale_is_no_guidance():
    inputs = lab.under("llava").inputs((1,))
    vlm = lab.vlm("llava", "vcd")
    assert torch.equal(
        vlm.generate(**inputs, guidance_scale=1.0, max_new_tokens=2), vlm.generate(**inputs, max_new_tokens=2)
    )


# --- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_with_a_mask_of_visual_tokens():
    """The ids are lost; with a mask the recipe acts as on the ids, and only the new tokens are returned."""
    tiny = lab.under("llava")
    inputs = tiny.inputs((1, 1))
    vlm = lab.vlm("llava", TABLE["var"].full)
    want = vlm.generate(**inputs, max_new_tokens=4)[:, -4:]
    with torch.no_grad():
        embeds = tiny.model.get_input_embeddings()(inputs["input_ids"])
        features = torch.cat(list(tiny.model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    visual = tiny.expected_visual(inputs)
    embeds = embeds.masked_scatter(visual[..., None], features)
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(vlm.generate(**given, visual_mask=visual, max_new_tokens=4), want)
    plain = lab.vlm("llava", "greedy").generate(**given, visual_mask=visual, max_new_tokens=4)
    assert torch.equal(plain, lab.plain("llava", (1, 1)).tokens)
    with pytest.raises(vlmfix.VlmfixError, match="visual_mask"):
        vlm.generate(**given, max_new_tokens=4)


def test_pictures_encoded_beforehand_cannot_be_noised():
    tiny = lab.under("llava")
    inputs = tiny.inputs((1,))
    with torch.no_grad():
        encoded = {"image": tiny.model.model.get_image_features(inputs["pixel_values"], return_dict=True)}
    given = {**_without(inputs, "pixel_values"), "mm_encoder_outputs": encoded}
    with pytest.raises(vlmfix.Refusal, match="pixel_values instead"):
        lab.vlm("llava", "vcd").generate(**given, max_new_tokens=2)
    got = lab.vlm("llava", TABLE["var"].full).generate(**given, max_new_tokens=2)
    assert torch.equal(got, lab.vlm("llava", TABLE["var"].full).generate(**inputs, max_new_tokens=2))


# --- wrappers --------------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_refused():
    compiled = torch.compile(build("llava").model, backend="eager")
    for use in (lambda: vlmfix.wrap(compiled, None, "vcd"), lambda: vlmfix.applied(compiled, None, "vcd").__enter__()):
        with pytest.raises(vlmfix.Refusal, match="before compilation"):
            use()


def test_a_model_under_adapters_is_reached():
    tiny = build("llava", seed=1)

    class Adapter(torch.nn.Module):
        def get_base_model(self):
            return tiny.model

    with vlmfix.wrap(Adapter(), None, "vcd") as vlm:
        assert vlm.model is tiny.model


def test_a_cache_filled_elsewhere_is_refused_in_a_context():
    tiny = build("llava", seed=1)
    inputs = tiny.inputs((1,))
    with torch.no_grad():
        out = tiny.model(**inputs, use_cache=True)
        with vlmfix.applied(tiny.model, None, "vcd"), pytest.raises(vlmfix.VlmfixError, match="filled outside"):
            tiny.model(out.logits[:, -1].argmax(-1)[:, None], past_key_values=out.past_key_values)


def test_an_exception_in_a_forward_ends_its_recipe():
    tiny = build("llava", seed=1)
    inputs = tiny.inputs((1,))
    wrong = {**inputs, "pixel_values": inputs["pixel_values"][:, :, :5]}
    with torch.no_grad():
        want = tiny.model(**inputs).logits
        with vlmfix.applied(tiny.model, None, "vcd"):
            with pytest.raises(Exception):  # noqa: B017, PT011
                tiny.model(**wrong)
            with pytest.raises(Exception):  # noqa: B017, PT011
                tiny.model(inputs["input_ids"], pixel_values="no tensor")
            acted = tiny.model(**inputs).logits
        assert torch.equal(tiny.model(**inputs).logits, want)
    assert not torch.equal(acted, want)
    from vlmfix.hf.hooks import _OPENED, REQUEST

    assert REQUEST.get() is None
    assert _OPENED.get() == ()


def test_positional_inputs_are_understood():
    tiny = build("llava", seed=1)
    inputs = tiny.inputs((1,))
    with torch.no_grad(), vlmfix.applied(tiny.model, None, TABLE["var"].full):
        want = tiny.model(**inputs).logits
        rest = _without(inputs, "input_ids", "pixel_values")
        assert torch.equal(tiny.model(inputs["input_ids"], inputs["pixel_values"], **rest).logits, want)
