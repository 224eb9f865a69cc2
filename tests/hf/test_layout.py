"""What stands where in a prompt, and where a model's layers are, for every family."""

import contextlib

import pytest
import torch

from vlmfix.errors import Refusal, UsageError
from vlmfix.hf.families import FAMILIES as TABLE
from vlmfix.hf.hooks import installed
from vlmfix.hf.inputs import read
from vlmfix.hf.lens import lens
from vlmfix.layout import NEVER, Kind, Layout

from ..families import FAMILIES, REFUSED, build
from ..families.core import GLOBAL, IMAGE

TILED = ("idefics3", "smolvlm", "llama4")
"""Families whose tiles are runs of their own; the token before a picture's last tile tells the pictures apart."""

RUNS = ("fuyu", "molmo2", "ovis2")
"""Families that separate the runs of one picture by tokens without telling pictures apart: every run counts."""


def prompts(tiny):
    """Batches that show every mixture of numbers of pictures that a family takes."""
    counts = tiny.spec.images
    mixed = [(2, 1, 0), (0, 2)] if set(counts) >= {0, 1, 2} and tiny.spec.uneven else []
    return [*((n, n) for n in counts), *mixed]


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_tokens_pictures_and_text_are_found(family):
    tiny = build(family, fresh=True)
    with installed(tiny.model) as parts:
        for rows in prompts(tiny):
            inputs = tiny.inputs(rows)
            layout = read(parts, inputs, None, GLOBAL if family in TILED else None).layout
            visual, valid = tiny.expected_visual(inputs), inputs["attention_mask"].bool()
            assert torch.equal(layout.visual, visual)
            assert torch.equal(layout.valid, valid)
            images = layout.images.long()
            if family in RUNS:
                runs = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
                images_wanted = torch.where(visual, runs.cumsum(1) - 1, -1)
            else:
                images_wanted = tiny.expected_images(inputs)
                assert layout.n_images.tolist() == list(rows)
            assert torch.equal(images, images_wanted)
            check_kinds(layout, visual, valid)
            assert layout.mask == tiny.spec.mask == TABLE[family].mask


