"""OPERA's search: what it keeps, where it goes back, what it leaves to transformers and what it refuses."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import vlmfix
from vlmfix.decoders.opera import OPERA, column_scores, mode
from vlmfix.engine.beams import Beams, Finished, Keeper

from ..families import build
from ..families.checkpoints import make_tokenizer

RESTLESS = {"llava": 20, "qwen2_5_vl": 30, "idefics3": 30, "gemma3": 20, "instructblip": 30}
"""Scales at which some sample of a family's batch goes back."""


def generate(family, recipe, rows, keys=None, seed=0, **options):
    tiny = build(family)
    settings = {"max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True, **options}
    with vlmfix.wrap(tiny.model, None, recipe) as vlm:
        return vlm.generate(**tiny.inputs(rows, seed=seed, keys=keys), **settings), vlm.report["methods"].get("opera")


# --- the search ------------------------------------------------------------------------------------------------------


def restricted(model, inputs, beams, candidates, new):
    """Beam search over each beam's N best tokens, without a cache, one hypothesis after the other."""
    running = [(0.0, [])]
    for _ in range(new):
        longer = []
        for score, tokens in running:
            ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
            extra = {k: torch.cat([v, v[:, -1:].expand(-1, len(tokens))], 1) for k, v in inputs.items() if per_token(k)}
            rest = {k: v for k, v in inputs.items() if not per_token(k)}
            logits = model(**{**rest, **extra, "input_ids": ids}, use_cache=False).logits[0, -1].float()
            best = logits.topk(candidates)
            longer += [
                (score + float(s), [*tokens, int(token)])
                for s, token in zip(best.values.log_softmax(-1), best.indices, strict=True)
            ]
        running = sorted(longer, key=lambda one: -one[0])[:beams]
    return running


def per_token(name):
    return name in ("attention_mask", "mm_token_type_ids", "token_type_ids", "input_ids")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3"])
def test_without_penalty_and_returns_it_is_beam_search_over_the_best_candidates(family):
    tiny = build(family)
    want = restricted(tiny.model, tiny.inputs([1]), beams=3, candidates=4, new=12)
    recipe = "opera(alpha=0,threshold=None,candidates=4)"
    got, _ = generate(family, recipe, [1], num_beams=3, num_return_sequences=3)
    assert [tokens for _, tokens in want] == got.sequences[:, -12:].tolist()
    torch.testing.assert_close(got.sequences_scores * 12, torch.tensor([s for s, _ in want]), atol=1e-4, rtol=0)


def restless(family, more="threshold=1"):
    return f"opera(num_beams=3,candidates=3,scale={RESTLESS[family]},{more})"


@pytest.mark.parametrize("family", RESTLESS)
def test_samples_of_a_batch_go_back_as_they_do_alone(family):
    rows = build(family).rows
    batch, report = generate(family, restless(family), rows, max_new_tokens=30)
    assert len(set(report["returns"])) > 1
    for i, pictures in enumerate(rows):
        alone, own = generate(family, restless(family), [pictures], keys=[i], max_new_tokens=30)
        assert torch.equal(alone.sequences[0, -30:], batch.sequences[i, -30:])
        torch.testing.assert_close(alone.sequences_scores[0], batch.sequences_scores[i], atol=2e-5, rtol=0)
        assert own["returns"] == [report["returns"][i]]


def test_it_goes_back_no_more_often_than_allowed():
    rows, new = build("gemma3").rows, 30
    _, often = generate("gemma3", restless("gemma3"), rows, max_new_tokens=new)
    _, once = generate("gemma3", restless("gemma3", "threshold=1,rollbacks=1"), rows, max_new_tokens=new)
    _, never = generate("gemma3", restless("gemma3", "threshold=1,rollbacks=0"), rows, max_new_tokens=new)
    _, unset = generate("gemma3", restless("gemma3", "threshold=None"), rows, max_new_tokens=new)
    assert max(often["returns"]) > 0
    assert max(once["returns"]) <= new - 10
    assert never["returns"] == unset["returns"] == [0, 0, 0]


def test_one_forward_a_step_unless_it_goes_back():
    _, report = generate("llava", "opera(threshold=None)", [1, 1])
    assert report["steps"] == 1 + 12
    _, report = generate("gemma3", restless("gemma3"), build("gemma3").rows, max_new_tokens=30)
    assert report["steps"] > 1 + 30


def test_one_candidate_is_greedy():
    tiny = build("llava")
    inputs = tiny.inputs([1])
    got, _ = generate("llava", "opera(candidates=1,threshold=None)", [1])
    plain = tiny.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(got.sequences, plain)


def test_the_pictures_raise_the_first_ten_tokens_only():
    """Without a picture the bonus is 0 and the penalty is left."""
    first = [generate("llava", f"opera(alpha={alpha},threshold=None)", [0], max_new_tokens=10)[0] for alpha in (0, 5)]
    assert torch.equal(first[0].sequences_scores, first[1].sequences_scores)
    seen = [generate("llava", f"opera(alpha={alpha},threshold=None)", [1], max_new_tokens=10)[0] for alpha in (0, 5)]
    assert not torch.equal(seen[0].sequences_scores, seen[1].sequences_scores)
    later = "opera(alpha={},threshold=None,scale=500)"
    later = [generate("llava", later.format(alpha), [0], max_new_tokens=20)[0] for alpha in (0, 5)]
    assert not torch.equal(later[0].sequences_scores, later[1].sequences_scores)


# --- what generate is asked for --------------------------------------------------------------------------------------


def test_five_beams_unless_told_otherwise():
    five, _ = generate("llava", "opera", [1], num_return_sequences=5)
    assert five.sequences.shape[0] == 5
    assert (five.sequences_scores.diff() <= 0).all()
    three, _ = generate("llava", "opera(num_beams=3)", [1])
    same, _ = generate("llava", "opera", [1], num_beams=3)
    config = GenerationConfig(num_beams=3, max_new_tokens=12, output_scores=True, return_dict_in_generate=True)
    by_config, _ = generate("llava", "opera", [1], generation_config=config)
    assert torch.equal(three.sequences, same.sequences)
    assert torch.equal(three.sequences, by_config.sequences)
    with pytest.raises(vlmfix.VlmfixError, match="num_return_sequences=4"):
        generate("llava", "opera", [1], num_beams=3, num_return_sequences=4)


def test_output_is_transformers_own():
    out, _ = generate("llava", "opera(num_beams=3)", [1, 0], output_logits=True, num_return_sequences=2)
    assert type(out).__name__ == "GenerateBeamDecoderOnlyOutput"
    assert out.sequences.shape[0] == 4
    assert out.logits[0].shape[0] == out.scores[0].shape[0] == 6
    steps = torch.stack(out.scores)
    chosen = steps[torch.arange(12), out.beam_indices, out.sequences[:, -12:]]
    torch.testing.assert_close(chosen.sum(1) / 12, out.sequences_scores, atol=1e-5, rtol=0)


class Forbid(LogitsProcessor):
    def __init__(self, token):
        self.token, self.shapes = token, []

    def __call__(self, input_ids, scores):
        self.shapes.append((input_ids.shape, scores.shape))
        return scores.index_fill(1, torch.tensor([self.token]), float("-inf"))


def test_processors_see_the_beams_of_a_sample():
    plain, _ = generate("llava", "opera(num_beams=3)", [1])
    token = int(plain.sequences[0, -12])
    forbid = Forbid(token)
    out, _ = generate("llava", "opera(num_beams=3)", [1, 1], logits_processor=LogitsProcessorList([forbid]))
    assert token not in out.sequences[0, -12:].tolist()
    assert {shapes[1][0] for shapes in forbid.shapes} == {3}
    assert len(forbid.shapes) == 2 * 12


class Enough(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria_and_stop_strings_end_sequences():
    whole, _ = generate("llava", "opera", [1])
    prompt = whole.sequences.shape[1] - 12
    short, _ = generate("llava", "opera", [1], stopping_criteria=StoppingCriteriaList([Enough(prompt + 5)]))
    assert short.sequences.shape[1] == prompt + 5
    tokenizer = make_tokenizer([])
    texts = [tokenizer.decode([token]) for token in whole.sequences[0, prompt:].tolist()]
    word = next(text for text in texts if text.isascii() and text.isprintable())
    stopped, _ = generate("llava", "opera", [1], stop_strings=[word], tokenizer=tokenizer)
    assert word in tokenizer.decode(stopped.sequences[0, prompt:])
    assert word not in tokenizer.decode(stopped.sequences[0, prompt:-1])
    with pytest.raises(vlmfix.VlmfixError, match="tokenizer"):
        generate("llava", "opera", [1], stop_strings=[word])


def test_the_end_token_ends_a_sequence_and_shorter_ones_are_filled_up():
    whole, _ = generate("llava", "opera", [1])
    prompt = whole.sequences.shape[1] - 12
    end = int(whole.sequences[0, prompt + 1])
    options = {"eos_token_id": end, "pad_token_id": 0, "num_return_sequences": 5, "early_stopping": True}
    out, _ = generate("llava", "opera", [1, 1], **options)
    ended = [row for row in out.sequences[:, prompt:].tolist() if end in row]
    assert any(len(row) > row.index(end) + 1 for row in ended)
    for row in ended:
        assert not any(row[row.index(end) + 1 :])


def test_a_prefill_in_chunks_and_eager_attention_change_nothing():
    whole, _ = generate("qwen2_5_vl", "opera", [1, 0])
    tiny = build("qwen2_5_vl", fresh=True)
    tiny.model.set_attn_implementation("eager")
    settings = {"max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True}
    with vlmfix.wrap(tiny.model, None, "opera") as vlm:
        eager = vlm.generate(**tiny.inputs([1, 0]), **settings)
    assert torch.equal(whole.sequences, eager.sequences)
    torch.testing.assert_close(whole.sequences_scores, eager.sequences_scores, atol=2e-5, rtol=0)


def test_attention_methods_go_along():
    var = "var(sink_dims=(3,4),tau=1.02,min_mass=0,keep_ratio=0,variant=reference)"
    alone, _ = generate("llava", "opera", [1])
    both, _ = generate("llava", f"{var}+opera", [1])
    assert not torch.equal(alone.sequences_scores, both.sequences_scores)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"do_sample": True}, "do_sample"),
        ({"streamer": TextStreamer(make_tokenizer([]))}, "streamer"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"output_attentions": True}, "output_attentions"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [20]}, "prefix_allowed_tokens_fn"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(options, named):
    with pytest.raises(vlmfix.Refusal, match=named):
        generate("llava", "opera", [1], **options)


