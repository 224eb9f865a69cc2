"""Greedy figures of a checkpoint on the scenes and the tests of its validity, scored by exact names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from pico_data import prefix
from pico_model import BOS, PAD, prompt_text
from vlmfix.eval import scenes
from vlmfix.eval.scenes import Scene, World
from vlmfix.eval.scenes.text import PLURALS, SINGULARS, article

FORMS = {
    form: name for name in scenes.NAMES for form in (name, PLURALS.get(name, name + "s"), SINGULARS.get(name, name))
}
MENTION = re.compile(r"\b(" + "|".join(sorted(map(re.escape, FORMS), key=len, reverse=True)) + r")\b")
CAPTION_PROMPT = "Please describe this image in detail."


def mentions(text: str) -> list[tuple[str, str, int]]:
    """(category, form, character offset) of every object named, longest names first."""
    return [(FORMS[m[1]], m[1], m.start()) for m in MENTION.finditer(text)]


def chair(captions: Sequence[str], drawn: Sequence[Scene]) -> dict[str, float]:
    """CHAIR_s, CHAIR_i, recall, share of false objects frequent in the kind of scene (all in percent), mean words."""
    hit = wrong = named = found = present = typical = 0
    for text, scene in zip(captions, drawn, strict=True):
        truth, said = set(scene.counts), [name for name, _, _ in mentions(text)]
        false = [name for name in said if name not in truth]
        hit, wrong, named = hit + bool(false), wrong + len(false), named + len(said)
        found, present = found + len(truth & set(said)), present + len(truth)
        typical += sum(name in scene.frequent for name in false)
    return {
        "chair_s": 100 * hit / len(captions),
        "chair_i": 100 * wrong / max(named, 1),
        "recall": 100 * found / present,
        "typical_share": 100 * typical / max(wrong, 1),
        "words": sum(len(text.split()) for text in captions) / len(captions),
    }


def pope_questions(drawn: Sequence[Scene], world: World, seed: int = 0) -> dict[str, list[tuple[int, str, bool]]]:
    """POPE's three samplings: (row, category, present) of up to three present and as many absent objects per picture.

    Absent ones are random, the most frequent in training (popular), or those most often together in training with the
    present ones (adversarial).
    """
    together, single = Counter[tuple[str, str]](), Counter[str]()
    for scene in scenes.scenes("typical", 1, 4000, world):
        names = list(scene.counts)
        single.update(names)
        together.update((a, b) for a in names for b in names if a != b)
    rng = np.random.default_rng(seed)
    asked: dict[str, list[tuple[int, str, bool]]] = {"random": [], "popular": [], "adversarial": []}
    for row, scene in enumerate(drawn):
        present = list(scene.counts)
        absent = [name for name in scenes.NAMES if name not in scene.counts]
        yes = [present[i] for i in rng.permutation(len(present))[:3]]
        score = {name: sum(together[other, name] for other in present) for name in absent}
        negatives = {
            "random": [absent[i] for i in rng.permutation(len(absent))[: len(yes)]],
            "popular": sorted(absent, key=single.__getitem__, reverse=True)[: len(yes)],
            "adversarial": sorted(absent, key=score.__getitem__, reverse=True)[: len(yes)],
        }
        for kind, names in negatives.items():
            asked[kind] += [(row, name, True) for name in yes] + [(row, name, False) for name in names]
    return asked


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, world: World, split: str, n: int, batch: int = 250) -> dict[str, Any]:
    """All figures of a loaded checkpoint on the first `n` scenes of a split, seed 0."""
    drawn = list(islice(scenes.scenes(split, 0, n, world), n))
    parts = [scenes.compose(scenes.pack(drawn[i : i + batch]).to(model.device))[0] for i in range(0, n, batch)]
    pictures = (torch.cat(parts).float() / 127.5 - 1).to(model.dtype)
    captions = caption_all(model, tokenizer, pictures, batch)
    result: dict[str, Any] = {
        "pictures": n,
        "split": split,
        "captions": chair(captions, drawn),
        "pope": {},
        "pope_shuffled": {},
    }
    asked = pope_questions(drawn, world)
    for kind, items in asked.items():
        result["pope"][kind] = pope(model, tokenizer, pictures, items, batch)
        result["pope_shuffled"][kind] = pope(model, tokenizer, pictures.roll(1, 0), items, batch)
    likely = [(row, name, False) for row, s in enumerate(drawn) for name in s.frequent if name not in s.counts]
    result["yes_to_absent_typical"] = 100 - pope(model, tokenizer, pictures, likely, batch)["accuracy"]
    result["blind_rank"] = blind_rank(model, tokenizer, captions, drawn, batch)
    result["examples"] = [
        {"scene": s.kind, "truth": dict(s.counts), "caption": c} for s, c in zip(drawn[:8], captions[:8], strict=True)
    ]
    return result


def caption_all(model: Any, tokenizer: Any, pictures: torch.Tensor, batch: int) -> list[str]:
    """Greedy captions by transformers' own generate."""
    ids = prefix(tokenizer) + tokenizer.encode(f"\n{CAPTION_PROMPT} ASSISTANT:", add_special_tokens=False)
    captions: list[str] = []
    for some in pictures.split(batch):
        inputs = torch.tensor([ids] * len(some), device=model.device)
        out = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            pixel_values=some,
            max_new_tokens=128,
            do_sample=False,
        )
        captions += tokenizer.batch_decode(out[:, len(ids) :], skip_special_tokens=True)
    return [text.strip() for text in captions]


