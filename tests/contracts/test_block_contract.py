"""The laws of `Block`, checked for everything in the catalog."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping

import pytest
import torch

from attnsurgery.blocks import BLOCKS, Block
from attnsurgery.blocks._base import build_block, check_options, options_model
from attnsurgery.errors import OptionError, UnknownNameError
from tests.conftest import error_tolerated, relative_error
from tests.lower_end import EXPORTS_ANY_SIZE

CHANNELS = 16

every_block = pytest.mark.parametrize("name", list(BLOCKS))
every_start = pytest.mark.parametrize("start", ["identity", "paper"])
HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
every_size = pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5)])


def make(name: str, start: str = "identity", dtype: torch.dtype | None = None) -> Block:
    """The block with its default options, or with its own example where these do not fit 16 channels and 8 x 8."""
    torch.manual_seed(0)
    return build_block(name, CHANNELS, getattr(BLOCKS[name], "example", {}), start, dtype=dtype)


def unsupported(block: Block) -> Mapping[str, str]:
    """What a module of another library cannot do, with the reason; the tests make sure that it really cannot."""
    return getattr(block, "unsupported", {})


def images(*size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *size, generator=torch.Generator().manual_seed(1))


def block_for(name: str, size: tuple[int, int], start: str = "identity") -> Block:
    """The block; skips the test where it refuses such a map, for which other tests exist."""
    block = make(name, start)
    try:
        block.check_map(*size)
    except OptionError as refusal:
        pytest.skip(str(refusal))
    return block


def neutral(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The output of an identity start, which is its input, or the factor 1 where a block scales a span's output."""
    return torch.ones_like(x) if block.gates else x


def smallest_side(block: Block) -> int:
    """The side of the smallest square map that the block takes, at least 2."""
    for side in range(2, 33):
        try:
            block.check_map(side, side)
        except OptionError:
            continue
        return side
    raise AssertionError("the block takes no map")


def perturbed(block: Block) -> Block:
    """The block after one optimiser step on a random target, which moves it off its start."""
    x = images(8, 8)
    block.train()
    loss = (block(x) - torch.randn_like(x)).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    block.zero_grad(set_to_none=True)
    return block


@every_block
@every_size
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.slow
def test_block_identity_start_is_bit_exact(name: str, size: tuple[int, int], training: bool) -> None:
    """At an identity start the output equals the input bit for bit, in training and in evaluation, at odd sizes too."""
    block, x = block_for(name, size).train(training), images(*size)
    assert torch.equal(block(x), neutral(block, x))


@every_block
@pytest.mark.slow
def test_block_output_differs_once_moved(name: str) -> None:
    """After one optimiser step the output differs from the input."""
    block, x = perturbed(make(name)).eval(), images(8, 8)
    assert not torch.equal(block(x), neutral(block, x))


@every_block
@every_start
@every_size
@pytest.mark.slow
def test_block_output_keeps_form_of_input(name: str, start: str, size: tuple[int, int]) -> None:
    """The output has the shape, dtype and memory format of the input, and shares no memory with it."""
    block = block_for(name, size, start).eval()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images(*size, batch=3).to(memory_format=memory_format)
        y = block(x)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert y.is_contiguous(memory_format=memory_format)
        assert y.data_ptr() != x.data_ptr()


@every_block
def test_block_output_allows_in_place_add(name: str) -> None:
    """Adding to the output in place gives the same gradients as adding out of place."""
    block, x = perturbed(make(name)).eval(), images(8, 8).requires_grad_()
    (expected,) = torch.autograd.grad((block(x) + 1).square().sum(), x)
    (got,) = torch.autograd.grad(block(x).add_(1).square().sum(), x)
    assert torch.equal(got, expected)


