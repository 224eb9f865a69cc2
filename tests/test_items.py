"""Folders and prompt files become items; what cannot is named with line and remedy while the others go on."""

import json

import pytest
from PIL import Image

from vlmfix.errors import UsageError
from vlmfix.items import collect


@pytest.fixture
def photos(tmp_path):
    for name in ("b.png", "a.jpg", "deep/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    return tmp_path


def asked(found):
    return [("|".join(item.names), item.prompt) for item in found.items.values()]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_folder_with_prompt(photos):
    found = collect(photos, "Describe.")
    assert asked(found) == [("a.jpg", "Describe."), ("b.png", "Describe."), ("deep/c.webp", "Describe.")]
    assert [item.images for item in found.items.values()] == [(photos / n,) for n in ("a.jpg", "b.png", "deep/c.webp")]
    assert not found.faults
    assert not found.notes


def test_ids_change_with_prompt_and_not_with_company(photos):
    every = set(collect(photos, "Describe.").items)
    assert every.isdisjoint(collect(photos, "Count.").items)
    (photos / "b.png").unlink()
    assert set(collect(photos, "Describe.").items) < every


def test_other_files_are_noted_and_hidden_ones_ignored(photos):
    (photos / "readme.md").touch()
    (photos / ".hidden").mkdir()
    (photos / ".hidden" / "x.png").touch()
    found = collect(photos, "Describe.")
    assert len(found.items) == 3
    assert found.notes == ["1 files are no pictures by name and were left out: readme.md"]


def test_text_beside_picture(photos):
    (photos / "a.txt").write_text("What is it?\n\nHow many?\n")
    (photos / "b.txt").write_bytes(b"caf\xe9")
    found = collect(photos)
    assert asked(found) == [("a.jpg", "What is it?"), ("a.jpg", "How many?")]
    assert [(fault.id, fault.error.split(": ")[1]) for fault in found.faults] == [
        ("b.png", "not UTF-8; save it as UTF-8"),
        ("deep/c.webp", 'no prompt; fill "prompt", ask with --prompt, or write it into a .txt file beside the picture'),
    ]
    assert asked(collect(photos / "a.jpg")) == [("a.jpg", "What is it?"), ("a.jpg", "How many?")]
    assert asked(collect(photos / "a.jpg", "{prompt} Be brief."))[1] == ("a.jpg", "How many? Be brief.")
    assert asked(collect(photos, "Is this {stem}?"))[2] == ("deep/c.webp", "Is this c?")


def test_pictures_without_any_prompt_are_refused(photos):
    for source in (photos, photos / "a.jpg"):
        with pytest.raises(UsageError, match="no prompt; give --prompt TEXT"):
            collect(source)


def test_json_lines(photos):
    path = write(
        photos / "ask.jsonl",
        {"image": "a.jpg", "prompt": "One?", "id": 7},
        {"image": ["a.jpg", "b.png"], "prompt": "Two?"},
        "",
        {"image": None, "prompt": "None?"},
    )
    found = collect(path)
    assert asked(found) == [("a.jpg", "One?"), ("a.jpg|b.png", "Two?"), ("", "None?")]
    assert next(iter(found.items)) == "7"
    assert list(found.items.values())[1].images == (photos / "a.jpg", photos / "b.png")


def test_bad_lines_are_named_while_others_go_on(photos):
    path = write(
        photos / "ask.jsonl",
        {"image": "a.jpg", "prompt": "One?", "id": "x"},
        '{"image": "a.jpg", "prompt": ',
        "[1, 2]",
        {"imagee": "a.jpg", "prompt": "?"},
        {"image": "a.jpg"},
        {"image": 3, "prompt": "?"},
        {"image": "b.png", "prompt": "Other?", "id": "x"},
        '{"image": "a.jpg", "prompt": "\\ud800"}',
        "[" * 100_000,
        {"image": "b.png", "prompt": "Last?"},
    )
    found = collect(path)
    assert [item.prompt for item in found.items.values()] == ["One?", "Last?"]
    wanted = [
        (2, "not JSON (Expecting value); write one object a line"),
        (3, "not a JSON object; write"),
        (4, 'no "image"; did you mean imagee?; name the picture file'),
        (5, "no prompt; fill"),
        (6, "must be a file name or a list of file names"),
        (7, "id 'x' was used at ask.jsonl line 1; give every line its own id"),
        (8, "half a surrogate pair"),
        (9, "not JSON (maximum recursion depth exceeded"),
    ]
    assert [fault.id for fault in found.faults] == [f"ask.jsonl line {line}" for line, _ in wanted]
    for fault, (line, words) in zip(found.faults, wanted, strict=True):
        assert fault.error.startswith(f"ask.jsonl line {line}: ")
        assert words in fault.error


def test_repeated_lines_are_asked_once_and_said(photos):
    row = {"image": "a.jpg", "prompt": "One?"}
    found = collect(write(photos / "ask.jsonl", row, row))
    assert len(found.items) == 1
    assert found.notes == ["ask.jsonl line 2 repeats ask.jsonl line 1: asked once"]


def test_template_over_rows(photos):
    path = write(
        photos / "ask.jsonl",
        {"image": "a.jpg", "title": "cat", "n": 2.5},
        {"image": "b.png", "titel": "dog", "n": "x"},
        {"image": "b.png", "title": "dog", "n": "x"},
    )
    found = collect(path, "Is this a {title}? {{yes}} {n:.2f}")
    assert asked(found) == [("a.jpg", "Is this a cat? {yes} 2.50")]
    assert "{title} is no column here; did you mean titel?" in found.faults[0].error
    assert "mend the value or the format" in found.faults[1].error


def test_table(photos):
    (photos / "ask.csv").write_bytes(
        b'\xef\xbb\xbfimage,prompt,title\na.jpg,"One, two?",cat\nb.png,Short?\nb.png,?,x,y\nb.png,,x\n'
    )
    found = collect(photos / "ask.csv")
    assert asked(found) == [("a.jpg", "One, two?"), ("b.png", "Short?")]
    assert [fault.error.split(";")[0] for fault in found.faults] == [
        "ask.csv line 4: more cells than the header",
        "ask.csv line 5: no prompt",
    ]
    assert asked(collect(photos / "ask.csv", "A {title}?"))[0] == ("a.jpg", "A cat?")
    (photos / "ask.tsv").write_text('image\tprompt\na.jpg\tOne?\nb.png\t"open\n')
    found = collect(photos / "ask.tsv")
    assert asked(found) == [("a.jpg", "One?")]
    assert "check its quotation marks" in found.faults[0].error


def test_folder_with_prompt_file(photos):
    write(photos / "prompts.jsonl", {"image": "a.jpg", "prompt": "One?", "title": "cat"})
    assert asked(collect(photos)) == [("a.jpg", "One?")]
    assert asked(collect(photos, "A {title}?")) == [("a.jpg", "A cat?")]
    every = collect(photos, "Describe.")
    assert len(every.items) == 3
    assert "prompts.jsonl was left aside" in every.notes[0]
    write(photos / "prompts.csv", "image,prompt")
    with pytest.raises(UsageError, match=r"prompts\.jsonl and prompts\.csv; give the one you mean"):
        collect(photos)


@pytest.mark.parametrize(
    ("name", "content", "prompt", "words"),
    [
        ("gone.csv", None, None, "no such file or folder; check the path"),
        ("x.docx", b"", "?", "give a picture, a folder of pictures, or a"),
        ("x.jsonl", b"\n\n", None, "holds no rows"),
        ("x.csv", b"image,prompt\n", None, "holds no rows"),
        ("x.csv", b"", None, "no column 'image'"),
        ("x.csv", b"imag,prompt\n", None, "no column 'image'; did you mean imag?"),
        (
            "x.csv",
            b"image,q\n",
            None,
            "no column 'prompt'; known: image, q; name it in the first line or ask with --prompt",
        ),
        ("x.csv", b"image,titles\n", "{title}", "no column 'title'; did you mean titles?"),
        ("x.csv", b"image,caf\xe9\n", None, "not UTF-8"),
        ("x.png", b"", "{titel}", "{titel} is no column here; known: name, prompt, stem"),
        ("x.png", b"", "{", "write {{ and }} for braces"),
        ("x.png", b"", "{}", "a field needs a column name"),
    ],
)
def test_wrong_usage(tmp_path, name, content, prompt, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        collect(path, prompt)
    assert words in str(raised.value)


def test_folder_without_pictures(tmp_path):
    with pytest.raises(UsageError, match="no pictures in this folder"):
        collect(tmp_path, "Describe.")