def pope(
    model: Any, tokenizer: Any, pictures: torch.Tensor, items: list[tuple[int, str, bool]], batch: int
) -> dict[str, float]:
    """Accuracy, yes ratio and F1 in percent. The likeliest token is the answer; all but yes count as no."""
    tails = [
        tokenizer.encode(f"\nIs there {article(name)} in the image? ASSISTANT:", add_special_tokens=False)
        for _, name, _ in items
    ]
    yes_id = tokenizer.encode(" Yes", add_special_tokens=False)[0]
    said = np.zeros(len(items), bool)
    head = prefix(tokenizer)
    by_length: dict[int, list[int]] = {}
    for i, tail in enumerate(tails):
        by_length.setdefault(len(tail), []).append(i)
    for group in by_length.values():
        for start in range(0, len(group), batch):
            chosen = group[start : start + batch]
            inputs = torch.tensor([head + tails[i] for i in chosen], device=model.device)
            rows = torch.tensor([items[i][0] for i in chosen], device=pictures.device)
            logits = model(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), pixel_values=pictures[rows], logits_to_keep=1
            ).logits
            said[chosen] = (logits[:, -1].argmax(-1) == yes_id).cpu().numpy()
    truth = np.array([label for _, _, label in items])
    right = int((said & truth).sum())
    return {
        "accuracy": 100 * float((said == truth).mean()),
        "yes_ratio": 100 * float(said.mean()),
        "f1": 100 * 2 * right / max(int(said.sum() + truth.sum()), 1),
        "questions": len(items),
    }


def blind_rank(
    model: Any, tokenizer: Any, captions: Sequence[str], drawn: Sequence[Scene], batch: int, others: int = 4
) -> dict[str, float]:
    """How often, without the picture, a hallucinated object is likelier than a random absent one there (percent)."""
    rng = np.random.default_rng(0)
    rows: list[tuple[list[int], list[int]]] = []
    opening = prompt_text(CAPTION_PROMPT, picture=False)
    for text, scene in zip(captions, drawn, strict=True):
        said = {name for name, _, _ in mentions(text)}
        absent = [name for name in scenes.NAMES if name not in scene.counts and name not in said]
        for name, form, at in mentions(text):
            if name in scene.counts:
                continue
            plural = form == PLURALS.get(name, name + "s")
            rivals = [absent[i] for i in rng.permutation(len(absent))[:others]]
            forms = [form] + [PLURALS.get(r, r + "s") if plural else SINGULARS.get(r, r) for r in rivals]
            before = [BOS, *tokenizer.encode(f"{opening} {text[:at].rstrip()}", add_special_tokens=False)]
            rows += [(before, tokenizer.encode(" " + form, add_special_tokens=False)) for form in forms]
    scores: list[float] = []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        longest = max(len(a) + len(b) for a, b in some)
        ids = torch.tensor([a + b + [PAD] * (longest - len(a) - len(b)) for a, b in some], device=model.device)
        logp = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits.float().log_softmax(-1)
        for i, (a, b) in enumerate(some):
            scores.append(float(sum(logp[i, len(a) - 1 + k, token] for k, token in enumerate(b))))
    table = np.array(scores).reshape(-1, others + 1)
    return {
        "objects": len(table),
        "above_random": 100 * float((table[:, :1] > table[:, 1:]).mean()) if len(table) else float("nan"),
    }
