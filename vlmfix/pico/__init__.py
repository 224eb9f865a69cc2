"""pico: the bundled model, a small real vision-language model trained on the scenes."""

from pathlib import Path


def path() -> Path:
    """Folder of the checkpoint, in the standard LLaVA format; loads offline through transformers' Auto classes."""
    return Path(__file__).parent