@every_block
@every_start
@pytest.mark.slow
def test_block_parameters_all_get_gradients(name: str, start: str) -> None:
    """After one step every parameter gets a gradient that is not zero, some biases excepted."""
    block = perturbed(make(name, start)).train()
    block(images(8, 8)).square().mean().backward()
    without = [key for key, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a bias in front of a batch norm, or of keys under a softmax, provably has no effect
    assert all(key.endswith("bias") for key in without), without


@every_block
@every_start
@pytest.mark.slow
def test_block_state_dict_round_trip(name: str, start: str) -> None:
    """A state dict that is saved and loaded gives another instance the same outputs."""
    block, other = perturbed(make(name, start)).eval(), make(name, start).eval()
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    x = images(8, 8)
    assert not torch.equal(other(x), block(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), block(x))


@every_block
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_block_autocast_near_full_precision(name: str, dtype: torch.dtype) -> None:
    """Under autocast the outputs are finite and close to those in full precision."""
    block, x = perturbed(make(name)).eval(), images(8, 8)
    with torch.autocast("cpu", dtype=dtype):
        y = block(x)
    assert torch.isfinite(y).all()
    assert torch.allclose(y.float(), block(x), atol=0.1, rtol=0.1)


@every_block
def test_block_bfloat16_identity_is_exact(name: str) -> None:
    """A block with bfloat16 weights takes bfloat16 maps, and its identity start is exact."""
    block = make(name, dtype=torch.bfloat16).eval()
    x = images(8, 8).bfloat16()
    assert torch.equal(block(x), neutral(block, x))


@every_block
@pytest.mark.since(*EXPORTS_ANY_SIZE, cases=("residual",))
@pytest.mark.slow
def test_block_compiles_exports_and_scripts(name: str) -> None:
    """A compiled, an exported and a scripted block compute what the eager one computes."""
    block = perturbed(make(name)).eval()
    one_size = "any_size" in unsupported(block)
    x = images(8, 8) if one_size else images(8, 9)
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    # torch takes bilinear interpolation apart before a compiler sees it, and rounds otherwise
    assert torch.allclose(compiled, expected, atol=1e-6, rtol=0) if block.gates else torch.equal(compiled, expected)
    if "script" in unsupported(block):
        with pytest.raises(RuntimeError):
            torch.jit.script(block)
    else:
        assert torch.equal(torch.jit.script(block)(x), expected)
    batch, side = torch.export.Dim("batch"), smallest_side(block)
    sizes = {
        0: batch,
        2: torch.export.Dim("height", min=side),
        3: torch.export.Dim("width", min=side),
    }
    if one_size:
        with pytest.raises(AssertionError):
            block(images(7, 9))
    exported = torch.export.export(block, (x,), dynamic_shapes={"x": {0: batch} if one_size else sizes}).module()
    other = images(8, 8, batch=4) if one_size else images(5, 6, batch=4)
    assert torch.allclose(exported(other), block(other), atol=1e-6)
    torch._dynamo.reset()


@every_block
@pytest.mark.slow
def test_block_cost_counts_what_torch_counts(name: str) -> None:
    """The multiply-accumulates of `cost` are those that torch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    block, x = make(name).eval(), images(8, 8, batch=1)
    counter = FlopCounterMode(display=False)
    with counter:
        block(x)
    assert block.cost(8, 8).macs == counter.get_total_flops() // 2


@every_block
def test_block_options_are_strict(name: str) -> None:
    """A misspelt option, a wrong type and a value out of bounds are refused with what is allowed."""
    fields = options_model(BLOCKS[name]).model_fields
    counts = [option for option, info in fields.items() if type(info.default) is int] or list(fields)
    option = counts[0]
    typo = option + option[-1]
    with pytest.raises(OptionError, match=rf"has no option '{typo}'. Did you mean '{option}'\?.*{option}="):
        check_options(name, {typo: 2})
    with pytest.raises(OptionError, match=f"cannot take {option}="):
        check_options(name, {option: [2]})
    if fields[option].metadata:  # it has bounds
        with pytest.raises(OptionError, match=f"cannot take {option}=-1"):
            check_options(name, {option: -1})


@every_block
def test_block_options_are_all_documented(name: str) -> None:
    """The docstring of a block has an entry for each of its options."""
    undocumented = [
        option for option in options_model(BLOCKS[name]).model_fields if f"{option}:" not in BLOCKS[name].__doc__
    ]
    assert not undocumented


@every_block
def test_block_loads_whole_or_not_at_all(name: str) -> None:
    """A grafted block loads a checkpoint without its own keys or with all of them, but not with a part."""

    class Host(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, CHANNELS, 1)
            self.block = make(name)

    host = Host()
    everything = host.state_dict()
    of_base = {key: value for key, value in everything.items() if key.startswith("conv")}
    with pytest.raises(RuntimeError, match="Missing key"):
        host.load_state_dict(of_base)
    host.block.grafted = True
    host.load_state_dict(of_base)
    host.load_state_dict(everything)
    if len(host.block.state_dict()) == 1:
        return  # one key has no parts
    half = {key: value for key, value in everything.items() if key != list(everything)[-1]}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="only a part of the block 'block'"):
            host.load_state_dict(half, strict=strict)


def test_block_unknown_name_suggests_nearest() -> None:
    """An unknown name of a block is refused with the nearest one."""
    with pytest.raises(UnknownNameError, match=r"no block 'nonlocal'. Did you mean 'non_local'\?"):
        build_block("nonlocal", CHANNELS, {}, "identity")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("no_tf32")
@every_block
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_block_gpu_error_within_cpu_error(name: str, dtype: torch.dtype) -> None:
    """||y - y64|| / ||y64|| is no larger than on the CPU, y64 from the same rounded values; the start is exact."""
    image = gpu_image(name)
    block, x = make(name).to("cuda", dtype), image.to("cuda", dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(block(x.to(memory_format=memory_format)), neutral(block, x))
    moved = far_from_start(name)
    expected, on_cpu = reference(moved, image, dtype), copy.deepcopy(moved).to(dtype)
    tolerated = error_tolerated(relative_error(on_cpu(image.to(dtype)), expected), dtype)
    on_gpu = copy.deepcopy(moved).to("cuda", dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            for weight in on_gpu.parameters():
                if weight.dim() == 4:  # timm:lambda has five dimensions too, for which this is no format
                    weight.set_(weight.contiguous(memory_format=memory_format))
            assert relative_error(on_gpu(x.to(memory_format=memory_format)), expected) <= tolerated


@every_block
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.slow
def test_block_gpu_tolerance_is_small(name: str, dtype: torch.dtype) -> None:
    """The tolerance of the GPU test is the error of the CPU, which is small against what the block does."""
    moved, image = far_from_start(name), gpu_image(name)
    expected, on_cpu = reference(moved, image, dtype), copy.deepcopy(moved).to(dtype)
    error = relative_error(on_cpu(image.to(dtype)), expected)
    assert error <= 8 * torch.finfo(dtype).eps
    if dtype == torch.float32:  # what two of the blocks do, bfloat16 hardly shows
        idle = relative_error(neutral(moved, image), expected)
        assert idle > 100 * error_tolerated(error, dtype)


def far_from_start(name: str) -> Block:
    """A block in eval mode whose parameters are all so large that it does much to its input."""
    block = perturbed(make(name)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return block


def gpu_image(name: str) -> torch.Tensor:
    return images(8, 8) if "any_size" in unsupported(make(name)) else images(14, 14)


def reference(moved: Block, image: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The output in fp64, from weights and images that are rounded to `dtype`."""
    with torch.no_grad():
        return copy.deepcopy(moved).to(dtype).double()(image.to(dtype).double())
