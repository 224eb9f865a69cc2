"""Where a picture matches a text: GradCAM of a BLIP image-text-matching checkpoint."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vlmfix.errors import UsageError


class Matcher:
    """A matching model.

    Args:
        model: a BlipForImageTextRetrieval.
        processor: its processor.
        block: cross-attention block of the text encoder; the middle one by default (6 of 12, as AGLA's).
    """

    def __init__(self, model: Any, processor: Any, block: int | None = None) -> None:
        self.model, self.processor = model.eval(), processor
        layers = model.text_encoder.encoder.layer
        self._attention = layers[len(layers) // 2 if block is None else block].crossattention.self

    def relevance(self, picture: Tensor, text: str) -> tuple[Tensor, float]:
        """How much each patch matches a text (AGLA, arXiv 2406.12718).

        Args:
            picture: [channels, height, width] in [0, 1]; stretched to the model's square.
            text: the question.

        Returns:
            [rows, columns] map, and the cosine similarity of picture and text.
        """
        model: Any = self.model
        side = model.config.vision_config.image_size
        images = self.processor.image_processor
        mean, std = (torch.tensor(x)[:, None, None] for x in (images.image_mean, images.image_std))
        square = interpolate(picture[None].float().cpu(), (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = ((square[0] - mean) / std)[None].to(model.device, model.dtype)
        tokens = self.processor.tokenizer(plain_text(text), return_tensors="pt").to(model.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        with torch.inference_mode(False), torch.enable_grad():
            states = model.vision_model(pixel_values=pixels.clone()).last_hidden_state.detach().requires_grad_()
            weights, score = self._matched(ids, mask, states)
            (slope,) = torch.autograd.grad(score, weights)
        with torch.no_grad():
            words = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
            seen = model.vision_proj(states[:, 0])
            similarity = torch.cosine_similarity(seen, model.text_proj(words)).item()
        patches = side // model.config.vision_config.patch_size
        return gradcam(weights.detach(), slope, (patches, patches)).cpu(), similarity

    def _matched(self, ids: Tensor, mask: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention [1, H, T, patches + 1] of the block, and the logit of a match."""
        seen: list[Tensor] = []
        hook = self._attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        try:
            out = self.model.text_encoder(
                input_ids=self._encoder_ids(ids),
                attention_mask=mask,
                encoder_hidden_states=states,
                encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
            )
        finally:
            hook.remove()
        return seen[0], self.model.itm_head(out.last_hidden_state[:, 0])[:, 1].sum()

    def _encoder_ids(self, ids: Tensor) -> Tensor:
        """The first token replaced by [ENC] where the tokenizer has it, as the matching head was trained."""
        encode = self.processor.tokenizer.get_vocab().get("[ENC]")
        if encode is None or encode >= self.model.config.text_config.vocab_size:
            return ids
        return torch.cat([torch.full_like(ids[:, :1], encode), ids[:, 1:]], 1)


def gradcam(weights: Tensor, slope: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over heads and over text tokens but the first and last of attention times its positive gradient.

    Args:
        weights: [1, H, T, patches + 1] cross-attention, the class patch first.
        slope: its gradient.
        grid: rows and columns of the patches.

    Returns:
        [rows, columns].
    """
    product = (weights * slope.clamp(min=0))[0, :, 1:-1, 1:]
    return product.mean((0, 1)).float().view(grid)


def plain_text(text: str) -> str:
    """Lower case without punctuation, as BLIP's captions."""
    kept = "".join(" " if char in '.!"()*#:;~-' else char for char in text.lower())
    return " ".join(kept.split())[:400]


@lru_cache(maxsize=1)
def load(name: str) -> Matcher:
    """Loads a matching checkpoint; the last one stays in memory.

    Raises:
        UsageError: it cannot be loaded, or is of another kind.
    """
    from transformers import AutoProcessor, BlipForImageTextRetrieval

    try:
        return Matcher(BlipForImageTextRetrieval.from_pretrained(name), AutoProcessor.from_pretrained(name))
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{name!r} could not be loaded as a BLIP image-text-matching model ({error}); give a Hub id such as "
            "Salesforce/blip-itm-large-coco, a folder, or source=own"
        ) from error
