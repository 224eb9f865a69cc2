"""Loading checkpoints: safetensors only, no remote code unless asked, clear errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from vlmfix.errors import Refusal, UsageError, nearest
from vlmfix.hf.processors import load_processor

DTYPES = ("auto", "float32", "float16", "bfloat16")


def load(
    name: str | Path,
    device: str | None,
    dtype: Any,
    device_map: Any,
    revision: str | None,
    quantize: str | None,
    processor_kwargs: dict[str, Any],
    trust_remote_code: bool,
    extra: dict[str, Any],
) -> tuple[nn.Module, Any]:
    """A model in eval mode and its processor; arguments as in `vlmfix.load`."""
    if device is not None and device_map is not None:
        raise UsageError("device and device_map exclude each other; give one")
    path = _path(name)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _config(path, common)
    _check(config, path)
    target = _device(device)
    kwargs: dict[str, Any] = {"config": config, "use_safetensors": True, **common, **extra}
    kwargs["dtype"] = _dtype(dtype, target)
    if quantize is not None:
        kwargs["quantization_config"] = _quantization(quantize)
    if device_map is not None or quantize is not None:
        kwargs["device_map"] = device_map if device_map is not None else {"": target}
    processor = load_processor(path, config, revision=revision, trust_remote_code=trust_remote_code, **processor_kwargs)
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{path}: the model could not be loaded: {_first_line(error)}") from error
    if "device_map" not in kwargs:
        model = model.to(target)
    return model.eval(), processor


def _path(name: str | Path) -> str:
    if str(name) == "pico":
        from vlmfix import pico

        return str(pico.path())
    return str(name)


def _config(path: str, common: dict[str, Any]) -> Any:
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"{path}: the folder has no config.json, so it is not a model folder")
    try:
        return AutoConfig.from_pretrained(path, **common)
    except (OSError, ValueError, KeyError) as error:
        looks_local = folder.is_absolute() or path.startswith((".", "~"))
        hint = "no such folder" if looks_local and not folder.exists() else _first_line(error)
        raise UsageError(
            f"model {path!r} cannot be found or read: {hint}; give 'pico', a folder, or a Hub "
            f"id{nearest(path, ['pico'])}"
        ) from error


def _check(config: Any, path: str) -> None:
    mapping = AutoModelForImageTextToText._model_mapping
    if type(config) not in mapping:
        kind = getattr(config, "model_type", type(config).__name__)
        raise Refusal(
            f"{path}: {kind} is not a vision-language model (no image-text-to-text class); `vlmfix models` "
            "lists the families"
        )


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is not known; give cpu, cuda or cuda:N") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: this machine or build of torch has no CUDA; use --device cpu")
    return device


def _dtype(dtype: Any, device: str) -> Any:
    if dtype is None:
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if isinstance(dtype, str):
        name = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(dtype, dtype)
        if name not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is not known{nearest(dtype, DTYPES)}")
        return name if name == "auto" else getattr(torch, name)
    return dtype


def _quantization(quantize: str) -> Any:
    if quantize not in ("4bit", "8bit"):
        raise UsageError(f"quantize {quantize!r} is not known; give 4bit or 8bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"quantize={quantize}: install bitsandbytes first")
    return BitsAndBytesConfig(load_in_4bit=quantize == "4bit", load_in_8bit=quantize == "8bit")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
