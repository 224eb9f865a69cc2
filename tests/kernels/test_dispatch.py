"""Which form of an operation runs."""

from types import SimpleNamespace

import pytest
import torch

import vlmfix
from tests.families import build
from vlmfix.attention import run
from vlmfix.kernels import dispatch


def tensor(device, dtype=torch.float16, requires_grad=False):
    place = torch.device(device)
    return SimpleNamespace(is_cuda=place.type == "cuda", device=place, dtype=dtype, requires_grad=requires_grad)


@pytest.mark.skipif(dispatch.INTERPRETED or not dispatch.has_triton(), reason="about kernels on a GPU")
def test_kernels_run_on_the_current_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert dispatch.use_triton(tensor("cuda:1"), tensor("cuda:1"))
    assert not dispatch.use_triton(tensor("cuda:0"))
    assert not dispatch.use_triton(tensor("cuda:1"), tensor("cuda:0"))
    assert not dispatch.use_triton(tensor("cpu"))
    assert not dispatch.use_triton(tensor("cuda:1", torch.float64))
    assert not dispatch.use_triton(tensor("cuda:1", requires_grad=True))
    with dispatch.reference_only():
        assert not dispatch.use_triton(tensor("cuda:1"))
    assert dispatch.use_triton(tensor("cuda:1"))


def test_a_block_on_a_device():
    with dispatch.on_device(torch.device("cpu")):
        pass
    assert dispatch.on_device(torch.device("cuda:1")).idx == 1


def test_a_generation_runs_on_the_models_device(monkeypatch):
    devices = []
    monkeypatch.setattr(run, "on_device", lambda device: devices.append(device) or dispatch.on_device(device))
    tiny = build("llava", fresh=True)
    with vlmfix.wrap(tiny.model, None, "pai", engine="hf") as vlm:
        vlm.generate(**tiny.inputs((1,)), max_new_tokens=2)
    assert devices == [tiny.model.device]
