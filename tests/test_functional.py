"""The exact forms of pairwise sums against their formulas with an N x M matrix."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnsurgery.blocks import crossover, cuda_attention, functional, sizes
from attnsurgery.blocks.functional import attend, channel_weights, concatenate, dot_product
from tests.conftest import LargestTensor

ALWAYS, NEVER = 1 << 62, 0  # of the product form


def naive_attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    return torch.softmax(scale * query @ key.transpose(1, 2), dim=-1) @ value


def naive_dot_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    return theta @ phi.transpose(1, 2) / phi.shape[1] @ g


def naive_concatenate(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return torch.relu(a[:, :, None] + b[:, None, :]) / b.shape[1] @ g


def rows(batch: int, positions: int, width: int, seed: int, channels_last: bool = False) -> Tensor:
    """(B, N, E) in fp64, laid out in memory as a map is: (B, E, N) unless channels last."""
    values = torch.randn(batch, width, positions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values = values.transpose(1, 2)
    return (values.contiguous() if channels_last else values).requires_grad_()


def numbers(batch: int, positions: int, seed: int) -> Tensor:
    values = torch.randn(batch, positions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_()


# name: (ours, naive, inputs of batch, N, M and memory format)
Form = tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[int, int, int, bool], list[Tensor]]]


def widths(width: int, value_width: int) -> Callable[[int, int, int, bool], list[Tensor]]:
    return lambda batch, n, m, last: [
        rows(batch, n, width, 1, last),
        rows(batch, m, width, 2, last),
        rows(batch, m, value_width, 3, last),
    ]


def scores(batch: int, n: int, m: int, last: bool) -> list[Tensor]:
    return [numbers(batch, n, 1), numbers(batch, m, 2), rows(batch, m, 4, 3, last)]


FORMS: dict[str, Form] = {
    "softmax_product": (lambda *t: attend(*t, 0.5, ALWAYS), lambda *t: naive_attend(*t, 0.5), widths(4, 6)),
    "softmax_fused": (lambda *t: attend(*t, 0.5, NEVER), lambda *t: naive_attend(*t, 0.5), widths(4, 4)),
    "softmax_tiles": (lambda *t: attend(*t, 0.5, NEVER), lambda *t: naive_attend(*t, 0.5), widths(4, 6)),
    "softmax_tiles_narrow": (lambda *t: attend(*t, 1.0, NEVER), naive_attend, widths(6, 4)),
    "softmax_padded": (lambda *t: functional._fused(*t, 1.0), naive_attend, widths(4, 6)),
    "softmax_padded_narrow": (lambda *t: functional._fused(*t, 1.0), naive_attend, widths(6, 4)),
    "softmax_heads": (lambda *t: cuda_attention.fused(*t, 1.0, True), naive_attend, widths(8, 16)),
    "softmax_widths_of_no_kernel": (lambda *t: cuda_attention.fused(*t, 1.0, True), naive_attend, widths(3, 9)),
    "softmax_one_head": (lambda *t: cuda_attention.fused(*t, 1.0, False), naive_attend, widths(8, 16)),
    "softmax_cuda_product": (
        lambda *t: cuda_attention.product(*t, 0.5),
        lambda *t: naive_attend(*t, 0.5),
        widths(4, 6),
    ),
    "dot_product": (dot_product, naive_dot_product, widths(4, 4)),
    "dot_product_wide": (dot_product, naive_dot_product, widths(20, 30)),
    "concatenation_product": (lambda *t: concatenate(*t, ALWAYS), naive_concatenate, scores),
    "concatenation_sorted": (lambda *t: concatenate(*t, NEVER), naive_concatenate, scores),
    "concatenation_plain": (functional._concatenate, naive_concatenate, scores),
}

# Forms that hold the matrix: the products, and fused kernels that a CPU does not have for such widths.
MATRIX = [
    *(form for form in FORMS if form.endswith("_product")),
    *("softmax_heads", "softmax_one_head", "softmax_widths_of_no_kernel"),
]
every_form = pytest.mark.parametrize("form", list(FORMS))


@every_form
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("batch", "n", "m"), [(1, 8, 8), (3, 7, 5), (2, 5, 7), (2, 6, 1), (2, 1, 6), (1, 1, 1), (2, 300, 280)]
)
@pytest.mark.slow
def test_forms_compute_formula_and_gradient(form: str, batch: int, n: int, m: int, channels_last: bool) -> None:
    """Each form computes the formula and its gradient."""
    ours, naive, make = FORMS[form]
    inputs = make(batch, n, m, channels_last)
    got, expected = ours(*inputs), naive(*inputs)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-12
    weights = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).reshape(got.shape)
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in (got, expected)]
    for ours_, theirs in zip(*gradients, strict=True):
        assert (ours_ - theirs).abs().max() <= 1e-11


@every_form
@pytest.mark.slow
def test_forms_pass_gradcheck(form: str) -> None:
    """Each form passes torch.autograd.gradcheck."""
    ours, _, make = FORMS[form]
    assert torch.autograd.gradcheck(ours, make(2, 4, 3, False))


@every_form
def test_forms_respect_permutations(form: str) -> None:
    """Permuted queries permute the result, and permuted keys with their values change nothing."""
    ours, _, make = FORMS[form]
    first, second, values = make(2, 9, 11, False)
    of_queries, of_keys = torch.randperm(9), torch.randperm(11)
    expected = ours(first, second, values)
    assert (ours(first[:, of_queries], second, values) - expected[:, of_queries]).abs().max() <= 1e-12
    assert (ours(first, second[:, of_keys], values[:, of_keys]) - expected).abs().max() <= 1e-12
    assert (ours(first, second[:, of_keys], values) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("channels_last", [False, True])
def test_attend_in_slices_gives_same_sums(channels_last: bool) -> None:
    """Queries in slices give the same sums."""
    inputs = [t.detach() for t in widths(4, 4)(2, 2 * functional._SLICE + 5, 70, channels_last)]
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got = attend(*inputs, 0.5, NEVER)
    assert (got - naive_attend(*inputs, 0.5)).abs().max() <= 1e-12


@pytest.mark.parametrize("form", ["concatenation_product", "concatenation_sorted", "concatenation_plain"])
def test_concatenation_of_zero_sum_pairs(form: str) -> None:
    """Pairs that add up to zero give zero and get no gradient."""
    ours, naive, _ = FORMS[form]
    a = torch.tensor([[-2.0, -1, 0, 1, 2, 2]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[2.0, 1, 1, 0, -1, -2]], dtype=torch.float64, requires_grad=True)
    g = rows(1, 6, 3, 1)
    assert (ours(a, b, g) - naive(a, b, g)).abs().max() <= 1e-12
    for got, expected in zip(
        torch.autograd.grad(ours(a, b, g).square().sum(), (a, b, g)),
        torch.autograd.grad(naive(a, b, g).square().sum(), (a, b, g)),
        strict=True,
    ):
        assert (got - expected).abs().max() <= 1e-12
    nothing = ours(a[:, :1], -a[:, :1], g[:, :1])
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_counts_agree_with_comparing_all() -> None:
    """Counting by sorting and by binary search agree with comparing all pairs."""
    generator = torch.Generator().manual_seed(0)
    for n, m in [(1, 1), (5, 9), (40, 30)]:
        a, b = (torch.randint(-3, 4, (2, size), generator=generator).double() for size in (n, m))
        above, tied = ((compare(b[:, None, :], -a[:, :, None])).sum(2) for compare in (torch.gt, torch.eq))
        falling = b.sort(dim=1, descending=True)[0]
        assert torch.equal(functional._count_above(a, b, falling), above)
        by_sorting = functional._count_by_sorting(a, b)
        assert (by_sorting >= above).all()
        assert (by_sorting <= above + tied).all()


FUSED = ["softmax_fused", "softmax_padded", "softmax_padded_narrow"]


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((form, dtype) for form in FUSED for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        ("softmax_heads", torch.bfloat16),  # in full precision another kernel of CUDA takes different widths
        ("softmax_heads", torch.float16),
    ],
)
def test_fused_kernel_really_runs(form: str, dtype: torch.dtype) -> None:
    """Each form runs where torch may use the fused kernel alone."""
    ours, naive, make = FORMS[form]
    inputs = [t.detach().to(dtype) for t in make(2, 90, 80, False)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got = ours(*inputs)
    assert torch.allclose(got.double(), naive(*(t.double() for t in inputs)), atol=0.05)


def test_forced_fused_kernel_has_no_fallback() -> None:
    """Where one kernel is forced, falling back to another raises."""
    query, key, value = (t.unsqueeze(1) for t in widths(4, 6)(1, 90, 80, True))
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.warns(UserWarning, match="Flash"),
        pytest.raises(RuntimeError, match="kernel"),
    ):
        torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)


@pytest.mark.parametrize("m", [3136, 784])
@pytest.mark.parametrize("form", [form for form in FORMS if form not in MATRIX])
@pytest.mark.slow
def test_forms_build_no_matrix_on_large_maps(form: str, m: int) -> None:
    """On large maps no form builds the matrix, forward or backward, which the plain formula does."""
    ours, naive, make = FORMS[form]
    inputs = [t.detach().float().requires_grad_() for t in make(1, 3136, m, False)]
    with LargestTensor() as watched:
        torch.autograd.grad(ours(*inputs).sum(), inputs)
    assert watched.largest <= 3136 * m / 3
    with LargestTensor() as of_naive, torch.no_grad():
        naive(*inputs)
    assert of_naive.largest == 3136 * m


def test_default_crossovers_build_no_matrix() -> None:
    """At the default crossovers the matrix is not built either."""
    for form in (attend, concatenate):
        make = scores if form is concatenate else widths(8, 8)
        with LargestTensor() as watched, torch.no_grad():
            form(*make(1, 3136, 784, False))
        assert watched.largest < 3136 * 784 / 4


@pytest.mark.parametrize(("n", "size"), [(3136, 8.0), (3136, 0.01), (4, 8.0)])
def test_dot_product_in_fp16_stays_in_range(n: int, size: float) -> None:
    """A dot product in half precision neither overflows nor underflows."""
    theta, phi, g = torch.ones(1, n, 4).half(), *(torch.full((1, 3136, 4), size).half() for _ in range(2))
    assert size < 1 or torch.isinf(phi.transpose(1, 2) @ g).all()
    expected = naive_dot_product(theta.double(), phi.double(), g.double())
    assert torch.allclose(dot_product(theta, phi, g).double(), expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_concatenate_sums_in_full_precision(dtype: torch.dtype) -> None:
    """Sums of half-precision values are taken in full precision."""
    a, b, g = (t.detach().to(dtype) for t in scores(2, 3136, 3136, False))
    got = concatenate(a, b, g)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), naive_concatenate(a.double(), b.double(), g.double()), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("paper", [False, True])
def test_channel_weights_are_energy_softmax(paper: bool) -> None:
    """The weights of channels are the softmax of the energy, in the paper's form and in the code's."""
    x = rows(2, 5, 12, 1).detach().requires_grad_()  # 5 channels, 12 positions
    energy = x @ x.transpose(1, 2)
    expected = torch.softmax(energy if paper else energy.amax(dim=-1, keepdim=True) - energy, dim=-1)
    assert (channel_weights(x, paper) - expected).abs().max() <= 1e-12
    assert torch.autograd.gradcheck(lambda t: channel_weights(t, paper), x)
    assert (channel_weights(x, not paper) - expected).abs().max() > 0.1


@pytest.mark.parametrize("autocast", [False, True])
def test_channel_energy_avoids_fp16(autocast: bool) -> None:
    """The energy of channels, which overflows fp16, is computed in float32."""
    x = 20 * torch.randn(1, 8, 3136, generator=torch.Generator().manual_seed(0))
    naive = torch.bmm(x.half(), x.half().transpose(1, 2))
    naive = torch.softmax(naive.amax(dim=-1, keepdim=True) - naive, dim=-1)
    assert torch.isnan(naive).any()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        got = channel_weights(x if autocast else x.half())
    assert got.dtype == torch.float32
    assert torch.isfinite(got).all()
    assert torch.allclose(got.sum(dim=-1), torch.ones(1, 8))


class Kernels(TorchDispatchMode):
    """Notes the names of operators that move or compute numbers, and leaves views out."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        inputs = [t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if any(t.untyped_storage()._cdata not in inputs for t in outputs):
            self.ran.append(func.overloadpacket.__name__)
        return result


