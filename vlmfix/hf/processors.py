"""Processors: loaded whole, or for pictures alone where video parts need torchvision; and prompts rendered for them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from vlmfix.errors import UsageError, nearest
from vlmfix.hf.families import FAMILIES, Family

HUB_OPTIONS = frozenset({"cache_dir", "force_download", "local_files_only", "subfolder", "token"})
"""Keywords that say where to load from; all others are settings of the processor."""

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")

TEMPLATES = {
    "LlavaProcessor": ("{system}USER: {images}{prompt} ASSISTANT:", "<image>\n"),
    "InstructBlipProcessor": ("{prompt}", ""),
    "Blip2Processor": ("Question: {prompt} Answer:", ""),
    "Kosmos2Processor": ("{prompt}", ""),
    "FuyuProcessor": ("{prompt}\n", ""),
    "PaliGemmaProcessor": ("{images}{prompt}", "<image>"),
}
"""Prompt and picture text for processors that may come without a chat template, as in the model cards of llava-1.5,
instructblip, blip2, kosmos-2, fuyu and paligemma; an empty picture text means that the processor places the picture."""


def load_processor(
    path_or_id: str | Path, config: Any, revision: str | None = None, trust_remote_code: bool = False, **kw: Any
) -> Any:
    """Loads the processor of a checkpoint; the tokenizer pads on the left, as generation needs.

    Processors that also take videos cannot be built without torchvision. They are then built for pictures alone, as a
    subclass that leaves the video part out; transformers' registries stay as they are.

    Args:
        path_or_id: folder or Hub id.
        config: the model's config.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether code from the repository may run.
        kw: settings of the processor that replace those of the checkpoint, or where to load from (`HUB_OPTIONS`).

    Returns:
        A transformers processor with an image processor and a tokenizer.

    Raises:
        UsageError: files are missing, torchvision is needed, or a setting does not exist.
    """
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    folder = Path(path_or_id)
    if folder.is_dir():
        _check_files(folder)
    family = FAMILIES.get(config.model_type)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, **kw}
    videos = None if is_torchvision_available() or trust_remote_code else _takes_videos(config.model_type)
    try:
        if videos is None:
            processor = AutoProcessor.from_pretrained(str(path_or_id), config=config, **options)
        else:
            processor = image_only(videos).from_pretrained(str(path_or_id), **options)
    except (ImportError, ValueError, OSError, TypeError) as error:
        raise UsageError(_explain(path_or_id, config.model_type, family, error)) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UsageError(
            f"{path_or_id}: loading the processor gave only a {type(processor).__name__}; a VLM needs a tokenizer and "
            f"an image processor: copy {PROCESSOR_FILES[0]} and the tokenizer files from the model's repository"
        )
    _check_settings(processor, kw)
    tokenizer = tokenizer_of(processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor.

    Raises:
        UsageError: the processor has none.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise UsageError(f"{type(processor).__name__} has no tokenizer; give the processor of a VLM (AutoProcessor)")
    return tokenizer


def render(processor: Any, prompt: str, n_images: int, system: str | None = None) -> str:
    """The text of one user turn, pictures first, as the processor expects it.

    The chat template is used where there is one, else the text of `TEMPLATES`.

    Args:
        processor: a transformers processor.
        prompt: what the user says.
        n_images: number of pictures.
        system: system prompt.

    Raises:
        UsageError: no template, a template without a place for a picture or a system prompt, or a prompt that
            contains the picture placeholder itself.
    """
    placeholder = getattr(processor, "image_token", None)
    if isinstance(placeholder, str) and placeholder in prompt:
        raise UsageError(f"the prompt contains {placeholder!r}, which stands for a picture; leave it out")
    if getattr(processor, "chat_template", None):
        text = _chat(processor, prompt, n_images, system)
        drops = n_images > 0 and text == _chat(processor, prompt, n_images - 1, system)
    else:
        text, drops = _plain(processor, prompt, n_images, system), False
    if drops:
        raise UsageError(
            f"the chat template of {type(processor).__name__} has no place for {n_images} picture(s); render the "
            f"prompt yourself"
        )
    if system is not None and system not in text:
        raise UsageError(f"{type(processor).__name__}: the template has no place for a system prompt; leave it out")
    return text


def _chat(processor: Any, prompt: str, n_images: int, system: str | None) -> str:
    content: list[dict[str, str]] = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _plain(processor: Any, prompt: str, n_images: int, system: str | None) -> str:
    name = type(processor).__name__
    if name not in TEMPLATES:
        raise UsageError(
            f"{name} has no chat template, and vlmfix knows no prompt format for it; put the checkpoint's "
            f"chat_template.jinja beside it, or render the prompt yourself"
        )
    template, image = TEMPLATES[name]
    return template.format(prompt=prompt, images=image * n_images, system=f"{system} " if system else "")


def _takes_videos(model_type: str) -> type | None:
    """The processor class of a family where it asks for a video processor, else None."""
    import inspect

    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    found: type | None = processor_class_from_name(name) if name else None
    if found is None or "video_processor" not in inspect.signature(found.__init__).parameters:  # type: ignore[misc]
        return None
    return found


class NoVideos:
    """Stands where a video processor would: it has no settings (each is None) and takes no video."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Refuses a video.

        Raises:
            UsageError: always.
        """
        raise UsageError("videos need torchvision; install the build that fits your torch")


@cache
def image_only(base: type) -> Any:
    """A processor class without its video part.

    transformers reads the parts of a processor from the signature of `__init__`, loads them, and hands them on by
    position. The subclass leaves `video_processor` out of the parts, gives the base class None for it, and drops the
    None again before transformers checks the parts.

    Args:
        base: a subclass of ProcessorMixin whose `__init__` takes `video_processor`.

    Returns:
        A subclass with the same name, so that what it saves names the class the Hub knows.
    """
    from transformers import ProcessorMixin

    class WithoutVideos(ProcessorMixin):  # type: ignore[misc]
        video_processor = NoVideos()

        def __init__(self, *parts: Any, **options: Any) -> None:
            options.pop("video_processor", None)
            super().__init__(*(part for part in parts if part is not None), **options)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **options: Any) -> Any:
            code = base.__init__.__code__  # type: ignore[misc]
            place = code.co_varnames[1 : code.co_argcount].index("video_processor")
            settings = {name: value for name, value in processor_dict.items() if name != "video_processor"}
            return super().from_args_and_dict([*args[:place], None, *args[place:]], settings, **options)

    return type(base.__name__, (base, WithoutVideos), {"__module__": __name__, "__doc__": base.__doc__})


def _check_files(folder: Path) -> None:
    missing = []
    if not any(_has_image_processor(folder / name) for name in PROCESSOR_FILES):
        missing.append(PROCESSOR_FILES[0])
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        missing.append(TOKENIZER_FILES[0])
    if missing:
        raise UsageError(
            f"{folder}: no processor, {' and '.join(missing)} missing; copy the processor and tokenizer files of the "
            f"model's repository into it (processor.save_pretrained writes them)"
        )


def _has_image_processor(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error}); copy the file again from the model's repository") from error
    return path.name == PROCESSOR_FILES[0] or "image_processor" in content


def _check_settings(processor: Any, kw: dict[str, Any]) -> None:
    owners = (processor, processor.image_processor, processor.tokenizer)
    for name in kw.keys() - HUB_OPTIONS:
        if not any(hasattr(owner, name) for owner in owners):
            known = [key for key in vars(processor.image_processor) if not key.startswith("_")]
            raise UsageError(f"{type(processor).__name__} has no setting {name!r}{nearest(name, known)}")


def _explain(path_or_id: str | Path, model_type: str, family: Family | None, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "num2words" in reason:
        return f"{path_or_id}: the processor of {model_type} needs num2words; pip install num2words"
    if (family and family.processor == "torchvision") or "torchvision" in reason.lower():
        return f"{path_or_id}: the processor of {model_type} needs torchvision; install the build that fits your torch"
    return f"{path_or_id}: the processor could not be loaded: {reason[:300]}"