def test_methods_that_act_by_distance_are_refused():
    with pytest.raises(vlmfix.Refusal, match="locore"):
        generate("llava", "locore(beta=3)+opera", [1])


def test_forwards_inside_a_context_are_refused():
    tiny = build("llava", seed=1)
    with vlmfix.applied(tiny.model, None, "opera"):
        got = tiny.model.generate(**tiny.inputs([1]), max_new_tokens=3, do_sample=False)
        assert got.shape[0] == 1
        with pytest.raises(vlmfix.Refusal, match="call generate"):
            tiny.model(**tiny.inputs([1]))


# --- the rules -------------------------------------------------------------------------------------------------------


def test_columns_are_products_down_to_the_last_row():
    method, weights = OPERA(scale=2.0), torch.rand(4, 4).tril()
    sums = torch.zeros(0)
    for row in range(4):
        sums = method.extend(sums, weights[row, : row + 1])
    want = [float(torch.stack([2 * weights[i, j] for i in range(j, 4)]).prod()) for j in range(4)]
    torch.testing.assert_close(sums.exp(), torch.tensor(want))
    torch.testing.assert_close(column_scores(sums, False), 1e-7 * torch.tensor(want))


def test_column_scores_stay_finite_unless_rounded_as_the_reference():
    sums = torch.tensor([1000.0, 0.0])
    assert column_scores(sums, False).isfinite().all()
    assert column_scores(sums, False)[1] > 0
    assert column_scores(sums, True).tolist() == [float("inf"), column_scores(torch.zeros(1), True).item()]