def kernels(function: Callable[..., Tensor], *inputs: Tensor) -> list[str]:
    with Kernels() as watched, torch.no_grad():
        function(*inputs)
    return watched.ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (8, 32), (64, 24)])
def test_fused_on_cuda_copies_nothing(
    dtype: torch.dtype, width: int, value_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused form on CUDA copies nothing where no width has to be padded."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Returns memory as CUDA's kernels lay it out: heads behind positions."""
        batch, heads, positions, _ = query.shape
        return query.new_empty(batch, positions, heads, value.shape[3]).transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    inputs = [t.detach().to(dtype).contiguous() for t in widths(width, value_width)(2, 9, 9, True)]
    assert kernels(lambda *t: cuda_attention.fused(*t, 1.0, True), *inputs) == ["new_empty"]
    narrow = [t[..., :7] for t in inputs]
    assert kernels(lambda *t: cuda_attention.fused(*t, 1.0, True), *narrow).count("constant_pad_nd") == 3


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_product_on_cuda_is_three_kernels(scale: float) -> None:
    inputs = [t.detach().contiguous() for t in widths(4, 6)(2, 9, 7, True)]
    ran = kernels(lambda *t: cuda_attention.product(*t, scale), *inputs)
    assert [name for name in ran if name != "new_empty"] == ["bmm" if scale == 1.0 else "baddbmm", "_softmax", "bmm"]


RULES: tuple[crossover.Rule, ...] = (
    ("half", "forward", 1, 64, 64, 0, 784 * 784, True),
    ("half", "forward", 1, 64, 512, 49 * 49, 196 * 196, False),
    ("half", "forward", 64, 64, 64, 0, 49 * 49, True),
    ("half", "both", 1, 64, 64, 0, 196 * 196, True),
)


@pytest.fixture
def measured_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Takes the CPU for a card with RULES, and gives the list of forms that run."""
    monkeypatch.setattr(crossover, "CARDS", {"some-card": ((9, 0), RULES)})
    monkeypatch.setattr(cuda_attention, "CARDS", crossover.CARDS)
    monkeypatch.setattr(cuda_attention, "_card", lambda device: ("some-card", (9, 0)))
    ran: list[str] = []
    for form in ("product", "fused"):
        original = getattr(cuda_attention, form)

        def watched(*inputs: Any, form: str = form, original: Callable[..., Tensor] = original) -> Tensor:
            ran.append(form + ("" if form == "product" else f"_{inputs[4]}"))
            return original(*inputs)

        monkeypatch.setattr(cuda_attention, form, watched)
    cuda_attention._choice.cache_clear()
    yield ran
    cuda_attention._choice.cache_clear()


@pytest.mark.parametrize(
    ("batch", "n", "m", "width", "value_width", "dtype", "learns", "form"),
    [
        (1, 784, 784, 64, 64, torch.bfloat16, False, "product"),
        (1, 784, 785, 64, 64, torch.bfloat16, False, "fused_True"),
        (1, 784, 784, 80, 48, torch.bfloat16, False, "product"),
        (1, 784, 784, 64, 64, torch.float16, False, "fused_True"),
        (1, 196, 196, 64, 512, torch.bfloat16, False, "product"),
        (1, 197, 196, 64, 512, torch.bfloat16, False, "fused_False"),
        (1, 49, 49, 64, 512, torch.bfloat16, False, "fused_False"),
        (1, 196, 196, 64, 64, torch.bfloat16, True, "product"),
        (1, 784, 784, 64, 64, torch.bfloat16, True, "fused_True"),
        (32, 49, 49, 64, 64, torch.bfloat16, False, "product"),
        (32, 196, 49, 64, 64, torch.bfloat16, False, "fused_True"),
        (1, 49, 49, 64, 64, torch.float32, False, "fused_True"),
    ],
)
@pytest.mark.slow
def test_form_on_cuda_follows_crossover(
    measured_card: list[str],
    batch: int,
    n: int,
    m: int,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    learns: bool,
    form: str,
) -> None:
    """The form on CUDA follows the measured crossover."""
    inputs = [t.detach().to(dtype) for t in widths(width, value_width)(batch, n, m, True)]
    with torch.set_grad_enabled(learns):
        got = cuda_attention.attend(*inputs, 0.5)
    assert measured_card == [form]
    expected = naive_attend(*(t.double() for t in inputs), 0.5)
    assert (got.double() - expected).norm() <= 2e-2 * expected.norm()


def test_form_on_cuda_holds_no_large_matrix(measured_card: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit flash runs where it can, and the product image by image where it cannot."""
    inputs = [t.detach().bfloat16() for t in widths(64, 64)(2, 30, 30, True)]
    monkeypatch.setattr(cuda_attention, "LARGEST_MATRIX", 2 * 30 * 30)
    cuda_attention.attend(*inputs, 1.0)
    monkeypatch.setattr(cuda_attention, "LARGEST_MATRIX", 2 * 30 * 30 - 1)
    cuda_attention.attend(*inputs, 1.0)
    wide = [t.detach().bfloat16() for t in widths(264, 64)(2, 30, 30, True)]
    cuda_attention.attend(*wide, 1.0)
    assert measured_card == ["product", "fused_True", "product", "product"]


@pytest.mark.parametrize(("batch", "images"), [(5, 2), (1, 4)])
def test_slices_equal_the_product(monkeypatch: pytest.MonkeyPatch, batch: int, images: int) -> None:
    """Slices of the product give its outputs and the gradients of all three inputs."""
    monkeypatch.setattr(cuda_attention, "LARGEST_MATRIX", images * 9 * 7)
    inputs = widths(6, 4)(batch, 9, 7, True)
    towards = torch.randn(batch, 9, 4, dtype=inputs[0].dtype)
    ours = cuda_attention._Slices.apply(*inputs, 0.5)
    whole = cuda_attention.product(*inputs, 0.5)
    assert (ours - whole).abs().max() <= 1e-12
    pairs = zip(*(torch.autograd.grad(y, inputs, towards) for y in (ours, whole)), strict=True)
    assert all((one - other).abs().max() <= 1e-12 for one, other in pairs)


def test_slices_of_mixed_types_get_gradients(measured_card: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of float32 features and half-precision values get gradients outside of autocast."""
    monkeypatch.setattr(cuda_attention, "LARGEST_MATRIX", 30 * 30)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    monkeypatch.setattr(cuda_attention, "_choice_for", lambda query, value: cuda_attention.Choice(0, 10**9, True))
    query, key, value = (t.detach().float().requires_grad_() for t in widths(264, 64)(2, 30, 30, True))
    mixed = cuda_attention.attend(query, key, value.bfloat16(), 1.0)
    assert mixed.dtype is torch.bfloat16
    mixed.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (query, key, value))


def test_attend_avoids_overflow_in_float16(measured_card: list[str]) -> None:
    """Scores that overflow float16 in the product are finite in attention."""
    large = torch.full((1, 20, 64), 60.0, dtype=torch.float16)
    assert cuda_attention.product(large, large, large, 1.0).isnan().any()
    assert cuda_attention.attend(large, large, large, 1.0).isfinite().all()


@pytest.mark.parametrize(
    ("batch", "positions", "small"), [(1, 3136, True), (8, 784, True), (8, 3136, False), (64, 49, False)]
)
def test_few_queries_count_as_small(batch: int, positions: int, small: bool) -> None:
    """Few queries count as small, as a batch of one does."""
    assert cuda_attention._is_small(torch.empty(batch, positions, 8)) is small


@pytest.mark.slow
def test_form_is_fixed_when_compiled(measured_card: list[str]) -> None:
    """Where torch compiles, the form is fixed, and is the fused one for unknown sizes."""
    small, large = ([t.detach() for t in widths(64, 64)(1, n, n, True)] for n in (20, 1000))
    small, large = [t.bfloat16() for t in small], [t.bfloat16() for t in large]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return cuda_attention.attend(query, key, value, 1.0)

    def operators(dynamic: bool, inputs: list[Tensor]) -> str:
        graphs: list[str] = []

        def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            graphs.append(module.code)
            return module.forward

        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend=backend, dynamic=dynamic)
        with torch.no_grad():
            assert torch.equal(compiled(*inputs), run(*inputs)) or dynamic
        assert len(graphs) == 1
        return graphs[0]

    assert "scaled_dot_product_attention" not in operators(False, small)
    assert "scaled_dot_product_attention" in operators(False, large)
    if sizes.DYNAMO_ASKS:
        assert "scaled_dot_product_attention" in operators(True, small)


def test_cuda_attention_scripts_as_fused() -> None:
    """Scripted attention takes the fused form."""
    scripted = torch.jit.script(cuda_attention.attend)
    inputs = widths(4, 6)(2, 9, 7, False)
    assert (scripted(*inputs, 0.5) - naive_attend(*inputs, 0.5)).abs().max() <= 1e-12


def test_rules_of_nearest_card_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card without rules takes those of the nearest capability."""
    cards = {"old": ((7, 0), RULES[:1]), "new": ((9, 0), RULES[1:2])}
    monkeypatch.setattr(cuda_attention, "CARDS", cards)
    assert cuda_attention._rules("old", (7, 0)) == RULES[:1]
    assert cuda_attention._rules("unheard-of", (8, 9)) == RULES[1:2]
    assert cuda_attention._rules("unheard-of", (7, 5)) == RULES[:1]
    monkeypatch.setattr(cuda_attention, "CARDS", {})
    assert cuda_attention._rules("old", (7, 0)) == ()


def test_shipped_crossover_is_well_formed() -> None:
    """The table of crossovers that ships has valid entries."""
    for card, (capability, rules) in crossover.CARDS.items():
        assert re.fullmatch("[a-z0-9-]+", card)
        assert len(capability) == 2
        for precision, direction, batch, width, value_width, above, up_to, in_heads in rules:
            assert precision in ("half", "full")
            assert direction in ("forward", "both")
            assert min(batch, width, value_width) >= 1
            assert 0 <= above <= up_to <= cuda_attention.LARGEST_MATRIX
            assert isinstance(in_heads, bool)


@pytest.mark.parametrize("paper", [False, True])
def test_fused_channel_attention_is_formula(paper: bool) -> None:
    """Attention over channels in the fused kernel is the formula, with its gradient."""
    x = torch.randn(2, 24, 49, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    energy = torch.bmm(x, x.transpose(1, 2))
    expected = torch.bmm(torch.softmax(energy if paper else energy.amax(2, keepdim=True) - energy, dim=-1), x)
    got = cuda_attention.over_channels(x, paper)
    assert (got - expected).abs().max() <= 1e-10
    towards = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, x, towards)[0] for y in (got, expected))
    assert (ours - theirs).abs().max() <= 1e-8
    assert (functional.attend_channels(x, paper) - expected).abs().max() <= 1e-10


@pytest.mark.parametrize(
    ("dtype", "positions", "device", "fused"),
    [
        (torch.bfloat16, 256, "cuda", True),
        (torch.float16, 49, "cuda", True),
        (torch.bfloat16, 257, "cuda", False),
        (torch.float32, 49, "cuda", False),
        (torch.bfloat16, 49, "cpu", False),
    ],
)
def test_channel_attention_fuses_if_possible(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, positions: int, device: str, fused: bool
) -> None:
    """Attention over channels is fused where the kernel can do it."""

    class Map:
        """A tensor on a card, which this machine need not have."""

        def __init__(self) -> None:
            self.dtype, self.shape, self.device = dtype, (2, 8, positions), torch.device(device)

    monkeypatch.setattr(cuda_attention, "over_channels", lambda x, paper: "fused")
    monkeypatch.setattr(functional, "channel_weights", lambda x, paper: torch.zeros(1))
    monkeypatch.setattr(torch, "bmm", lambda weights, x: "by matrix")
    assert functional.attend_channels(Map()) == ("fused" if fused else "by matrix")  # type: ignore[arg-type]
