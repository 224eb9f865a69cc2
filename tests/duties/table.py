"""How strong each method is made for the duties: one row per method of the registry."""

from __future__ import annotations

from dataclasses import dataclass

from ..families import FAMILIES


@dataclass(frozen=True)
class Strength:
    """Recipes of one method for tiny random models.

    Args:
        full: changes the logits of every tiny model, without ruling tokens out and without magnifying rounding much.
        whisper: acts through all the machinery, but moves nothing beyond rounding; absent where no setting does so.
        neutral: dropped when compiled; absent where no setting does so.
        families: the only families it can act on; all by default.
        faint: families whose tiny model shows no effect, because its text sees no picture where the method acts.
    """

    full: str
    whisper: str | None
    neutral: str | None
    families: tuple[str, ...] = ()
    faint: tuple[str, ...] = ()


CLASS_TOKENS = ("llava", "vipllava", "llava_next", "llava_next_video")
NOWHERE = ("it needs the pictures themselves, and the duties have their tensors alone",)
SINKS = "sink_dims=(3,4),tau=1.02,min_mass=0,keep_ratio=0,variant=reference"
WORDS = "disturbance_ids=(40,41,42)"

EMBEDDING = tuple(family for family in FAMILIES if family != "chameleon")
"""Families that hand their decoder embeddings, which a branch can wipe."""

WHOLE = (
    *("llava", "vipllava", "paligemma", "gemma3", "mistral3", "got_ocr2", "instructblip", "blip-2", "chameleon"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "deepseek_vl", "janus"),
)
GROWING = (
    *("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("qwen3_vl_moe", "internvl", "idefics2", "idefics3", "smolvlm", "paligemma", "gemma3", "gemma4", "mistral3"),
    *("got_ocr2", "instructblip", "blip-2", "aya_vision", "cohere2_vision", "chameleon", "deepseek_vl", "fuyu"),
    *("glm4v", "janus", "molmo2", "ovis2", "video_llama_3"),
)
"""Families whose caches only grow: no running states, no chunks."""

UNIFORM = tuple(name for name in FAMILIES if name not in ("lfm2_vl", "minicpmv4_6", "qwen3_5", "mllama"))
"""Families all of whose layers attend."""

COLOURS = "colours=((0.5,0.5,0.5),(0.5,0.5,0.5))"

TABLE = {
    "greedy": Strength("greedy", "greedy", "greedy"),
    "var": Strength(f"var({SINKS})", f"var({SINKS},move_fraction=1e-12)", "var(move_fraction=0)"),
    "pai": Strength("pai", "pai(alpha=1e-12)", "pai(alpha=0)"),
    "vaf": Strength("vaf(alpha=0.5,beta=0.2)", "vaf(alpha=1e-12,beta=1e-12)", "vaf(alpha=0,beta=0)"),
    "locore": Strength("locore(beta=3)", "locore(beta=1e-12)", "locore(beta=0)"),
    "fia": Strength("fia(alpha=1.5,beta=1.5)", "fia(alpha=1e-12,beta=1e-12)", "fia(alpha=0,beta=0)", CLASS_TOKENS),
    "vhr": Strength("vhr", "vhr(alpha=1.0000001)", "vhr(alpha=1)"),
    "vhr_local": Strength("vhr_local", "vhr_local(alpha=1.0000001)", "vhr_local(alpha=1)"),
    "gift": Strength("gift", "gift(alpha=1e-12)", "gift(alpha=0)", UNIFORM, faint=("llama4", "gemma4")),
    "vasparse_attention": Strength(
        "vasparse_attention(beta=1)", "vasparse_attention(beta=1e-12)", "vasparse_attention(beta=0)"
    ),
    "carve": Strength("carve", None, "carve(keep=1)", families=NOWHERE),
    "patches": Strength("patches", None, "patches(share=0,add=None)", families=NOWHERE),
    "vcd": Strength("vcd(alpha=0.5,beta=0)", "vcd(alpha=1e-12,beta=0)", "vcd(alpha=0,beta=0)"),
    "m3id": Strength("m3id(beta=0,forget_rate=0.05)", "m3id(beta=0,forget_rate=1e-12)", "m3id(forget_rate=0,beta=0)"),
    "icd": Strength(f"icd(alpha=0.5,beta=0,{WORDS})", f"icd(alpha=1e-12,beta=0,{WORDS})", "icd(alpha=0,beta=0)"),
    "lcd": Strength("lcd(alpha=0.3,beta=0,entropy=False)", "lcd(alpha=1e-12,beta=0)", "lcd(alpha=0,beta=0)"),
    "pai_guidance": Strength(
        "pai_guidance(gamma=1.5,beta=0)", "pai_guidance(gamma=1.0000001,beta=0)", "pai_guidance(gamma=1,beta=0)"
    ),
    "sid": Strength("sid(beta=0,keep_lowest=0.5)", "sid(alpha=1e-12,beta=0)", "sid(alpha=0,beta=0)"),
    "iava": Strength(
        "iava(alpha=0.5,beta=0,lamb=0,instruction_ids=(40,41,42))",
        "iava(alpha=1e-12,beta=0,instruction_ids=(40,41,42))",
        "iava(alpha=0,beta=0)",
        EMBEDDING,
    ),
    "avisc": Strength("avisc(alpha=0.3,beta=0)", "avisc(alpha=1e-12,beta=0)", "avisc(alpha=0,beta=0)", EMBEDDING),
    "agla": Strength(
        f"agla(alpha=0.5,beta=0,share=0.5,{COLOURS})",
        f"agla(alpha=1e-12,beta=0,{COLOURS})",
        "agla(alpha=0,beta=0)",
        tuple(family for family in WHOLE if family not in ("instructblip", "blip-2")),
    ),
    "vasparse_contrast": Strength(
        "vasparse_contrast(alpha=0.5,beta=0)",
        "vasparse_contrast(alpha=1e-12,beta=0)",
        "vasparse_contrast(alpha=0,beta=0)",
    ),
    "ritual": Strength("ritual(alpha=0.5,beta=0)", "ritual(alpha=1e-12,beta=0)", "ritual(alpha=0,beta=0)", WHOLE),
    "dola": Strength("dola(beta=0)", None, None),
    "deco": Strength("deco(top_p=1)", None, "deco(alpha=0)"),
    "sgrs": Strength("sgrs(alpha=2,top_k=3)", None, None, UNIFORM),
    "opera": Strength("opera(alpha=5,candidates=4,num_beams=3)", None, None, GROWING),
}
