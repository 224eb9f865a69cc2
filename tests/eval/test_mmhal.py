import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from vlmfix.eval.benchmarks.files import Problems
from vlmfix.eval.benchmarks.mmhal import Mmhal, rating

from vlmfix.errors import UsageError

from .coco_world import named

PROMPT = "Objects: {objects}\nQ: {question}\nHuman: {reference}\nModel: {answer}\nEnd with a rating."


@pytest.fixture
def questions(tmp_path):
    rows = [
        {
            "question_type": kind,
            "image_src": f"https://example.org/{n}_o.jpg",
            "image_content": ["Dog", "Tree"],
            "question": f"What is {n}?",
            "gt_answer": f"It is {n}.",
            "model_answer": "",
        }
        for n, kind in enumerate(("attribute", "counting", "counting"))
    ]
    path = tmp_path / "response_template.json"
    path.write_text(json.dumps(rows))
    (tmp_path / "prompt.txt").write_text(PROMPT)
    return path


@pytest.fixture
def service():
    """An OpenAI-compatible judge on this machine: rates by the length of the answer, fails on request."""
    seen = []

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            text = body["messages"][0]["content"]
            if "explode" in text:
                self.send_error(500)
                return
            said = "no idea" if "vague" in text else f"Because. Rating: {5 if 'good' in text else 1}"
            reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_judge_rates_over_http(questions, service, monkeypatch):
    endpoint, seen = service
    monkeypatch.setenv("JUDGE_KEY", "secret")
    benchmark = Mmhal(
        questions, endpoint=endpoint, judge="gpt-x", prompt_file=questions.parent / "prompt.txt", key_env="JUDGE_KEY"
    )
    answers = [{"id": "0", "text": "good {question}"}, {"id": "1", "text": "bad"}, {"id": "2", "text": "vague"}]
    score = benchmark.score(answers)
    figures = score.figures()
    assert figures["rating"] == 2
    assert figures["hallucination_rate"] == pytest.approx(200 / 3)
    assert figures["counting/rating"] == 0.5
    assert named(score) == {"judge replies without one rating, taken as 0": ["2"]}
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["temperature"] == 0
    assert body["model"] == "gpt-x"
    expected = "Objects: Dog, Tree\nQ: What is 0?\nHuman: It is 0.\nModel: good {question}\nEnd with a rating."
    assert body["messages"][0]["content"] == expected
    assert benchmark.label == "mmhal[gpt-x]"


def test_failed_requests_are_named_and_not_scored(questions, service, monkeypatch):
    endpoint, seen = service
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    benchmark = Mmhal(questions, endpoint=endpoint, judge="j", prompt_file=questions.parent / "prompt.txt")
    answers = [{"id": "0", "text": "explode"}, {"id": "1", "text": "good"}, {"id": "2", "text": "x", "rating": 4}]
    score = benchmark.score(answers)
    assert score.ids == ["1", "2"]
    assert score.figures()["rating"] == 4.5
    kinds = named(score)
    assert kinds["answers without a rating, not scored"] == ["0"]
    assert any("500" in kind and names == ["0"] for kind, names in kinds.items())
    assert "Authorization" not in seen[0][1]
    assert len(seen) == 2  # what is rated already is not asked again
    rated = benchmark.rate(answers, Problems())
    assert [r.get("rating") for r in rated] == [None, 5, 4]
    assert rated[1]["judge_reply"].endswith("Rating: 5")


def test_no_judge_unless_named(questions):
    answers = [{"id": str(n), "text": "x"} for n in range(3)]
    with pytest.raises(UsageError, match="no answer has a rating; name a judge"):
        Mmhal(questions).score(answers)
    with pytest.raises(UsageError, match="a judge needs"):
        Mmhal(questions, endpoint="http://localhost:1")
    with pytest.raises(UsageError, match="must start with http"):
        Mmhal(questions, endpoint="file:///etc/passwd", judge="j", prompt_file="p")
    bare = questions.parent / "bare.txt"
    bare.write_text("Rate {answer}")
    with pytest.raises(UsageError, match=r"lacks {objects}, {question}, {reference}"):
        Mmhal(questions, endpoint="http://localhost:1", judge="j", prompt_file=bare).score(answers)


def test_unreachable_judge_is_named(questions):
    benchmark = Mmhal(
        questions, endpoint="http://127.0.0.1:1/v1", judge="j", prompt_file=questions.parent / "prompt.txt", timeout=2
    )
    problems = Problems()
    rated = benchmark.rate([{"id": "0", "text": "x"}], problems)
    assert "rating" not in rated[0]
    assert any("gives no usable reply" in kind for kind in problems.kinds)


def test_export_fills_the_template(questions, tmp_path):
    benchmark = Mmhal(questions)
    answers = [{"id": str(n), "text": f"answer {n}"} for n in range(3)]
    rows = json.loads(benchmark.export(answers, tmp_path / "filled.json").read_text())
    assert [row["model_answer"] for row in rows] == ["answer 0", "answer 1", "answer 2"]
    assert rows[0]["image_content"] == ["Dog", "Tree"]
    with pytest.raises(UsageError, match="1 questions have no answer: 2"):
        benchmark.export(answers[:2], tmp_path / "filled.json")


@pytest.mark.parametrize(
    ("reply", "value"),
    [("Rating: 4", 4), ("RATING: 0, no more", 0), ("rating: 3 or rating: 4", None), ("I give 5", None), ("", None)],
)
def test_ratings_are_read(reply, value):
    assert rating(reply) == value
