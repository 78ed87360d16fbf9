"""The laws of all decoders of segmentation models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from attnsurgery.models.decoders import DECODERS
from tests.conftest import wake

SIZES = {"pan": (128, 160)}  # it pools the last map three times


def name_of(decoder: str, arch: str = "test_resnet") -> str:
    """A name with the decoder at its smallest supported stride; the test skips without the decoder's package."""
    if decoder not in ("fcn", "danet"):
        pytest.importorskip("segmentation_models_pytorch", reason="the extra 'segmentation' is not installed")
    return f"{arch}_{decoder}{DECODERS[decoder].strides[0]}"


def build(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return wake(timm.create_model(name, **{"num_classes": 5, **kwargs})).eval()


def images(height: int = 48, width: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def images_for(decoder: str) -> torch.Tensor:
    return images(*SIZES.get(decoder, (48, 64)))


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.slow
def test_decoder_scores_every_pixel(decoder: str) -> None:
    """In eval mode there is one output of the images' size; in training every output has it."""
    model = build(name_of(decoder))
    x = images_for(decoder)
    assert model(x).shape == (2, 5, *x.shape[2:])
    outputs = model.train()(x)
    several = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(several) == len(model.decoder.classifiers)
    assert all(scores.shape == (2, 5, *x.shape[2:]) for scores in several)


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.slow
def test_decoder_trains_every_parameter(decoder: str) -> None:
    """Every parameter of backbone and decoder gets a gradient."""
    model = build(name_of(decoder)).train()
    outputs = model(images_for(decoder))
    total = sum(scores.square().mean() for scores in (outputs if isinstance(outputs, tuple) else (outputs,)))
    total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.slow
def test_decoder_state_round_trip(decoder: str) -> None:
    """A state dict gives the same bits; the meta device gives the same names and shapes."""
    name = name_of(decoder)
    model, x = build(name), images_for(decoder)
    other = timm.create_model(name, num_classes=5).eval()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))
    with torch.device("meta"):
        twin = timm.create_model(name, num_classes=5).eval()
    assert all(parameter.is_meta for parameter in twin.parameters())
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert twin(x.to("meta")).shape == model(x).shape


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.slow
def test_decoder_takes_dtype_and_memory_format(decoder: str) -> None:
    """bfloat16 and channels_last work, and channels_last gives nearly the same numbers."""
    model, x = build(name_of(decoder)), images_for(decoder)
    expected = model(x)
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert (last - expected).norm() < 1e-4 * expected.norm()
    half = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype is torch.bfloat16
    assert half.isfinite().all()


@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.slow
def test_decoder_replaces_its_classifier(decoder: str) -> None:
    """A new classifier starts as a built one; without one, the maps in front of it come out."""
    name, x = name_of(decoder), images_for(decoder)
    model = build(name).double()
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(x.double()).shape == (2, 3, *x.shape[2:])
    built = timm.create_model(name, num_classes=3).get_classifier()
    for fresh, reset in zip(_layers(built), _layers(model.get_classifier()), strict=True):
        assert reset.weight.dtype is torch.float64
        assert reset.weight.shape == fresh.weight.shape
        assert float(reset.weight.detach().std()) == pytest.approx(float(fresh.weight.detach().std()), rel=0.3)
    model.reset_classifier(0)
    assert model(x.double()).shape == (2, model.head_hidden_size, *x.shape[2:])
    without = timm.create_model(name, num_classes=0).eval()
    assert without.num_classes == 0
    without.reset_classifier(4)
    assert without(x).shape[1] == 4


def _layers(classifier: Any) -> tuple[Any, ...]:
    return classifier if isinstance(classifier, tuple) else (classifier,)


@pytest.mark.parametrize("decoder", ["fcn", "danet"])
@pytest.mark.slow
def test_decoder_exports_with_dynamic_batch(decoder: str) -> None:
    """torch.export keeps the number of images open."""
    model, x = build(name_of(decoder)), images_for(decoder)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=16)},))
    three = torch.cat([x, x[:1]])
    assert torch.allclose(program.module()(three), model(three), atol=1e-5)


@pytest.mark.parametrize("decoder", list(DECODERS))
def test_decoder_has_a_spellable_name(decoder: str) -> None:
    """Names are lower-case letters and digits, of which no two with their strides can be confused."""
    assert decoder.isalnum()
    assert decoder.islower()
    spelled = [f"{name}{stride}" for name in DECODERS for stride in (8, 16, 32)]
    assert len(set(spelled)) == len(spelled)
