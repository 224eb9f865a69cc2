import sys
import types

import pytest
from vlmfix.eval.benchmarks import amber_words
from vlmfix.eval.benchmarks.amber import Amber

from vlmfix.errors import UsageError

from .coco_world import named, sums, write


def test_the_published_items():
    items = Amber().items()
    assert len(items) == 15220
    kinds = [item.truth["kind"] for item in items]
    counted = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    assert counted == {
        "generative": 1004,
        "state": 4764,
        "number": 2072,
        "action": 792,
        "existence": 4924,
        "relation": 1664,
    }
    relation = [item.truth["label"] for item in items if item.truth["kind"] == "relation"]
    assert (relation.count("yes"), relation.count("no")) == (975, 689)
    assert {item.truth["label"] for item in items if item.truth["kind"] == "existence"} == {"no"}
    assert items[0].image == "AMBER_1.jpg"
    assert items[1004].prompt == "Is the sky sunny in this image?"
    assert [len(Amber(part=part).items()) for part in ("generative", "discriminative")] == [1004, 14216]


@pytest.mark.parametrize(
    ("text", "covered", "cog", "wrong"),
    [
        ("A sky and a path.", [1, 1], [0], []),  # path is an associate of road
        ("A dog, two dogs.", [0, 0], [1], ["dog", "dog"]),
        ("A camera and a sign.", [0, 0], [0], []),  # safe words
        ("Trees", [0, 0], [0], []),  # capitals are not in the vocabulary
        ("The sky can be seen.", [1, 0], [0], []),
        ("A can of beer.", [0, 0], [0], ["can", "beer"]),
        ("Three men, some women.", [0, 0], [0], ["woman"]),  # WordNet has men as a noun of its own
    ],
)
def test_descriptions_by_hand(text, covered, cog, wrong):
    truth = ([["sky"], ["road", "path", "street", "ground"]], [["dog"]], ["camera", "sign"])
    found = amber_words.flags(amber_words.amber_nouns()(text), *truth, amber_words.exact())
    assert found == (covered, cog, wrong)


def test_similar_words_are_forgiven_or_counted_as_the_likely_ones():
    def similar(one, other):
        return 0.9 if {one, other} in ({"ship", "boat"}, {"fox", "dog"}) else 0.8

    covered, cog, wrong = amber_words.flags(["boat", "fox", "car"], [["ship"]], [["dog"]], [], similar)
    assert (covered, cog, wrong) == ([1], [1], ["fox", "car"])  # 0.8 itself is not enough


def test_spacy_is_asked_for_by_name_and_refused_by_name(monkeypatch):
    amber_words.spacy_lg.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UsageError, match="spacy download en_core_web_lg, or choose similarity exact"):
        Amber(similarity="spacy-lg").score([{"id": "1", "text": "A sky."}])

    class Word(str):
        def similarity(self, other):
            return 0.9 if {self, other} == {"hill", "mountain"} else 0.0

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=lambda name: Word))
    amber_words.spacy_lg.cache_clear()
    similar = amber_words.spacy_lg()
    assert (similar("hill", "mountain"), similar("hill", "sky")) == (0.9, 0.0)
    amber_words.spacy_lg.cache_clear()
    assert Amber(similarity="spacy-lg").label == "amber[all,table nouns,spacy-lg,exact]"


def test_amber_score_joins_both_parts():
    answers = [{"id": "1", "text": "A sky and a dog."}, {"id": "1005", "text": "No"}, {"id": "1006", "text": "No"}]
    score = Amber().score(answers)
    figures = score.figures()
    assert next(iter(figures)) == "amber"
    assert figures["amber"] == pytest.approx((100 - figures["chair"] + figures["f1"]) / 2)
    assert figures["chair"] == pytest.approx(50, abs=0.1)
    assert figures["recall"] == pytest.approx(100, abs=0.1)
    assert figures["precision"] == pytest.approx(50, abs=0.1)
    assert score.details["1"]["hallucinated"] == [{"start": 12, "end": 15, "word": "dog", "hallucinated": True}]
    assert "amber" not in Amber(part="generative").score(answers[:1]).metrics
    assert "chair" not in Amber(part="discriminative").score(answers[1:]).metrics
    kinds = named(Amber(part="discriminative").score(answers))
    assert kinds["answers whose id is not in the benchmark"] == ["1"]


@pytest.mark.parametrize(("rule", "right"), [("exact", 0), ("opera_pai", 2), ("contains", 2)])
def test_answers_are_normalised_by_name_only(rule, right):
    score = Amber(part="discriminative", answers=rule).score(
        [{"id": "1005", "text": "Yes, it is."}, {"id": "1006", "text": "No."}]
    )
    assert sums(score)["all/right"] == right
    assert score.figures()["unparsed"] == (100 if rule == "exact" else 0)
    assert ("answers that are neither Yes nor No, wrong" in named(score)) == (rule == "exact")


def test_items_from_a_coco_folder(tmp_path):
    benchmark = Amber(coco=write(tmp_path), suffix=" Please answer yes or no.")
    items = benchmark.items()
    assert items == Amber(coco=tmp_path, suffix=" Please answer yes or no.").items()
    described = [item for item in items if item.truth["kind"] == "generative"]
    assert len(described) == 6
    assert len({item.id for item in items}) == len(items)
    truth = next(item.truth for item in described if item.image == "000012.png")
    assert [words[0] for words in truth["truth"]] == ["cup", "fork", "dining table", "person"]
    likely = [words[0] for words in truth["hallu"]]
    assert likely[0] == "dog"  # with person twice
    assert not {"cup", "person"} & set(likely)
    asked = {i.prompt: i.truth["label"] for i in items if i.image == "000010.png" and "label" in i.truth}
    assert asked["Is there a car in this image? Please answer yes or no."] == "no"
    sides = [(p, label) for p, label in asked.items() if "left side" in p or "right side" in p]
    assert sorted(label for _, label in sides) == ["no", "yes"]
    yes = next(prompt for prompt, label in sides if label == "yes")
    assert yes.startswith(("Is the person on the left side of the cat?", "Is the cat on the right side of the person?"))
    answers = [{"id": i.id, "text": i.truth["label"].capitalize()} for i in items if "label" in i.truth]
    answers += [{"id": i.id, "text": "I see dining tables and a puppy."} for i in described]
    score = benchmark.score(answers)
    figures = score.figures()
    assert figures["accuracy"] == pytest.approx(100, abs=0.1)
    assert figures["relation/f1"] == pytest.approx(100, abs=0.1)
    assert "state/f1" not in figures
    assert score.details["000012/description"]["nouns"] == ["dining table", "dog"]
    assert figures["hal"] > 80


def test_wrong_names_are_refused():
    with pytest.raises(UsageError, match="did you mean generative"):
        Amber(part="generativ")
