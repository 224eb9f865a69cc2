"""Greedy figures of a checkpoint on the scenes and the tests of its validity, scored by exact names."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from pico_data import attend, prefix
from pico_model import BOS, PAD, VISUAL, prompt_text, read, see
from transformers import AutoModelForImageTextToText, AutoProcessor
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
def evaluate(model: Any, tokenizer: Any, world: World, split: str, n: int, batch: int = 125) -> dict[str, Any]:
    """All figures of a loaded checkpoint on the first `n` scenes of a split, seed 0."""
    drawn = list(scenes.scenes(split, 0, n, world))
    pictures = torch.cat(
        [scenes.compose(scenes.pack(drawn[i : i + batch]).to(model.device))[0] for i in range(0, n, batch)]
    )
    captions = caption_all(model, tokenizer, pictures, batch)
    asked = pope_questions(drawn, world)
    likely = [(row, name, False) for row, s in enumerate(drawn) for name in s.frequent if name not in s.counts]
    wanted = [(row, name) for items in (*asked.values(), likely) for row, name, _ in items]
    told = answers(model, tokenizer, pictures, wanted, batch)
    blurred = answers(model, tokenizer, pictures.roll(1, 0), wanted, batch)
    return {
        "split": split,
        "pictures": n,
        "captions": chair(captions, drawn),
        "pope": {kind: pope(told, items) for kind, items in asked.items()},
        "pope_shuffled": {kind: pope(blurred, items) for kind, items in asked.items()},
        "yes_to_absent_typical": pope(told, likely)["yes_ratio"],
        "blind_rank": blind_rank(model, tokenizer, captions, drawn, batch),
        "examples": [
            {"scene": s.kind, "truth": dict(s.counts), "caption": c}
            for s, c in zip(drawn[:8], captions[:8], strict=True)
        ],
    }


def caption_all(model: Any, tokenizer: Any, pictures: torch.Tensor, batch: int) -> list[str]:
    """Greedy captions by transformers' own generate."""
    ids = prefix(tokenizer) + tokenizer.encode(f"\n{CAPTION_PROMPT} ASSISTANT:", add_special_tokens=False)
    captions: list[str] = []
    for some in pictures.split(batch):
        pixels = (some.float() / 127.5 - 1).to(model.dtype)
        inputs = torch.tensor([ids] * len(some), device=model.device)
        out = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            pixel_values=pixels,
            max_new_tokens=128,
            do_sample=False,
        )
        captions += tokenizer.batch_decode(out[:, len(ids) :], skip_special_tokens=True)
    return [text.strip() for text in captions]


def answers(
    model: Any, tokenizer: Any, pictures: torch.Tensor, asked: Sequence[tuple[int, str]], batch: int
) -> dict[tuple[int, str], bool]:
    """Whether the model says yes to "Is there a NAME in the image?" of picture `row`, for every (row, name).

    The likeliest token is the answer; all but yes count as no. All questions about a picture stand in one row, blind
    to each other as in training, which gives what one question at a time gives.
    """
    head = prefix(tokenizer)
    yes = tokenizer.encode(" Yes", add_special_tokens=False)[0]
    names: dict[int, list[str]] = {}
    for row, name in dict.fromkeys(asked):
        names.setdefault(row, []).append(name)
    tails = {
        name: tokenizer.encode(f"\nIs there {article(name)} in the image? ASSISTANT:", add_special_tokens=False)
        for name in scenes.NAMES
    }
    told: dict[tuple[int, str], bool] = {}
    rows = list(names)
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        length = max(sum(len(tails[name]) for name in names[row]) for row in some)
        text, turn, position = (torch.zeros(len(some), length, dtype=torch.int64) for _ in range(3))
        ends: list[tuple[int, int, int, str]] = []
        for i, row in enumerate(some):
            at = 0
            for k, name in enumerate(names[row], 1):
                end = at + len(tails[name])
                text[i, at:end], turn[i, at:end] = torch.tensor(tails[name]), k
                position[i, at:end] = torch.arange(len(head), len(head) + end - at)
                ends.append((i, len(head) + end - 1, row, name))
                at = end
        hidden = packed_hidden(model, head, pictures[some], text, turn, position)
        logits = model.lm_head(hidden[[e[0] for e in ends], [e[1] for e in ends]])
        for (_, _, row, name), said in zip(ends, (logits.argmax(-1) == yes).tolist(), strict=True):
            told[row, name] = said
    return told


def packed_hidden(
    model: Any, head: list[int], pictures: torch.Tensor, text: torch.Tensor, turn: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Last hidden states [B, S, hidden] of prefix and packed turns."""
    device, table = model.device, model.get_input_embeddings()
    seen = see(model, pictures)
    before = table(torch.tensor(head[: len(head) - VISUAL], device=device)).expand(len(text), -1, -1)
    embeds = torch.cat([before, seen.to(before.dtype), table(text.to(device))], 1)
    places = torch.cat([torch.arange(len(head)).expand(len(text), -1), position], 1)
    return read(model, embeds, attend(turn.to(device), len(head)), places.to(device))


def pope(told: dict[tuple[int, str], bool], items: Sequence[tuple[int, str, bool]]) -> dict[str, float]:
    """Accuracy, yes ratio and F1 in percent, and the number of questions."""
    said = np.array([told[row, name] for row, name, _ in items])
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
    encode = partial(tokenizer.encode, add_special_tokens=False)
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
            before = [BOS, *encode(f"{opening} {text[:at].rstrip()}")]
            rows += [(before, encode(" " + form)) for form in forms]
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


def validity(result: dict[str, Any]) -> dict[str, Any]:
    """Is it a test bed: does it look, does it err by its prior, and does the prior alone point at the errors?"""
    drop = {
        kind: result["pope"][kind]["accuracy"] - result["pope_shuffled"][kind]["accuracy"] for kind in result["pope"]
    }
    return {
        "shuffled_pictures_cost": drop,
        "shuffled_pictures_cost_20": min(drop.values()) >= 20,
        "typical_share_60": result["captions"]["typical_share"] >= 60,
        "blind_rank_above_random": result["blind_rank"]["above_random"] > 50,
    }


def main() -> None:
    """Evaluate a checkpoint that exists; the figures replace those in its log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--log", type=Path, required=True, help="JSON log to update")
    parser.add_argument("--splits", default="test")
    parser.add_argument("--pictures", type=int, default=1000)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(options.folder, dtype=dtype).to(device).eval()
    tokenizer = AutoProcessor.from_pretrained(options.folder).tokenizer
    report = json.loads(options.log.read_text()) if options.log.exists() else {}
    report |= evaluation(model, tokenizer, scenes.WORLD, options.splits.split(","), options.pictures)
    options.log.write_text(json.dumps(report, indent=1) + "\n")


def evaluation(model: Any, tokenizer: Any, world: World, splits: Sequence[str], n: int) -> dict[str, Any]:
    """Figures and validity on each split, with what they were computed on."""
    figures = {split: evaluate(model, tokenizer, world, split, n) for split in splits}
    return {
        "figures": figures,
        "validity": {split: validity(result) for split, result in figures.items()},
        "figures_world": asdict(world),
        "figures_on": [model.device.type, str(model.dtype), f"transformers {transformers.__version__}"],
    }


if __name__ == "__main__":
    main()
