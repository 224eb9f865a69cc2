"""MMHal-Bench: open questions rated by a judge, which is asked only if you name one (arXiv 2309.14525)."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError, VlmfixError
from ..base import Item, Metric, Score, ratio
from .answers import Record, Reply, by_question, match, table
from .files import Problems, read_objects, read_text

TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
"""Type of a question by its place in the file, modulo 8."""

PLACEHOLDERS = ("{objects}", "{question}", "{reference}", "{answer}")
"""What a judge's prompt file must hold."""


@dataclass(frozen=True)
class Mmhal:
    """MMHal-Bench: mean rating (0 to 6) and share of answers rated below 3.

    The judge's prompt of the authors is not shipped (GPL): write their text to a file with `PLACEHOLDERS` in it.
    Records may carry a `rating` already; without any, and without a judge, scoring refuses.

    Args:
        questions: `response_template.json` of the authors.
        endpoint: base address of an OpenAI-compatible service, such as http://localhost:8000/v1; none by default.
        judge: name of the model that judges.
        prompt_file: the judge's prompt.
        key_env: environment variable with the key; no key is sent if it is not set.
        timeout: seconds a request may take.
    """

    questions: str | Path
    endpoint: str | None = None
    judge: str | None = None
    prompt_file: str | Path | None = None
    key_env: str = "OPENAI_API_KEY"
    timeout: int = 120

    max_new_tokens = 256

    def __post_init__(self) -> None:
        if self.endpoint is not None:
            if not self.endpoint.startswith(("http://", "https://")):
                raise UsageError(f"endpoint must start with http:// or https://, is {self.endpoint!r}")
            if self.judge is None or self.prompt_file is None:
                raise UsageError("a judge needs its endpoint, the model's name (judge) and a prompt file (prompt_file)")

    @property
    def label(self) -> str:
        """Name with the judge."""
        return f"mmhal[{self.judge or 'rated'}]"

    def items(self) -> list[Item]:
        """The questions, their ids counted from 0 in file order."""
        items = []
        for number, row in enumerate(read_objects(self.questions, Problems())):
            missing = [key for key in ("question", "gt_answer", "image_content") if key not in row]
            if missing:
                raise UsageError(
                    f"{self.questions}: row {number} has no {', '.join(missing)}; give the authors' template"
                )
            image = Path(str(row.get("image_src") or row.get("image_id") or number)).name
            truth = {
                "type": row.get("question_type") or TYPES[number % 8],
                "question": row["question"],
                "reference": row["gt_answer"],
                "objects": list(row["image_content"]),
            }
            items.append(Item(str(number), image, row["question"], truth))
        return items

    def replies(self, records: Iterable[Record], problems: Problems) -> list[Reply]:
        """Questions with their answers, found by id, or by picture and question."""
        items = self.items()
        return match(items, records, problems, by_question(items))

    def export(self, records: Iterable[Record], path: str | Path, problems: Problems | None = None) -> Path:
        """Writes the authors' template with `model_answer` filled in, for their own judge.

        Raises:
            UsageError: if a question has no answer, since a missing answer would be judged as an empty one.
        """
        answers = {reply.item.id: reply.text for reply in self.replies(records, problems or Problems())}
        rows = read_objects(self.questions, Problems())
        lacking = [str(number) for number in range(len(rows)) if str(number) not in answers]
        if lacking:
            raise UsageError(f"{len(lacking)} questions have no answer: {', '.join(lacking[:5])}; answer them first")
        filled = [row | {"model_answer": answers[str(number)]} for number, row in enumerate(rows)]
        Path(path).write_text(json.dumps(filled, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return Path(path)

    def rate(self, records: Iterable[Record], problems: Problems) -> list[dict[str, Any]]:
        """Records with `rating`, `judge` and `judge_reply` added; a failed request leaves its record without a rating.

        Raises:
            UsageError: if no judge is named or the prompt file lacks a placeholder.
        """
        if self.endpoint is None or self.prompt_file is None:
            raise UsageError("no judge is named; give endpoint, judge and prompt_file")
        prompt = read_text(self.prompt_file)
        absent = [name for name in PLACEHOLDERS if name not in prompt]
        if absent:
            raise UsageError(f"{self.prompt_file} lacks {', '.join(absent)}; put them where the judge shall read them")
        rated = [dict(record) for record in records]
        for reply in self.replies(rated, Problems()):
            if "rating" in reply.record:
                continue
            truth, name = reply.item.truth, reply.item.id
            values = (", ".join(truth["objects"]), truth["question"], truth["reference"], reply.text)
            text = _fill(prompt, dict(zip(PLACEHOLDERS, values, strict=True)))
            try:
                answer = self._ask(text)
            except VlmfixError as error:
                problems.add(f"answers the judge did not rate ({error})", name)
                continue
            found = rating(answer)
            if found is None:
                problems.add("judge replies without one rating, taken as 0", name)
            record = next(r for r in rated if r is reply.record)
            record |= {"judge": self.judge, "judge_reply": answer, "rating": found or 0}
        return rated

    def score(self, records: Iterable[Record], problems: Problems | None = None) -> Score:
        """Mean rating, hallucination rate, and the mean of each type.

        Raises:
            UsageError: if no record has a rating and no judge is named.
        """
        problems = problems or Problems()
        replies = self.replies(self.rate(records, problems) if self.endpoint else records, problems)
        rated = [reply for reply in replies if isinstance(reply.record.get("rating"), (int, float))]
        for reply in replies:
            if reply not in rated:
                problems.add("answers without a rating, not scored", reply.item.id)
        if not rated:
            raise UsageError(
                "no answer has a rating; name a judge (endpoint, judge, prompt_file), or export the answers, have them "
                "rated and add `rating` to the records"
            )
        kinds = list(dict.fromkeys(reply.item.truth["type"] for reply in rated))
        rows = []
        for reply in rated:
            value, kind = float(reply.record["rating"]), reply.item.truth["type"]
            row = {f"{name}/{column}": 0.0 for name in kinds for column in ("items", "rating")}
            row |= {f"{kind}/items": 1.0, f"{kind}/rating": value, "items": 1.0, "rating": value}
            rows.append(row | {"low": float(value < 3), "empty": float(not reply.text.strip())})
        metrics: dict[str, Metric] = {
            "rating": ratio("rating", "items", percent=False),
            "hallucination_rate": ratio("low", "items"),
            "empty": ratio("empty", "items"),
        }
        metrics |= {f"{kind}/rating": ratio(f"{kind}/rating", f"{kind}/items", percent=False) for kind in kinds}
        details = {r.item.id: {"rating": r.record["rating"], "judge": r.record.get("judge")} for r in rated}
        return table(rated, rows, metrics, problems, details)

    def _ask(self, text: str) -> str:
        body = {"model": self.judge, "messages": [{"role": "user", "content": text}], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if os.environ.get(self.key_env):
            headers["Authorization"] = f"Bearer {os.environ[self.key_env]}"
        address = f"{str(self.endpoint).rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            raise VlmfixError(f"{address} answers {error.code} {error.reason}") from error
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise VlmfixError(f"{address} gives no usable reply: {error}") from error


def rating(reply: str) -> int | None:
    """The one `rating: 0` to `rating: 6` in a judge's reply; None if there is none or several."""
    low = reply.lower()
    found = [value for value in range(7) if f"rating: {value}" in low]
    return found[0] if len(found) == 1 else None


def _fill(prompt: str, values: Mapping[str, str]) -> str:
    """The prompt with placeholders replaced in one pass, so that what an answer holds is never read as one."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found.group()], prompt)
