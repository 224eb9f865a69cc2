"""Train pico, export it in bfloat16, evaluate it greedily on shifted scenes and test its validity.

    python scripts/train_pico.py --out vlmfix/pico --log docs/pico_seed0.json

Takes at most eight minutes on one H200. With `--tiny` it goes through every step in a minute on a CPU, learning
nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from pico_data import Batches, attend, prefix
from pico_eval import evaluation
from pico_model import compile_layers, export, make_model, make_tokenizer, read, see
from PIL import Image
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlmfix.eval import scenes
from vlmfix.eval.scenes import WORLD, Packed, World

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader forks

PATCH_WEIGHT = 0.3
"""Weight of the helping task: naming, from each visual token, the category that owns its patch."""


def main() -> None:
    """Parse, train, export, evaluate, log."""
    started = time.time()
    options = parse()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = {name: getattr(options, name) for name in DIALS if getattr(options, name) is not None}
    if options.faded:
        chosen["faded"] = tuple(options.faded)
    world = replace(WORLD, **chosen)
    if options.start:
        tokenizer = AutoProcessor.from_pretrained(options.start).tokenizer
        model = AutoModelForImageTextToText.from_pretrained(options.start, dtype=torch.float32).to(device)
    else:
        tokenizer = make_tokenizer(world)
        model = make_model().to(device)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{parameters:,} parameters, world {world}")
    losses = train(model, tokenizer, world, options, device, started)
    trained = time.time() - started
    options.out.mkdir(parents=True, exist_ok=True)
    export(model, tokenizer, options.out)
    copy = AutoModelForImageTextToText.from_pretrained(options.out, dtype=torch.bfloat16).to(device).eval()
    check_processor(options.out, world)
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": options.seed,
        "world": asdict(world),
        "parameters": parameters,
        "bytes": (options.out / "model.safetensors").stat().st_size,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "train_seconds": round(trained, 1),
        "losses": losses,
    }
    report |= evaluation(copy, tokenizer, world, options.splits.split(","), options.pictures)
    report["seconds"] = round(time.time() - started, 1)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    options.log.write_text(json.dumps(report, indent=1) + "\n")
    for split, result in report["figures"].items():
        say(
            split,
            json.dumps({k: v for k, v in result.items() if k != "examples"}),
            json.dumps(report["validity"][split]),
        )
    say(f"steps {losses[-1]['step']}, {trained:.0f} s of training, {report['seconds']:.0f} s in all")


DIALS = ("cooccurrence", "spread", "kept", "strangers", "hard", "noise", "likely_negatives", "faded")


def parse() -> argparse.Namespace:
    """Options; the defaults are the committed recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/pico"), help="folder of the checkpoint")
    parser.add_argument("--log", type=Path, default=Path("build/pico.json"), help="JSON log")
    parser.add_argument("--start", type=Path, help="continue from this checkpoint: a quick try of other dials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument(
        "--minutes", type=float, default=8, help="bound on training; the rate falls by whichever bound comes first"
    )
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--length", type=int, default=160, help="text tokens per picture")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--workers", type=int, default=10, help="processes that draw scenes and write text")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures evaluated per split")
    parser.add_argument("--splits", default="test", help="splits evaluated, comma separated")
    parser.add_argument("--tiny", action="store_true", help="four steps, four pictures")
    for name in DIALS[:-1]:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, help=f"dial of difficulty (default {getattr(WORLD, name)})"
        )
    parser.add_argument(
        "--faded", type=float, nargs=2, metavar=("LOW", "HIGH"), help=f"another (default {WORLD.faded})"
    )
    options = parser.parse_args()
    if options.tiny:
        options.steps, options.batch, options.workers, options.pictures = 4, 4, 0, 4
    return options


def train(
    model: Any, tokenizer: Any, world: World, options: argparse.Namespace, device: str, started: float
) -> list[dict[str, float]]:
    """The training loop; returns losses every 100 steps."""
    head = prefix(tokenizer)
    head_ids = torch.tensor(head, device=device)
    visual = len(head) - (scenes.IMAGE_SIZE // 8) ** 2
    patches = torch.nn.Linear(model.config.text_config.hidden_size, len(scenes.NAMES) + 1).to(device)
    if device == "cuda":
        compile_layers(model)
    parameters = [*model.parameters(), *patches.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98), fused=device == "cuda")
    data = Batches(tokenizer, world, options.seed, options.batch, options.length)
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=options.workers,
        pin_memory=device == "cuda",
        prefetch_factor=4 if options.workers else None,
    )
    sprites = scenes.atlas().to(device)
    log: list[dict[str, float]] = []
    warm = min(200, options.steps // 10 + 1)
    for step, batch in enumerate(loader):
        progress = max(step / options.steps, (time.time() - started) / (60 * options.minutes))
        if progress >= 1:
            break
        rate = options.rate * min(1, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        text, turn, position, weight = (
            batch[name].to(device, non_blocking=True) for name in ("text", "turn", "position", "weight")
        )
        packed = Packed(**batch["scenes"]).to(device)
        with torch.no_grad():
            pictures, visible = scenes.compose(packed, sprites)
            owner = owners(visible, packed)
            mask = attend(turn, len(head))
            positions = torch.cat([torch.arange(len(head), device=device).expand(len(text), -1), position], 1)
        with torch.autocast(device, torch.bfloat16):
            seen = see(model, pictures)
            table = model.get_input_embeddings()
            before = table(head_ids[:visual]).expand(len(text), -1, -1)
            hidden = read(model, torch.cat([before, seen.to(before.dtype), table(text)], 1), mask, positions)
            logits = model.lm_head(hidden[:, len(head) : -1])
            each = cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten(), reduction="none")
            share = weight[:, 1:].flatten()
            spoken = (each * share).sum() / share.sum()
            named = cross_entropy(patches(seen).float().flatten(0, 1), owner.flatten(), ignore_index=-1)
        loss = spoken + PATCH_WEIGHT * named
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == options.steps - 1:
            log.append(
                {
                    "step": step,
                    "text": round(spoken.item(), 4),
                    "patches": round(named.item(), 4),
                    "rate": rate,
                    "seconds": round(time.time() - started, 1),
                }
            )
            if not math.isfinite(log[-1]["text"]):
                raise SystemExit(f"the loss is not finite at step {step}")
            say(json.dumps(log[-1]))
    return log


def owners(visible: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Category that owns most of each patch [B, patches]; the number of categories for the ground, -1 where unclear."""
    share = avg_pool2d(visible, 8).flatten(2)
    most, slot = share.max(1)
    label = packed.sprite.gather(1, slot)
    label = torch.where(most > 0.35, label, torch.full_like(label, -1))
    return torch.where(share.sum(1) < 0.02, torch.full_like(label, len(scenes.NAMES)), label)


def check_processor(folder: Path, world: World) -> None:
    """The exported processor must give the tokens and pixels that training used."""
    processor = AutoProcessor.from_pretrained(folder)
    picture = scenes.compose(scenes.pack([scenes.scene("test", 0, 0, world)]))[0]
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    made = processor(images=Image.fromarray(picture[0].permute(1, 2, 0).numpy()), text=text, return_tensors="pt")
    tail = processor.tokenizer.encode("\nDescribe the image. ASSISTANT:", add_special_tokens=False)
    if made["input_ids"][0].tolist() != prefix(processor.tokenizer) + tail:
        raise SystemExit("the exported processor does not give the tokens of training")
    if (made["pixel_values"] - (picture.float() / 127.5 - 1)).abs().max() > 1e-5:
        raise SystemExit("the exported processor does not give the pixels of training")


def say(*words: object) -> None:
    """One line of progress."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