def check_kinds(layout, visual, valid):
    for row, kinds in enumerate(layout.kinds.tolist()):
        places = visual[row].nonzero()[:, 0].tolist()
        for slot, kind in enumerate(kinds):
            if not valid[row, slot]:
                wanted = Kind.PAD
            elif slot in places:
                wanted = Kind.VISUAL
            else:
                wanted = Kind.SYSTEM if places and slot < places[0] else Kind.QUERY
            assert kind == wanted
        assert int(layout.n_visual[row]) == len(places)
        assert int(layout.after_visual[row]) == (places[-1] + 1 if places else NEVER)
        assert int(layout.last[row]) == valid[row].nonzero().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_heads_are_those_of_the_config(family):
    tiny = build(family, fresh=True)
    text = tiny.model.config.get_text_config(decoder=True)
    with installed(tiny.model) as parts:
        assert parts.family == family
        assert parts.depth == text.num_hidden_layers
        assert parts.hidden_size == text.hidden_size
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * parts.depth
        crossing = set(getattr(text, "cross_attention_layers", ()))
        attending = {i for i, kind in enumerate(kinds) if kind.endswith("attention") and kind != "linear_attention"}
        assert set(parts.heads) == set(parts.kv_heads) == attending - crossing
        assert set(parts.blocks) >= set(parts.heads)
        for layer, heads in parts.heads.items():
            owned = {getattr(m, "layer_idx", None) for m in parts.blocks[layer].modules()}
            assert layer in owned
            assert heads == 4
            assert parts.kv_heads[layer] == (2 if tiny.spec.grouped else heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_lens_on_the_last_layer_is_the_model(family):
    tiny = build(family, fresh=True)
    inputs, last = tiny.inputs((1,)), {}
    with installed(tiny.model) as parts, torch.no_grad():
        block = parts.blocks[parts.depth - 1]

        def keep(module, args, out):
            last["hidden"] = (out[0] if isinstance(out, tuple) else out)[:, -1]

        hook = block.register_forward_hook(keep)
        logits = tiny.model(**inputs).logits[:, -1]
        hook.remove()
        seen = lens(parts, last["hidden"], norm=True)
    ruled_out = logits < -1e30
    torch.testing.assert_close(seen.masked_fill(ruled_out, 0), logits.masked_fill(ruled_out, 0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_be_acted_on_are_refused(family):
    tiny = build(family, fresh=True)
    with pytest.raises(Refusal, match=r"encoder-decoder|attention interface") as caught, installed(tiny.model):
        pass
    assert type(tiny.model).__name__ in str(caught.value)


def test_text_only_models_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config).eval()
    with pytest.raises(Refusal, match=r"LlamaForCausalLM \(llama\) is a text-only model"), installed(model):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_structure_tokens_are_no_visual_tokens():
    """Token types may count a picture's frame to the picture; the layout does not."""
    for family in ("idefics3", "internvl", "qwen2_5_vl"):
        tiny = build(family, fresh=True)
        inputs = tiny.inputs((2, 1))
        types = torch.nn.functional.max_pool1d(tiny.expected_visual(inputs).float(), 3, 1, 1).long()
        inputs["mm_token_type_ids"] = types
        assert (types.bool() & ~tiny.expected_visual(inputs)).any()
        with installed(tiny.model) as parts:
            assert torch.equal(read(parts, inputs).layout.visual, tiny.expected_visual(inputs))


TYPED = [name for name in FAMILIES if TABLE[name].types]


@pytest.mark.parametrize("family", TYPED)
def test_missing_token_types_are_refused_where_pictures_would_be_read_as_text(family):
    tiny = build(family, fresh=True)
    name = TABLE[family].types
    inputs = tiny.inputs((1, 1))
    without = {k: v for k, v in inputs.items() if k != name}
    with installed(tiny.model) as parts:
        with pytest.raises(
            UsageError, match=f"{family} reads a prompt with pictures as plain text when {name} is missing"
        ):
            read(parts, without)
        text = {k: v for k, v in tiny.inputs((0, 0)).items() if k != name}
        assert not read(parts, text).layout.visual.any()
    # what the refusal prevents; newer releases raise for some families themselves
    with torch.no_grad(), contextlib.suppress(ValueError):
        assert (tiny.model(**inputs).logits - tiny.model(**without).logits).abs().max() > 1e-3


def test_every_family_with_types_of_its_own_is_covered():
    assert {"paligemma", "gemma3", "qwen2_vl", "qwen2_5_vl", "glm4v"} <= set(TYPED)


def test_embeddings_need_a_mask_of_the_visual_tokens():
    tiny = build("llava", fresh=True)
    embeds = torch.randn(1, 6, 64)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0]]).bool()
    with installed(tiny.model) as parts:
        with pytest.raises(UsageError, match=r"give visual_mask=\[B, K\] bool"):
            read(parts, {"inputs_embeds": embeds})
        assert torch.equal(read(parts, {"inputs_embeds": embeds}, mask).layout.visual, mask)
        with pytest.raises(UsageError, match="neither input_ids nor inputs_embeds"):
            read(parts, {"attention_mask": mask})


def test_a_layout_without_images_counts_runs():
    visual = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    layout = Layout.of(visual, torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]))
    assert layout.images.tolist() == [[0, 0, -1, 1, -1], [-1] * 5]
    assert layout.n_images.tolist() == [2, 0]
    assert layout.kinds[1].tolist() == [Kind.PAD] * 2 + [Kind.QUERY] * 3
    taken = layout.take(torch.tensor([1, 1, 0]))
    assert taken.n_images.tolist() == [0, 0, 2]
    padded = layout.padded(7)
    assert padded.valid.sum(1).tolist() == [5, 3]
    assert padded.visual[0].tolist() == [False] * 2 + visual[0].tolist()
    stacked = Layout.stack([layout, padded])
    assert torch.equal(stacked.visual[:2], stacked.visual[2:])


def test_placeholders_beyond_the_pictures_change_nothing_silently():
    """A prompt with more placeholders than features is transformers' error, not ours to repair."""
    tiny = build("llava", fresh=True)
    inputs = tiny.inputs((1,))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[IMAGE]])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    from vlmfix import wrap

    with wrap(tiny.model, None, "vcd") as vlm, pytest.raises(ValueError, match="features"):
        vlm.generate(**inputs, max_new_tokens=1)
