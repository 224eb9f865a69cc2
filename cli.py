"""Launcher of a checkout: `python cli.py run photos/ --prompt "Describe the image."` needs no installed vlmfix."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import vlmfix
from vlmfix.commands import main

if importlib.util.find_spec("vlmfix.eval") is None:  # installed, eval/ is vlmfix.eval
    vlmfix.__path__.append(str(Path(__file__).parent))

if __name__ == "__main__":
    main()
