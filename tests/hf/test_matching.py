"""Where a picture matches a text, by a tiny random BLIP; AGLA with it."""

from types import SimpleNamespace

import pytest
import torch

import vlmfix
from vlmfix.decoders.agla import AGLA, grid
from vlmfix.errors import UsageError
from vlmfix.hf import matching
from vlmfix.views.masked import Masked, enlarge, most_relevant

from ..families import build

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "encoder_hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "projection_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "pad_token_id": 0,
    "eos_token_id": 3,
    "sep_token_id": 3,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval, BlipImageProcessorPil, BlipProcessor

    path = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[ENC]", "where", "is", "the", "cat", "?", "a", "dog"]
    (path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BlipConfig(
        text_config=TEXT, vision_config={**VISION, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    config.image_text_hidden_size = 16
    model = BlipForImageTextRetrieval(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    tokenizer = BertTokenizer(str(path / "vocab.txt"))
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def matcher(folder):
    return matching.load(str(folder))


def test_the_map_is_attention_times_its_positive_gradient(matcher):
    picture = torch.rand(3, 40, 24)
    found, similarity = matcher.relevance(picture, "Where is the cat?")
    assert found.shape == (4, 4)
    assert found.min() >= 0
    assert found.max() > 0
    assert -1 <= similarity <= 1
    other, _ = matcher.relevance(picture, "a dog")
    assert not torch.allclose(found, other)


def test_frozen_weights_and_inference_mode_change_nothing(matcher):
    picture = torch.rand(3, 32, 32)
    want = matcher.relevance(picture, "the cat")[0]
    matcher.model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(matcher.relevance(picture, "the cat")[0], want)
    with torch.inference_mode():
        got = matcher.relevance(picture.clone(), "the cat")[0]
    torch.testing.assert_close(got, want)
    matcher.model.requires_grad_(True)


def test_similarity_is_the_models_own(matcher):
    tokens = matcher.processor.tokenizer("the cat", return_tensors="pt")
    picture = torch.rand(3, 32, 32)
    images = matcher.processor.image_processor
    mean, std = (torch.tensor(x)[:, None, None] for x in (images.image_mean, images.image_std))
    with torch.no_grad():
        want = matcher.model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=((picture - mean) / std)[None],
            use_itm_head=False,
        ).itm_score
    assert matcher.relevance(picture, "the cat")[1] == pytest.approx(float(want), abs=1e-5)


class Rendering:
    def behind_picture(self, question):
        return [20, 21]

    def question(self, ids):
        return "where is the cat"

    def colours(self):
        return (0.5,) * 3, (0.25,) * 3


def test_agla_masks_by_matching(folder):
    facts = SimpleNamespace(rendering=Rendering(), family="llava")
    ready = AGLA(source=str(folder)).resolve(facts)
    assert ready.colours == ((0.5,) * 3, (0.25,) * 3)
    (view,) = ready.branches()
    pixels = torch.randn(3, 32, 48).clamp(-2, 2)
    seen = view.picture(pixels, SimpleNamespace(behind=(20, 21)))
    black = (seen == -2.0).all(0)
    similarity = matching.load(str(folder)).relevance(pixels * 0.25 + 0.5, "where is the cat")[1]
    assert float(black.float().mean()) == pytest.approx(max(similarity, 0) / 2, abs=0.01)
    assert torch.equal(seen[:, ~black], pixels[:, ~black])


def test_agla_needs_what_it_needs(folder, tmp_path):
    model = build("llava").model
    with pytest.raises(vlmfix.Refusal, match="agla needs the processor"):
        vlmfix.wrap(model, None, "agla")
    with pytest.raises(vlmfix.Refusal, match="agla needs the processor"):
        vlmfix.wrap(model, None, f"agla(source='{folder}')")
    with pytest.raises(UsageError, match="could not be loaded as a BLIP"):
        AGLA(source=str(tmp_path)).resolve(SimpleNamespace(rendering=Rendering(), family="llava"))
    with pytest.raises(vlmfix.Refusal, match="visual tokens of instructblip stand for no place"):
        vlmfix.wrap(build("instructblip").model, None, "agla(colours=((0,),(1,)))")


@pytest.mark.parametrize(
    ("tokens", "size", "want"), [(9, (12, 12), (3, 3)), (6, (28, 42), (2, 3)), (6, (42, 28), (3, 2))]
)
def test_a_grid_has_the_pictures_proportions(tokens, size, want):
    assert grid(tokens, torch.zeros(3, *size)) == want


@pytest.mark.parametrize("tokens", [7, 145])
def test_no_grid_is_refused(tokens):
    with pytest.raises(vlmfix.Refusal, match="form no grid"):
        grid(tokens, torch.zeros(3, 12, 12))


def test_a_constant_map_leaves_the_picture():
    pixels = torch.randn(3, 8, 8)
    view = Masked((0.0,) * 3, (1.0,) * 3, lambda picture, place: (torch.ones(2, 2), 0.5))
    assert torch.equal(view.picture(pixels, None), pixels)


@pytest.mark.parametrize("size", [(20, 30), (384, 24)])
def test_the_kept_share_of_an_enlarged_map(size):
    large = enlarge(torch.rand(4, 5), *size)
    assert large.shape == size
    assert float(large.min()) == 0
    assert float(large.max()) == 1
    assert float(most_relevant(large, 0.3).double().mean()) == pytest.approx(0.3, abs=0.01)
