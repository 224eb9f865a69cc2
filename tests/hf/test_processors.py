"""Processors load from Hub-style folders without torchvision, and every way to fail says what to do."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from transformers.utils import is_torchvision_available

from tests.families.checkpoints import RECIPES, make_checkpoint, make_tokenizer
from tests.families.core import released
from vlmfix.errors import UsageError
from vlmfix.hf import processors
from vlmfix.hf.families import FAMILIES
from vlmfix.hf.processors import image_only, load_processor, render, tokenizer_of

NEWER = () if released("5.23") else ("idefics3", "smolvlm", "minicpmv4_6")
"""Families whose processors 5.17 cannot build without torchvision, or whose tiles it cannot batch."""

READY = [name for name in RECIPES if name not in NEWER]
VIDEO_FAMILIES = [name for name in READY if FAMILIES[name].processor == "image-only"]
QUESTION = "What is on the table?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(family, root / family) for family in RECIPES}


def config_of(folder):
    return AutoConfig.from_pretrained(folder)


def load(folder, **settings):
    return load_processor(folder, config_of(folder), local_files_only=True, **settings)


def picture(seed, width=30, height=40):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", READY)
def test_checkpoint_answers_a_padded_batch_as_it_answers_each_row(folders, family):
    processor = load(folders[family])
    model = AutoModelForImageTextToText.from_pretrained(folders[family]).eval()
    assert sum(file.stat().st_size for file in folders[family].iterdir()) < 1_200_000
    rows = [("Is there a dog?", [picture(0)]), ("Describe the image in detail.", [picture(1, 40), picture(2, 20)])]

    def tokens(rows):
        texts = [render(processor, prompt, len(images)) for prompt, images in rows]
        inputs = processor(text=texts, images=[images for _, images in rows], padding=True, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
        return inputs, made

    inputs, together = tokens(rows)
    assert not inputs["attention_mask"][:, 0].all()
    assert inputs["attention_mask"][:, -1].all()
    for row, made in zip(rows, together, strict=True):
        assert torch.equal(tokens([row])[1][0], made)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_video_part_is_left_out_and_settings_are_kept(folders, family):
    processor = load(folders[family])
    name, arguments = RECIPES[family].processor
    assert type(processor).__name__ == name
    for key, value in arguments.items():
        assert getattr(processor, key) == value
    for key, value in RECIPES[family].image_processor[1].items():
        if key not in ("size", "min_pixels", "max_pixels"):
            assert getattr(processor.image_processor, key) == value
    if not is_torchvision_available():
        assert type(processor).__module__ == processors.__name__
        with pytest.raises(UsageError, match="videos need torchvision"):
            processor.video_processor(None)


def test_every_family_that_claims_image_only_shares_a_checked_processor():
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    checked = {recipe.processor[0] for recipe in RECIPES.values()}
    claimed = {PROCESSOR_MAPPING_NAMES[name] for name, row in FAMILIES.items() if row.processor == "image-only"}
    assert claimed <= checked


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_saved_processor_names_the_class_the_hub_knows_and_loads_again(folders, family, tmp_path):
    first = load(folders[family])
    first.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folders[family] / "config.json").read_bytes())
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == RECIPES[family].processor[0]
    second = load(tmp_path)
    inputs = [p(text=render(p, QUESTION, 1), images=[picture(3)], return_tensors="pt") for p in (first, second)]
    assert inputs[0].keys() == inputs[1].keys()
    for key in inputs[0].keys() - {"batch_num_images"}:
        assert torch.equal(inputs[0][key], inputs[1][key])


def test_registries_of_transformers_stay_as_they_are(folders):
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    load(folders["qwen2_5_vl"])
    config = config_of(folders["qwen2_5_vl"])
    assert not PROCESSOR_MAPPING._extra_content
    assert PROCESSOR_MAPPING[type(config)].__module__.startswith("transformers.")
    if not is_torchvision_available():
        with pytest.raises((ImportError, ValueError), match=r"(?i)torchvision"):
            AutoProcessor.from_pretrained(folders["qwen2_5_vl"])


def test_video_part_may_stand_anywhere():
    class First(ProcessorMixin):
        def __init__(self, video_processor=None, tokenizer=None, chat_template=None, size=1, **kwargs):
            self.size = size
            super().__init__(video_processor, tokenizer, chat_template=chat_template)

    tokenizer = make_tokenizer([])
    built = image_only(First).from_args_and_dict([tokenizer], {"size": 5, "video_processor": {"fps": 2}})
    assert (built.tokenizer, built.size, built.video_processor.fps) == (tokenizer, 5, None)
    assert image_only(First) is image_only(First)


def test_pad_token_is_made_where_there_is_none(folders, tmp_path):
    folder = make_checkpoint("llava", tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    tokenizer = tokenizer_of(load(folder))
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "left")


def test_settings_reach_the_image_processor(folders):
    plain, larger = (
        load(folders["qwen2_5_vl"]),
        load(folders["qwen2_5_vl"], size={"shortest_edge": 64, "longest_edge": 4096}),
    )
    pixels = [p.image_processor([picture(0, 80, 80)], return_tensors="pt")["pixel_values"] for p in (plain, larger)]
    assert len(pixels[1]) > len(pixels[0])


def test_unknown_setting_names_the_nearest(folders):
    with pytest.raises(UsageError, match=r"no setting 'crop_sise'; did you mean crop_size"):
        load(folders["llava"], crop_sise=3)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("removed", "named"),
    [
        (["preprocessor_config.json"], "preprocessor_config.json missing"),
        (["tokenizer.json"], "tokenizer.json missing"),
        (["preprocessor_config.json", "tokenizer.json"], "preprocessor_config.json and tokenizer.json missing"),
    ],
)
def test_folder_without_processor_names_what_is_missing(family, removed, named, tmp_path):
    folder = make_checkpoint(family, tmp_path)
    for name in removed:
        (folder / name).unlink()
    with pytest.raises(UsageError, match=named) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert "copy" in str(error.value)


def test_broken_file_is_named(tmp_path):
    folder = make_checkpoint("llava", tmp_path)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"preprocessor_config\.json: not JSON"):
        load(folder)


def test_tokenizer_alone_is_no_processor(tmp_path):
    make_tokenizer(["<image>"]).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    with pytest.raises(UsageError, match=r"gave only a .*; a VLM needs a tokenizer and an image processor"):
        load_processor(tmp_path, AutoConfig.for_model("kosmos-2"))


@pytest.mark.skipif(is_torchvision_available(), reason="the error of an installation without torchvision")
@pytest.mark.parametrize(
    ("family", "image_processor", "processor"),
    [
        ("llama4", "Llama4ImageProcessor", "Llama4Processor"),
        ("mistral3", "PixtralImageProcessor", "PixtralProcessor"),
        ("lfm2_vl", "Lfm2VlImageProcessor", "Lfm2VlProcessor"),
        ("cohere2_vision", "Cohere2VisionImageProcessor", "Cohere2VisionProcessor"),
    ],
)
def test_family_that_needs_torchvision_says_so(family, image_processor, processor, tmp_path):
    make_tokenizer(["<image>"]).save_pretrained(tmp_path)
    content = {"image_processor_type": image_processor, "processor_class": processor}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert FAMILIES[family].processor == "torchvision"
    with pytest.raises(UsageError, match=f"{family} needs torchvision"):
        load_processor(tmp_path, AutoConfig.for_model(family))


@pytest.mark.skipif("smolvlm" in NEWER, reason="needs torchvision first")
def test_missing_num2words_is_named(folders, monkeypatch):
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(UsageError, match="smolvlm needs num2words; pip install num2words"):
        load(folders["smolvlm"])


def test_unknown_repository_is_named(folders):
    with pytest.raises(UsageError, match=r"nobody/nothing: the processor could not be loaded"):
        load_processor("nobody/nothing", config_of(folders["llava"]), local_files_only=True)


@pytest.mark.parametrize("family", READY)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_template_holds_every_picture_prompt_and_system(folders, family, count):
    processor = load(folders[family])
    text = render(processor, QUESTION, count, system="Be brief.")
    assert text.count(processor.image_token) == count
    assert text.index("Be brief.") < text.index(QUESTION)
    if count:
        assert text.rindex(processor.image_token) < text.index(QUESTION)


def test_llava_without_template_speaks_vicuna(folders):
    processor = load(folders["llava"])
    processor.chat_template = None
    assert render(processor, QUESTION, 1) == "USER: <image>\nWhat is on the table? ASSISTANT:"
    assert render(processor, QUESTION, 2) == "USER: <image>\n<image>\nWhat is on the table? ASSISTANT:"
    assert render(processor, QUESTION, 0, "Be brief.") == "Be brief. USER: What is on the table? ASSISTANT:"


@pytest.mark.parametrize("name", processors.TEMPLATES)
def test_templates_name_processors_of_transformers(name):
    from transformers.models.auto.processing_auto import processor_class_from_name

    assert issubclass(processor_class_from_name(name), ProcessorMixin)


def test_processor_without_rule_is_refused(folders):
    processor = load(folders["internvl"])
    processor.chat_template = None
    with pytest.raises(UsageError, match=r"InternVLProcessor has no chat template.*chat_template\.jinja"):
        render(processor, QUESTION, 1)


def test_template_without_place_is_refused(folders):
    processor = load(folders["llava"])
    processor.chat_template = "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}"
    assert render(processor, QUESTION, 0) == QUESTION
    with pytest.raises(UsageError, match="no place for 1 picture"):
        render(processor, QUESTION, 1)
    processor.chat_template = "{{ messages[-1].content[-1].text }}"
    with pytest.raises(UsageError, match="no place for a system prompt"):
        render(processor, QUESTION, 0, system="Be brief.")


def test_placeholder_in_the_prompt_is_refused(folders):
    with pytest.raises(UsageError, match="prompt contains '<image>'"):
        render(load(folders["llava"]), "What does <image> mean?", 1)


def test_processor_without_tokenizer_is_refused():
    with pytest.raises(UsageError, match="object has no tokenizer"):
        tokenizer_of(object())
