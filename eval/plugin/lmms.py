"""The model class that lmms-eval loads; nothing else imports this module."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from ...errors import UsageError, VlmfixError, nearest
from ..world import alone, world
from .requests import Asked, asked, cut, generation, recipe_text

_LOADING = ("revision", "dtype", "device_map", "quantize", "trust_remote_code", "engine")


class Vlmfix(lmms):  # type: ignore[misc]
    """A vlmfix model under lmms-eval.

    An answer that fails ends the run with the document's name: an empty answer in its place would be scored.

    Args:
        model: Hub id, folder or `pico`; `pretrained` is the same.
        method: recipe with all its hyper-parameters, in quotes if it holds a comma. It belongs here and not into
            gen_kwargs, which lmms-eval's response cache does not fully see.
        seed: of sampling; the same document draws the same whatever the batch.
        blank_line_stops: obey the blank line that lmms-eval sets as stop for tasks that set none.
        batch_size: requests answered together.
        device: where to load; with several processes each takes the GPU of its rank.
        max_batch_size: accepted, since lmms-eval passes it; not used.
        pretrained: see `model`.
        loading: `revision`, `dtype`, `device_map`, `quantize`, `trust_remote_code`, `engine` of `vlmfix.load`.

    Raises:
        UsageError: for an unknown argument, with the nearest one.
    """

    is_simple = False

    def __init__(
        self,
        model: str | None = None,
        method: Any = "greedy",
        seed: int = 0,
        blank_line_stops: bool = False,
        batch_size: Any = 1,
        device: str | None = None,
        max_batch_size: Any = None,
        pretrained: str | None = None,
        **loading: Any,
    ) -> None:
        super().__init__()
        known = ("model", "method", "seed", "blank_line_stops", "batch_size", "device", "pretrained", *_LOADING)
        for key in loading:
            if key not in _LOADING:
                raise UsageError(
                    f"unknown model_args {key!r}{nearest(key, known)}; hyper-parameters stand in the method: "
                    'method="vcd(alpha=1,beta=0.1)"'
                )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UsageError(f"batch_size must be a number from 1 on, is {batch_size!r}")
        from ...api import load

        here = world()
        self._rank, self._world_size = here.rank, here.size
        options = dict(loading)
        if "device_map" not in options:
            options["device"] = here.device() or device
        with alone():
            self.vlm: Any = load(model or pretrained or "pico", recipe_text(method), **options)
        self.seed, self.blank_line_stops, self.batch_size = int(seed), bool(blank_line_stops), int(batch_size)

    @property
    def device(self) -> Any:
        """Device of the model's inputs; lmms-eval gathers counts on it."""
        return self.vlm.model.device

    @property
    def config(self) -> Any:
        """The checkpoint's configuration."""
        return self.vlm.model.config

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answers requests `(ctx, doc_to_messages, gen_kwargs, doc_id, task, split)` in batches of equal settings.

        Returns:
            One `GenerationResult` per request, in order.

        Raises:
            VlmfixError: naming the documents of a batch that failed.
        """
        seen: Counter[str] = Counter()
        rows: list[tuple[Asked, dict[str, Any], list[str]]] = []
        for request in requests:
            _, to_messages, kwargs, doc_id, task, split = request.args
            name = f"{task}/{split}/{doc_id}"
            messages = to_messages(self.task_dict[task][split][doc_id])
            seen[name] += 1
            again = f"#{seen[name]}" if seen[name] > 1 else ""
            rows.append((asked(name + again, messages), *generation(kwargs, self.blank_line_stops)))
        results: list[Any] = [None] * len(rows)
        for places in _batches(rows, self.batch_size):
            answers = self._answer([rows[place][0] for place in places], rows[places[0]][1])
            for place, answer in zip(places, answers, strict=True):
                text = cut(answer.text, rows[place][2])
                results[place] = GenerationResult(text=text, token_counts=TokenCounts(output_tokens=answer.tokens))
                context, _, kwargs, *_ = requests[place].args
                self.cache_hook.add_partial("generate_until", (context, kwargs), text)
        return results

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """Conversations are refused.

        Raises:
            UsageError: always.
        """
        raise UsageError("vlmfix answers single questions; leave multi-round tasks out")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Likelihoods are refused: a method acts while it generates.

        Raises:
            UsageError: always.
        """
        raise UsageError("vlmfix acts on generation and has no likelihoods; use the generative variant of the task")

    def clean(self) -> None:
        """Restores the model and lets it go."""
        self.vlm.close()
        self.vlm = None
        super().clean()

    def _answer(self, batch: list[Asked], settings: dict[str, Any]) -> list[Any]:
        extra = dict(settings)
        system = batch[0].system
        if system is not None:
            if "system" not in inspect.signature(self.vlm.answer).parameters:
                raise UsageError(f"{batch[0].id} has a system prompt, for which this model has no place")
            extra["system"] = system
        if settings["do_sample"]:
            extra["seed"] = self.seed
        images = [list(one.images) or None for one in batch]
        prompts, ids = [one.prompt for one in batch], [one.id for one in batch]
        try:
            return list(self.vlm.answer(images, prompts, ids=ids, details=True, **extra))
        except Exception as error:
            raise VlmfixError(f"no answer to {', '.join(ids[:4])}{' ...' if ids[4:] else ''}: {error}") from error


def _batches(rows: list[tuple[Asked, dict[str, Any], list[str]]], size: int) -> list[list[int]]:
    """Places of requests with equal settings and system prompts, of similar length, in batches."""
    key: Callable[[int], str] = lambda place: repr((sorted(rows[place][1].items()), rows[place][0].system))  # noqa: E731
    groups: dict[str, list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place][0].prompt)):
        groups.setdefault(key(place), []).append(place)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
