"""The families of vision-language models, as data; reading it imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass

BRANCHES = "yes"
INNER = "language-model"


@dataclass(frozen=True)
class Family:
    """What is known of one family.

    Args:
        name: transformers' model_type.
        decoder: the text decoder, in words.
        tokens: visual tokens per picture, in words (t, h, w: patches of the grid).
        visual: how visual tokens are found: by `ids`, a `position-mask`, or `cross-attention` behind one placeholder.
        mask: how prompt rows see each other, in the words of `vlmfix.layout.MaskKind`.
        types: per-token input without which `generate` silently reads the prompt as plain text; empty if none.
        branches: `yes`, `language-model` (at the inner model, which `generate` feeds embeddings), or `no: reason`.
        status: `tested` (on tiny random models of this family), `refused: reason`, or `untested`.
        processor: without torchvision the processor loads `plain`, as `image-only`, or needs `torchvision`; `unknown`
            if not tried.
        min_transformers: the oldest release in which the family works.
        replay: why a decoding step cannot be captured and replayed; empty where nothing speaks against it.
        notes: known limits; empty if none.
    """

    name: str
    decoder: str
    tokens: str
    visual: str = "ids"
    mask: str = "causal"
    types: str = ""
    branches: str = BRANCHES
    status: str = "tested"
    processor: str = "plain"
    min_transformers: str = "5.17"
    replay: str = ""
    notes: str = ""

    @property
    def replayed(self) -> str:
        """Whether a captured step can be replayed: yes, no and why, or unknown."""
        return f"no: {self.replay}" if self.replay else "yes" if self.status == "tested" else "unknown"

    @property
    def tiled(self) -> bool:
        """Whether pictures are cut into tiles, of which each becomes a picture of its own."""
        return "tiles" in self.tokens

    @property
    def spatial(self) -> bool:
        """Whether a visual token stands for a place in the picture, as queries of a resampler do not."""
        return not any(word in self.tokens for word in ("Q-Former", "resampler", "latent"))


MROPE = "mm_token_type_ids"
BEAMS = "beam search and num_return_sequences fail in transformers 5.23 itself (picture features are not repeated)"
RUNNING = "some of its layers keep running states instead of keys"
NEWLINES = "newline embeddings count as visual tokens"

_TESTED = (
    Family("llava", "any", "patches"),
    Family("llava_next", "any", "base view + tiles + a newline per row", notes=NEWLINES),
    Family(
        "llava_onevision",
        "any",
        "base view + tiles + a newline per row; base view + 1 with several pictures",
        processor="image-only",
        notes=NEWLINES,
    ),
    Family("qwen2_vl", "own, M-RoPE", "t·h·w/4", types=MROPE, processor="image-only"),
    Family("qwen2_5_vl", "own, M-RoPE", "t·h·w/4", types=MROPE, processor="image-only"),
    Family(
        "qwen3_vl",
        "own, M-RoPE",
        "t·h·w/4",
        types=MROPE,
        processor="image-only",
        notes="visual features are added again after the first layers (DeepStack): prune after those",
    ),
    Family("internvl", "any", "tiles x patches/4", processor="image-only"),
    Family(
        "idefics3",
        "any",
        "tiles x patches/scale²",
        notes="one run of visual tokens per tile; in 5.17 the processor needs torchvision",
    ),
    Family(
        "smolvlm",
        "any",
        "tiles x patches/scale²",
        processor="image-only",
        notes="one run of visual tokens per tile; the processor needs num2words, in 5.17 torchvision too",
    ),
    Family(
        "paligemma",
        "Gemma",
        "patches",
        mask="prefix",
        types="token_type_ids",
        notes="the prompt sees itself in both directions, so decoding without a cache differs from decoding with one",
    ),
    Family(
        "gemma3",
        "Gemma 3, sliding and full layers",
        "mm_tokens_per_image",
        mask="image-blocks",
        types="token_type_ids",
        notes="sliding layers hold only the last keys",
    ),
    Family(
        "mistral3",
        "Mistral",
        "(h/2)·(w/2), a separator after each row",
        processor="torchvision",
    ),
    Family("got_ocr2", "Qwen2", "(side/patch/4)²"),
    Family("instructblip", "any", "num_query_tokens (Q-Former)", branches=INNER, notes="exactly one picture per row"),
    Family("vipllava", "any", "patches"),
    Family(
        "llava_next_video",
        "any",
        "base view + tiles + a newline per row",
        processor="image-only",
        notes=NEWLINES,
    ),
    Family(
        "qwen3_vl_moe",
        "own, M-RoPE, experts",
        "t·h·w/4",
        types=MROPE,
        processor="image-only",
        notes="visual features are added again after the first layers (DeepStack): prune after those",
    ),
    Family(
        "qwen3_5",
        "own, M-RoPE, linear and full attention",
        "t·h·w/4",
        types=MROPE,
        processor="image-only",
        replay=RUNNING,
        notes="only the full-attention layers can be acted on; layer numbers have gaps",
    ),
    Family(
        "minicpmv4_6",
        "Qwen3.5, linear and full attention",
        "patches/16",
        processor="image-only",
        replay=RUNNING,
        notes="only the full-attention layers can be acted on; 5.17 takes pictures of one size per batch only",
    ),
    Family(
        "lfm2_vl",
        "LFM2, convolution and attention",
        "patches/4",
        processor="torchvision",
        replay=RUNNING,
        notes="only the attention layers can be acted on; layer numbers have gaps",
    ),
    Family("video_llama_3", "Qwen2", "t·h·w/merge²", processor="image-only"),
    Family("idefics2", "Mistral", "tiles x resampler latents"),
    Family(
        "gemma4",
        "own, sliding and full layers, shared keys",
        "patches/pooling²",
        mask="window",
        processor="unknown",
        replay="some of its layers keep no keys of their own",
        notes="head size differs between layers",
    ),
    Family("aya_vision", "Cohere2, sliding and full layers", "tiles x patches/4", mask="window"),
    Family(
        "cohere2_vision",
        "Cohere2, sliding and full layers",
        "tiles x patches/4",
        mask="window",
        processor="torchvision",
    ),
    Family("janus", "Llama", "patches", notes="text answers only"),
    Family("deepseek_vl", "Llama", "patches"),
    Family("ovis2", "Qwen2", "patches/stride², indicator tokens between tiles"),
    Family("glm4v", "own, M-RoPE", "t·h·w/4", types=MROPE, processor="image-only"),
    Family(
        "llama4",
        "own, chunked and full layers, experts",
        "tiles x patches·ratio², separators between tiles",
        mask="chunk",
        processor="torchvision",
        replay="its chunked layers see keys by their place in a chunk",
        notes=f"{BEAMS}; a static cache fails in 5.17 itself",
    ),
    Family("fuyu", "Persimmon", "patches, a newline token per row", min_transformers="5.23", notes=BEAMS),
    Family("chameleon", "own", "codes of the picture tokeniser"),
    Family(
        "molmo2",
        "own",
        "pooled patches of two views, a token after each row",
        mask="image-blocks",
        types=MROPE,
        processor="torchvision",
        min_transformers="5.23",
        notes="all pictures of a row form one bidirectional block",
    ),
    Family(
        "mllama",
        "own, self- and cross-attention layers",
        "1 placeholder; keys of the cross layers: pictures x 4 tiles x (patches + 1)",
        visual="cross-attention",
        branches="no: cross-attention ties every row to a picture",
        replay="its layers of cross-attention keep the keys of pictures in another form",
        notes="rows of one batch must have the same number of pictures: tokens before the first picture look at "
        "padding; a static cache fails in 5.17",
    ),
    Family("blip-2", "any", "num_query_tokens (Q-Former)", branches=INNER, notes="exactly one picture per row"),
    Family(
        "kosmos-2",
        "own",
        "latent_query_num",
        visual="position-mask",
        branches="no: its own generate neither passes keywords on nor pads rows equally",
        replay="its decoder takes no ready-made mask",
        notes="exactly one picture per row; left-padded rows differ in transformers itself, so the rows of a batch "
        "must have one length; a static cache fails",
    ),
)

_ENCODER = "refused: encoder-decoder, the picture stays in the encoder"
_OWN = "refused: the text decoder's attention is not reachable through transformers' attention interface"

_REFUSED = (
    Family("florence2", "BART", "in the encoder", branches="no", status=_ENCODER),
    Family("pix2struct", "own", "in the encoder", branches="no", status=_ENCODER),
    Family("vision-encoder-decoder", "any", "in the encoder", branches="no", status=_ENCODER),
    Family("pp_formulanet", "own", "in the encoder", branches="no", status=_ENCODER, processor="torchvision"),
    Family("t5gemma2", "Gemma 3", "in the encoder", branches="no", status=_ENCODER),
    Family("udop", "T5", "in the encoder", branches="no", status=_ENCODER),
    Family("blip", "BERT", "cross-attention", branches="no", status=_OWN),
    Family("git", "own", "patches", branches="no", status=_OWN),
    Family(
        "pi0", "Gemma", "patches", branches="no", status="refused: generates actions, not text", processor="torchvision"
    ),
)

_UNTESTED = {
    "aria": "experts",
    "cohere_compass": "",
    "cosmos3_edge": "",
    "cosmos3_omni": "",
    "deepseek_ocr2": "",
    "deepseek_vl_hybrid": "",
    "diffusion_gemma": "block diffusion instead of next tokens",
    "dots3_note": "indexed attention",
    "emu3": "picture codes as text tokens",
    "ernie4_5_vl_moe": "M-RoPE, experts",
    "evolla": "reads proteins, not pictures",
    "exaone4_5": "",
    "fast_vlm": "the vision tower needs timm",
    "gemma3n": "the vision tower needs timm",
    "gemma4_unified": "head size differs between layers",
    "glm46v": "M-RoPE",
    "glm4v_moe": "M-RoPE, experts",
    "glm5_next": "sparse attention",
    "glm_ocr": "",
    "glmga": "",
    "granite4_vision": "",
    "granite_docling": "",
    "hunyuan_vl": "",
    "hyperclovax_vision_v2": "",
    "idefics": "gated cross-attention",
    "inkling2": "linear and full attention",
    "inkling_mm_model": "linear and full attention",
    "instructblipvideo": "videos only",
    "kimi_k25": "",
    "kosmos-2.5": "",
    "lfm3_vl": "linear and full attention",
    "lighton_ocr": "",
    "minicpm_ocr": "linear and full attention",
    "minicpmv4_7": "linear and full attention",
    "minimax_m3_vl": "sparse attention",
    "mistral4": "",
    "mistral_large4": "sparse attention",
    "muse_glimmer": "",
    "muse_spark": "",
    "nemotron_h_omni": "state space and attention layers",
    "paddleocr_vl": "M-RoPE",
    "perception_lm": "the vision tower needs timm",
    "pp_chart2table": "",
    "qianfan_ocr": "",
    "qwen2_5_omni_thinker": "M-RoPE",
    "qwen3_5_moe": "linear and full attention, experts",
    "qwen3_omni_moe_thinker": "M-RoPE, experts",
    "qwen4_exp": "",
    "shieldgemma2": "a classifier on Gemma 3",
    "step3p7": "",
    "unlimited_ocr": "",
    "video_llava": "videos",
}

FAMILIES: dict[str, Family] = {family.name: family for family in (*_TESTED, *_REFUSED)} | {
    name: Family(name, "", "", branches="unknown", status="untested", processor="unknown", notes=notes)
    for name, notes in _UNTESTED.items()
}
"""Every family of AutoModelForImageTextToText by model_type: tested, refused, then untested."""

UNBRANCHED = tuple(family.name for family in FAMILIES.values() if family.branches.startswith("no"))
"""Families that cannot run branches."""

CROSSING = tuple(family.name for family in FAMILIES.values() if family.visual == "cross-attention")
"""Families whose pictures are not among the keys of the text."""
