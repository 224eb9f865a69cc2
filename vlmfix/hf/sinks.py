"""Finding the massive-activation dimensions of a checkpoint by measurement."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmfix.hf.parts import Parts

PROMPTS = (
    "Describe the image.",
    "What is in the picture? Answer in one sentence.",
    "The quick brown fox jumps over the lazy dog.",
    "Is there a dog in the image?",
    "Write a short poem about the sea.",
    "How many people can you count?",
    "A kitchen has a stove, a sink and a table.",
    "Tell me what colour the car is.",
    "Yes.",
    "Summarise the following text in a few words.",
)
MOST = 4
SHARE = 0.8
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[int, ...]] = weakref.WeakKeyDictionary()


def sink_dims(parts: Parts, tokenizer: Any = None) -> tuple[int, ...]:
    """Hidden dimensions in which the residual stream of some token is massive, at most four.

    The recipe of "Massive Activations in Large Language Models" (arXiv 2402.17762) on ten text prompts: at the first
    token and at the token of largest norm, layers 3 to 0.8 L, |x_d| > 100 and at least 1000 times the token's
    median; where nothing passes, |x_d| / rms(x) > 0.3 sqrt(width). Kept are dimensions that pass in 80 % of (prompt,
    layer) pairs. The answer is kept for the process and on disk.

    Args:
        parts: the model.
        tokenizer: turns the prompts into ids; fixed random ids are used without one.

    Returns:
        Dimension indices, most frequent first; empty where the model has none.
    """
    if parts.model not in _FOUND:
        file = _cache_file(parts)
        found = _read(file)
        if found is None:
            found = _measure(parts, tokenizer)
            _write(file, found)
        _FOUND[parts.model] = found
    return _FOUND[parts.model]


@torch.no_grad()
def _measure(parts: Parts, tokenizer: Any) -> tuple[int, ...]:
    depth = parts.depth
    wanted = [layer for layer in parts.blocks if min(3, depth - 1) <= layer <= max(0.8 * depth, min(3, depth - 1))]
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[layer] = (args[0] if args else kwargs["hidden_states"])[0].float()

        return hook

    handles = [parts.blocks[layer].register_forward_pre_hook(keep(layer), with_kwargs=True) for layer in wanted]
    strict = torch.zeros(parts.hidden_size)
    loose = torch.zeros(parts.hidden_size)
    embedding = parts.model.get_input_embeddings()
    try:
        for number, prompt in enumerate(PROMPTS):
            ids = _ids(prompt, number, tokenizer, embedding.weight.shape[0]).to(embedding.weight.device)
            parts.decoder(inputs_embeds=embedding(ids), attention_mask=torch.ones_like(ids), use_cache=False)
            for layer in wanted:
                x = states[layer]
                rows = x[[0, int(x.norm(dim=-1).argmax())]].abs()
                massive = (rows > 100) & (rows >= 1000 * rows.median(-1, keepdim=True).values)
                large = rows / rows.square().mean(-1, keepdim=True).sqrt() > 0.3 * parts.hidden_size**0.5
                strict += massive.any(0).cpu()
                loose += large.any(0).cpu()
    finally:
        for handle in handles:
            handle.remove()
    pairs = len(PROMPTS) * len(wanted)
    counts = strict if (strict >= SHARE * pairs).any() else loose
    order = counts.argsort(descending=True)[:MOST].tolist()
    return tuple(d for d in order if counts[d] >= SHARE * pairs)


def _ids(prompt: str, number: int, tokenizer: Any, vocabulary: int) -> Tensor:
    if tokenizer is not None:
        return torch.as_tensor(tokenizer(prompt)["input_ids"]).view(1, -1)
    return torch.randint(vocabulary, (1, 12), generator=torch.Generator().manual_seed(number))


def _cache_file(parts: Parts) -> Path:
    """One file per set of weights: the text configuration and a sample of the weights name it."""
    digest = hashlib.sha256(json.dumps(parts.text_config.to_dict(), sort_keys=True, default=str).encode())
    for parameter in list(parts.decoder.parameters())[:: max(1, len(list(parts.decoder.parameters())) // 8)]:
        if parameter.device.type != "meta":
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "vlmfix" / "sinks" / f"{digest.hexdigest()[:32]}.json"


def _read(file: Path) -> tuple[int, ...] | None:
    try:
        return tuple(json.loads(file.read_text())["sink_dims"])
    except (OSError, ValueError, KeyError):
        return None


def _write(file: Path, found: tuple[int, ...]) -> None:
    """Best effort: a cache that cannot be written costs a second measurement, nothing else."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
            json.dump({"sink_dims": list(found)}, out)
        Path(out.name).replace(file)