def test_places_are_the_smallest_of_the_most_frequent_and_the_first_of_equals():
    assert mode((5, 3, 3, 5, 9)) == 3
    _, places = OPERA().judge(torch.zeros(1, 2, 12), torch.zeros(1, 2))
    assert places == (0,)


def test_back_needs_every_beam_and_a_late_place():
    method = OPERA(threshold=2)
    assert method.back([(12, 12)] * 3) == (13, 12)
    assert method.back([(12, 12)] * 2) == ()
    assert method.back([(12, 11)] * 3) == ()
    assert method.back([(9, 9)] * 5) == ()
    assert OPERA(threshold=None).back([(12, 12)] * 99) == ()


@pytest.mark.parametrize(
    "setting", ["candidates=0", "candidates=1.5", "threshold=-1", "alpha=-1", "scale=0", "num_beams=0", "rollbacks=0.5"]
)
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(vlmfix.VlmfixError, match=setting.split("=")[0]):
        vlmfix.wrap(build("llava").model, None, f"opera({setting})")


def test_a_sample_is_over_when_no_beam_can_become_better():
    beams = Beams.first(torch.zeros(5), 2)
    none = torch.zeros(1, dtype=torch.long)
    worse = Keeper(2, 4, 1.0, False, 9)
    done = tuple(Finished(score, none, none) for score in (-0.1, -0.2))
    scores = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]] * 2)
    kept = replace(beams, finished=done)

    def never(tokens):
        return torch.zeros(len(tokens), dtype=torch.bool)

    assert worse.choose(kept, scores, never).done
    assert not worse.choose(beams, scores, never).done
    assert not Keeper(2, 4, 1.0, "never", 9).choose(kept, scores, never).done
