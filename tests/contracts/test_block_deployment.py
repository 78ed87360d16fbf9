"""The laws of a block in deployment: ONNX, determinism, bounded memory, the smallest batch and the smallest map."""

from __future__ import annotations

import io
from collections.abc import Iterator

import onnxruntime
import pytest
import torch

from attnsurgery.blocks import BLOCKS, Block
from attnsurgery.errors import OptionError
from tests.conftest import LargestTensor
from tests.contracts.test_block_contract import CHANNELS, images, make, perturbed, smallest_side, unsupported
from tests.lower_end import EXPORTS_ANY_SIZE

every_block = pytest.mark.parametrize("name", list(BLOCKS))


@every_block
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.since(*EXPORTS_ANY_SIZE)
@pytest.mark.slow
def test_block_onnx_equal_at_other_sizes(name: str) -> None:
    """ONNX Runtime computes the same outputs, also at another size and batch."""
    block = perturbed(make(name)).eval()
    one_size = "any_size" in unsupported(block)
    batch, side = torch.export.Dim("batch", min=1), smallest_side(block)
    sizes = {0: batch}
    if not one_size:
        sizes |= {2: torch.export.Dim("height", min=side), 3: torch.export.Dim("width", min=side)}
    x = images(8, 8)
    if "onnx" in unsupported(block):
        with pytest.raises(torch.onnx.errors.OnnxExporterError):
            torch.onnx.export(block, (x,), dynamo=True, dynamic_shapes={"x": sizes}, verbose=False)
        return
    program = torch.onnx.export(block, (x,), dynamo=True, dynamic_shapes={"x": sizes}, verbose=False)
    file = io.BytesIO()
    assert program is not None
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for other in (x, images(8, 8, batch=3) if one_size else images(6, 9, batch=3)):
        (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        assert torch.allclose(torch.from_numpy(got), block(other), rtol=1e-4, atol=1e-5)


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@every_block
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.slow
def test_block_training_is_deterministic(name: str) -> None:
    """Under deterministic algorithms a training step runs, and gives the same gradients twice."""
    block = perturbed(make(name)).train()
    gradients = []
    for _ in range(2):
        x = images(8, 8).requires_grad_()
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()], allow_unused=True))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_block
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.slow
def test_block_takes_batch_of_one(name: str, training: bool) -> None:
    """One image alone runs forward and backward, but for blocks whose norms need more in training."""
    block = perturbed(make(name)).train(training)
    x = images(8, 8, batch=1).requires_grad_()
    if training and "one_image" in unsupported(block):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            block(x)
        return
    y = block(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


@every_block
@pytest.mark.slow
def test_block_eval_images_are_independent(name: str) -> None:
    """In evaluation mode the output of an image does not depend on the others of its batch."""
    block = perturbed(make(name)).eval()
    x = images(8, 8, batch=3)
    assert torch.allclose(block(x)[1:2], block(x[1:2]), atol=1e-5)


def refusal_of(block: Block, height: int, width: int) -> str:
    """The reason why the block refuses such a map, or an empty string."""
    try:
        block.check_map(height, width)
    except OptionError as error:
        return str(error)
    return ""


@every_block
def test_block_single_position_never_silent(name: str) -> None:
    """No block divides by the zero variance of one position, or takes a softmax over one value, in silence."""
    block = perturbed(make(name)).eval()
    x = images(1, 1)
    if refusal := refusal_of(block, 1, 1):
        assert "1 x 1" in refusal
        return
    y = block(x)
    assert torch.isfinite(y).all()
    assert not torch.equal(y, x)
    assert not torch.equal(y, torch.zeros_like(x))


@every_block
@pytest.mark.slow
def test_block_memory_is_linear_in_positions(name: str) -> None:
    """No tensor of positions by positions is built, in the forward or the backward pass."""
    block = perturbed(make(name)).train()
    if "any_size" in unsupported(block):
        pytest.skip(unsupported(block)["any_size"])
    side = 56
    x = torch.randn(2 if "one_image" in unsupported(block) else 1, CHANNELS, side, side, requires_grad=True)
    with LargestTensor() as watch:
        block(x).sum().backward()
    if "linear_memory" in unsupported(block):
        assert watch.largest >= side**4
    else:
        assert watch.largest <= side**4 // 8  # tiles of a few hundred rows are no matrix
