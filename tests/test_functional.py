"""The drop-in against torch's own function: the same results, shapes, strides, gradients and errors."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashx.nn import functional
from flashx.nn.functional import FlashxFallbackWarning, scaled_dot_product_attention

torch_attention = torch._C._nn.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def no_reason_given_yet() -> Iterator[None]:
    functional._warned.clear()
    torch.manual_seed(0)
    yield


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drop-in must not use torch's function."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the call went to torch")

    monkeypatch.setattr(functional, "_torch_attention", refuse)


@dataclass(frozen=True)
class Call:
    """Arguments by shape, for the drop-in and for torch."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    mask_dtype: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)
    # (batch, length, heads, dim) in memory
    transposed: bool = False

    def __str__(self) -> str:
        shapes = [self.query, self.key, self.value, *([] if self.mask is None else [self.mask])]
        words = ["x".join(map(str, shape)) for shape in shapes]
        words += [] if self.mask_dtype is None else [str(self.mask_dtype).removeprefix("torch.")]
        words += [f"{name}={value}" for name, value in self.options.items()]
        return "-".join(words + ["transposed"] * self.transposed)

    def tensors(self, dtype: torch.dtype) -> list[torch.Tensor]:
        def leaf(shape: tuple[int, ...]) -> torch.Tensor:
            if self.transposed:
                return torch.randn(*shape[:-3], shape[-2], shape[-3], shape[-1]).to(dtype).transpose(-3, -2)
            return torch.randn(shape).to(dtype)

        tensors = [leaf(shape) for shape in (self.query, self.key, self.value)]
        if self.mask is not None:
            mask = torch.randn(self.mask)
            tensors.append(mask > -0.5 if self.mask_dtype == torch.bool else mask.to(self.mask_dtype or dtype))
        return tensors


def run(
    attention: Callable[..., torch.Tensor], tensors: list[torch.Tensor], options: dict[str, Any]
) -> list[torch.Tensor]:
    """The output and the gradient of every floating tensor."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    torch.manual_seed(1)
    out = attention(*leaves, **options)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, above, materialize_grads=True)]


CALLS = [
    # 2-D to 5-D, E != Ev, L != S
    Call((5, 8), (6, 8), (6, 3)),
    Call((2, 5, 7), (2, 6, 7), (2, 6, 3)),
    Call((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)),
    Call((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 3), transposed=True),
    Call((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), transposed=True),
    Call((3, 2, 4, 5, 8), (3, 2, 4, 6, 8), (3, 2, 4, 6, 3)),
    Call((2, 3, 2, 4, 5, 8), (2, 3, 2, 4, 6, 8), (2, 3, 2, 4, 6, 8), transposed=True),
    # broadcast batch dimensions and heads
    Call((2, 1, 5, 8), (1, 4, 6, 8), (2, 4, 6, 8)),
    Call((2, 4, 5, 8), (2, 1, 6, 8), (2, 1, 6, 8)),
    Call((2, 4, 5, 8), (2, 4, 6, 8), (2, 1, 6, 8), transposed=True),
    Call((2, 4, 5, 8), (6, 8), (4, 6, 3)),
    Call((5, 8), (2, 4, 6, 8), (6, 3)),
    Call((2, 4, 5, 8), (2, 4, 6, 8), (3, 2, 4, 6, 8)),
    Call((1, 1, 5, 8), (1, 1, 6, 8), (3, 4, 6, 8), (5, 6)),
    Call((3, 1, 4, 5, 8), (1, 2, 1, 6, 8), (1, 1, 4, 6, 8)),
    # zero sizes
    Call((2, 4, 0, 8), (2, 4, 6, 8), (2, 4, 6, 8)),
    Call((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
    Call((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 0)),
    Call((0, 4, 5, 8), (0, 4, 6, 8), (0, 4, 6, 8)),
    Call((1, 4, 5, 8), (0, 1, 6, 8), (1, 4, 6, 8)),
    Call((2, 0, 5, 8), (2, 0, 6, 8), (2, 0, 6, 8)),
    Call((0, 3, 2, 5, 8), (0, 3, 2, 6, 8), (0, 3, 2, 6, 8)),
    # causal is aligned top-left
    Call((2, 4, 5, 8), (2, 4, 9, 8), (2, 4, 9, 8), options={"is_causal": True}),
    Call((2, 9, 8), (2, 5, 8), (2, 5, 3), options={"is_causal": True}),
    Call((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 8), options={"is_causal": True}),
    # scale
    Call((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), options={"scale": 0.7}),
    Call((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), options={"scale": -2}),
    Call((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), options={"scale": 0.0, "dropout_p": 0}),
    # grouped-query attention
    Call((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), options={"enable_gqa": True}, transposed=True),
    Call((2, 6, 5, 8), (2, 2, 7, 8), (2, 1, 7, 3), options={"enable_gqa": True}),
    Call((2, 6, 5, 8), (2, 1, 7, 8), (2, 3, 7, 8), (6, 5, 7), options={"enable_gqa": True}),
    Call((6, 5, 8), (2, 7, 8), (2, 7, 8), options={"enable_gqa": True, "is_causal": True}),
    Call((2, 6, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), options={"enable_gqa": True}),
    Call((3, 2, 6, 5, 8), (3, 2, 2, 7, 8), (3, 1, 2, 7, 8), options={"enable_gqa": True}),
    Call((2, 6, 5, 8), (2, 6, 7, 8), (2, 6, 7, 8), options={"enable_gqa": True}),
    # masks
    *(
        Call((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), shape, dtype, transposed=True)
        for shape in [(5, 6), (1, 6), (5, 1), (1, 1), (4, 5, 6), (2, 1, 5, 6), (2, 4, 1, 6), (2, 4, 5, 6), (1, 1, 5, 1)]
        for dtype in (None, torch.bool)
    ),
    Call((2, 5, 8), (2, 6, 8), (2, 6, 3), (2, 5, 6)),
    Call((5, 8), (6, 8), (6, 3), (5, 6), torch.bool),
    Call((5, 8), (2, 4, 6, 8), (6, 3), (2, 1, 5, 6)),
    Call((3, 2, 4, 5, 8), (3, 2, 4, 6, 8), (3, 2, 4, 6, 8), (4, 5, 6)),
    Call((3, 2, 4, 5, 8), (3, 2, 4, 6, 8), (3, 2, 4, 6, 8), (1, 1, 1, 5, 6), torch.bool),
    Call((3, 2, 4, 5, 8), (3, 2, 4, 6, 8), (3, 2, 4, 6, 8), (3, 2, 4, 5, 6)),
    Call((3, 2, 4, 5, 8), (3, 1, 4, 6, 8), (3, 2, 4, 6, 8), (3, 2, 1, 1, 6), torch.bool),
    Call((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8), (5, 0)),
    Call((2, 4, 0, 8), (2, 4, 6, 8), (2, 4, 6, 8), (0, 6), torch.bool),
    Call((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), (5, 6), torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_shape_is_torchs_and_runs_on_flashx(call: Call, without_torch: None) -> None:
    tensors = call.tensors(torch.float64)
    expected = run(torch_attention, tensors, call.options)
    actual = run(scaled_dot_product_attention, tensors, call.options)
    for ours, torchs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, torchs)
    assert actual[0].stride() == expected[0].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS[::7], ids=str)
def test_other_dtypes_are_as_close_to_float64_as_torchs(call: Call, dtype: torch.dtype, without_torch: None) -> None:
    tensors = call.tensors(dtype)
    exact = run(torch_attention, [t.double() if t.is_floating_point() else t for t in tensors], call.options)
    assert_as_close(
        run(scaled_dot_product_attention, tensors, call.options), run(torch_attention, tensors, call.options), exact
    )


def assert_as_close(actual: list[torch.Tensor], expected: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """tests/tolerance.py's rule, with torch in the place of naive attention and an ulp more for each of the two."""
    for ours, torchs, oracle in zip(actual, expected, exact, strict=True):
        assert ours.dtype == torchs.dtype and ours.shape == torchs.shape
        if oracle.numel() == 0:
            continue
        ulp = torch.finfo(ours.dtype).eps * oracle.abs().max()
        error, torch_error = ((t.double() - oracle).abs().max() for t in (ours, torchs))
        assert error <= 2 * torch_error + 3 * ulp


def op_info() -> Any:
    invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    return next(op for op in invocations.op_db if op.name == "nn.functional.scaled_dot_product_attention")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torchs_own_samples(dtype: torch.dtype, without_torch: None) -> None:
    """torch's OpInfo of the operator: 25 samples, forward and backward.

    float64 and float32 compare with torch's defaults. Samples are drawn from [-9, 9], so logits reach hundreds, and
    below float64 any two exact algorithms then differ by more than that: query and key are divided by 9 there.
    """
    samples = list(op_info().sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) > 20
    for sample in samples:
        options = dict(sample.kwargs)
        names = [name for name, option in options.items() if isinstance(option, torch.Tensor)]
        tensors = [sample.input, *sample.args, *(options.pop(name) for name in names)]
        if dtype != torch.float64:
            tensors[:2] = [tensor / 9 for tensor in tensors[:2]]
        if options.get("dropout_p", 0) > 0:
            out = scaled_dot_product_attention(*tensors, **options)
            assert out.shape == torch_attention(*tensors, **options).shape and out.isfinite().all()
            continue
        expected, actual = (run(f, tensors, options) for f in (torch_attention, scaled_dot_product_attention))
        assert actual[0].stride() == expected[0].stride()
        if dtype in (torch.float64, torch.float32):
            torch.testing.assert_close(actual, expected)
        else:
            exact = run(torch_attention, [t.double() if t.is_floating_point() else t for t in tensors], options)
            assert_as_close(actual, expected, exact)


Q = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(3))
MASK = torch.zeros(5, 5)

ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "one dimension": ((Q[0, 0, 0],) * 3, {}),
    "head dims differ": ((Q, Q[..., :7], Q), {}),
    "batch sizes differ": ((Q, torch.cat([Q, Q[:1]]), Q), {}),
    "heads differ": ((Q, Q[:, :2], Q[:, :2]), {}),
    "gqa, not a divisor": ((Q, Q[:, :3], Q[:, :3]), {"enable_gqa": True}),
    "gqa, more key heads": ((Q[:, :2], Q, Q), {"enable_gqa": True}),
    "gqa, two dimensions": ((Q[0, 0],) * 3, {"enable_gqa": True}),
    "lengths differ": ((Q[0], Q[0], Q[0, :, :4]), {}),
    "dtypes differ": ((Q, Q.double(), Q), {}),
    "devices differ": ((Q, Q.to("meta"), Q), {}),
    "int": ((Q.int(),) * 3, {}),
    "bool": ((Q > 0,) * 3, {}),
    "complex": ((Q.to(torch.complex64),) * 3, {}),
    "float8": ((Q.to(torch.float8_e4m3fn),) * 3, {}),
    "sparse": ((Q.to_sparse(), Q, Q), {}),
    "no tensor": ((Q.tolist(), Q, Q), {}),
    "None": ((Q, None, Q), {}),
    "mask of float64": ((Q, Q, Q, MASK.double()), {}),
    "mask of float16": ((Q, Q, Q, MASK.half()), {}),
    "mask of int": ((Q, Q, Q, MASK.long()), {}),
    "mask, no tensor": ((Q, Q, Q, MASK.tolist()), {}),
    "mask, wrong length": ((Q, Q, Q, torch.zeros(5, 6)), {}),
    "mask, zero length": ((Q, Q, Q, torch.zeros(5, 0)), {}),
    "mask, wrong heads": ((Q, Q, Q, torch.zeros(2, 5, 5)), {}),
    "mask, too many dimensions": ((Q, Q, Q, torch.zeros(1, 2, 4, 5, 5)), {}),
    "mask, more dimensions than scores": ((Q[0], Q[0], Q, torch.zeros(1, 4, 5, 5)), {}),
    "mask, one dimension": ((Q, Q, Q, torch.zeros(5)), {}),
    "mask, value's batch": ((Q[:1], Q[:1], Q, torch.zeros(2, 1, 5, 5)), {}),
    "mask and causal": ((Q[0], Q[0], Q[0], MASK), {"is_causal": True}),
    "dropout_p negative": ((Q, Q, Q), {"dropout_p": -0.1}),
    "dropout_p above one": ((Q, Q, Q), {"dropout_p": 1.5}),
    "dropout_p NaN": ((Q, Q, Q), {"dropout_p": math.nan}),
    "dropout_p None": ((Q, Q, Q, None, None), {}),
    "is_causal int": ((Q, Q, Q, None, 0.0, 1), {}),
    "enable_gqa int": ((Q, Q, Q), {"enable_gqa": 1}),
    "scale string": ((Q, Q, Q), {"scale": "1"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_torchs_errors_reach_the_caller(name: str) -> None:
    args, options = ERRORS[name]
    with pytest.raises(Exception) as expected:
        torch_attention(*args, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(expected.value)) as actual:
            scaled_dot_product_attention(*args, **options)
    assert str(actual.value) == str(expected.value)


def test_only_the_mask_dropout_and_causal_are_positional_options() -> None:
    scaled_dot_product_attention(Q, Q, Q, None, 0.0, True)
    with pytest.raises(TypeError, match="positional"):
        scaled_dot_product_attention(Q, Q, Q, None, 0.0, True, 1.0)  # type: ignore[misc]


WIDE = torch.randn(1, 2, 3, 300, generator=torch.Generator().manual_seed(4))
NESTED = torch.nested.nested_tensor([torch.ones(4, 3, 8), torch.ones(4, 5, 8)])
JAGGED = torch.nested.nested_tensor([torch.ones(3, 4, 8), torch.ones(5, 4, 8)], layout=torch.jagged).transpose(1, 2)


class Dispatching(torch.Tensor):
    """A subclass with a kernel of its own, like DTensor."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Dispatching:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


class Handling(torch.Tensor):
    """A subclass with a say of its own, like MaskedTensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs)


FALLBACKS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "head dimensions 300 and 300": ((WIDE,) * 3, {}),
    "head dimensions 0 and 8": ((Q[..., :0], Q[..., :0], Q), {}),
    "nested": ((NESTED,) * 3, {}),
    "jagged in their length": ((JAGGED.transpose(1, 2),) * 3, {}),
    "Handling handles torch functions by itself": ((Q.as_subclass(Handling),) * 3, {}),
    "Dispatching dispatches by itself": ((Dispatching(Q),) * 3, {}),
    "tensors are on meta": ((Q.to("meta"),) * 3, {}),
    "attn_mask and is_causal are both given": ((Q, Q, Q, MASK), {"is_causal": True}),
    "attn_mask has fewer than two dimensions": ((Q[0], Q[0], Q[0], MASK[0]), {}),
    "attn_mask broadcasts over some": ((Q.expand(3, 2, 4, 5, 8),) * 3 + (torch.randn(3, 1, 4, 5, 5),), {}),
    "different numbers of heads": (
        (torch.ones(1, 12, 3, 8), torch.ones(1, 4, 3, 8), torch.ones(1, 6, 3, 8)), {"enable_gqa": True}
    ),
    "different lengths": ((Q, Q[:, :, :4], Q), {}),
    "scale is not finite": ((Q, Q, Q), {"scale": math.inf}),
    "scale is a Tensor": ((Q, Q, Q), {"scale": torch.tensor(0.5)}),
    "dropout_p is a Tensor": ((Q, Q, Q), {"dropout_p": torch.tensor(0.5)}),
}  # fmt: skip


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_no_kernel_covers_goes_to_torch_with_one_warning(reason: str) -> None:
    args, options = FALLBACKS[reason]
    torch.manual_seed(1)
    expected = torch_attention(*args, **options)
    torch.manual_seed(1)
    with pytest.warns(FlashxFallbackWarning, match=reason) as caught:
        actual = scaled_dot_product_attention(*args, **options)
    assert [warning.filename for warning in caught] == [__file__]
    assert type(actual) is type(expected) and actual.device == expected.device
    if expected.is_nested:
        actual, expected = actual.values(), expected.values()
    if not expected.is_meta:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled_dot_product_attention(*args, **options)


def test_each_reason_warns_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for tensor in (WIDE, WIDE, WIDE[..., :280], WIDE):
            scaled_dot_product_attention(tensor, tensor, tensor)
    assert len(caught) == 2


def test_sdpa_kernel_is_honoured() -> None:
    """A user who names torch's kernels gets them; both of the CPU's kernels together are no restriction."""
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        functional._warned.clear()
        with sdpa_kernel(backend), pytest.warns(FlashxFallbackWarning, match="sdpa_kernel"):
            actual = scaled_dot_product_attention(Q, Q, Q)
        with sdpa_kernel(backend):
            torch.testing.assert_close(actual, torch_attention(Q, Q, Q), rtol=0, atol=0)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), pytest.raises(RuntimeError, match="No viable backend"):
        scaled_dot_product_attention(Q, Q, Q)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled_dot_product_attention(Q, Q, Q)


def test_rows_that_see_no_key_are_zero_and_have_no_gradient(without_torch: None) -> None:
    hidden = torch.ones(5, 5, dtype=torch.bool)
    hidden[2] = False
    for mask in (hidden, torch.zeros(5, 5).masked_fill(~hidden, -torch.inf)):
        out, grad_query, *_ = run(scaled_dot_product_attention, [Q, Q, Q, mask], {})
        assert (out[:, :, 2] == 0).all() and (grad_query[:, :, 2] == 0).all()
        assert out[:, :, 1].any() and out.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_keys_change_nothing(bad: float, without_torch: None) -> None:
    spoiled = Q.clone()
    spoiled[:, :, 4] = bad
    mask = torch.ones(5, dtype=torch.bool)
    mask[4] = False
    expected = run(scaled_dot_product_attention, [Q, Q, Q, mask[None]], {})
    actual = run(scaled_dot_product_attention, [Q, spoiled, spoiled, mask[None]], {})
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    causal = scaled_dot_product_attention(Q, spoiled, spoiled, is_causal=True)
    clean = scaled_dot_product_attention(Q, Q, Q, is_causal=True)
    torch.testing.assert_close(causal[:, :, :4], clean[:, :, :4], rtol=0, atol=0)
    assert causal[:, :, 4].isnan().any()


@pytest.mark.parametrize("where", ["query", "key", "value", "mask"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_visible_nan_and_inf_spread_as_in_torch(where: str, bad: float) -> None:
    tensors = {"query": Q.clone(), "key": Q.clone(), "value": Q.clone(), "mask": MASK.clone()}
    tensors[where][..., 1, 3] = bad
    expected, actual = (
        f(*tensors.values()).nan_to_num(1e3, 2e3, 3e3) for f in (torch_attention, scaled_dot_product_attention)
    )
    torch.testing.assert_close(actual, expected)


class Arguments(TorchDispatchMode):
    """Keeps what flashx's operator is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.flashx.attention.default:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (2, 1, 1, 5), (2, 4, 5, 5), (4, 5, 5), (5, 5)])
@pytest.mark.parametrize("rank", [4, 5])
def test_masks_are_never_expanded(shape: tuple[int, ...], rank: int) -> None:
    """The operator gets the mask's own memory, whether the caller expanded it or it broadcasts."""
    query = Q if rank == 4 else Q.expand(3, 2, 4, 5, 8)
    small = torch.randn(shape)
    for mask in (small, small.expand(2, 4, 5, 5)):
        if rank == 5 and mask.shape[:-3].numel() > 1:
            mask = mask.expand(1, *mask.shape)[:, :1]
        with Arguments() as arguments:
            scaled_dot_product_attention(query, query, query, mask)
        (call,) = arguments.calls
        assert call[3].untyped_storage().data_ptr() == small.untyped_storage().data_ptr()


def test_no_copies_of_query_key_and_value() -> None:
    """Head-major, token-major and packed inputs of three and four dimensions reach the operator as they are."""
    packed = torch.randn(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
    for tensors in ([Q, Q, Q], [Q[0], Q[0], Q[0]], list(packed), [Q, Q[:, :1], Q[:1]]):
        with Arguments() as arguments:
            scaled_dot_product_attention(*tensors)
        (call,) = arguments.calls
        assert [t.data_ptr() for t in call[:3]] == [t.data_ptr() for t in tensors]


def test_stride_zero_inputs_and_their_gradients(without_torch: None) -> None:
    def through_expand(attention: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        query, key = (Q[:, :1].double().detach().requires_grad_() for _ in range(2))
        out = attention(query.expand(2, 4, 5, 8), key.expand(2, 4, 5, 8), key.expand(2, 4, 5, 8), is_causal=True)
        return [out, *torch.autograd.grad(out.sin().sum(), [query, key])]

    torch.testing.assert_close(through_expand(scaled_dot_product_attention), through_expand(torch_attention))


def test_last_dimension_of_any_stride(without_torch: None) -> None:
    tensors = [Q.double().mT.contiguous().mT, Q.double().repeat_interleave(2, -1)[..., ::2], Q.double()]
    torch.testing.assert_close(run(scaled_dot_product_attention, tensors, {}), run(torch_attention, tensors, {}))


def test_dropout_follows_torchs_generator(without_torch: None) -> None:
    options = {"dropout_p": 0.5, "is_causal": True}
    torch.manual_seed(5)
    first, second = (scaled_dot_product_attention(Q, Q, Q, **options) for _ in range(2))
    torch.manual_seed(5)
    again = scaled_dot_product_attention(Q, Q, Q, **options)
    assert torch.equal(first, again) and not torch.equal(first, second)
    torch.manual_seed(5)
    with torch.device("meta"):  # a default device is not where the tensors are
        assert torch.equal(first, scaled_dot_product_attention(Q, Q, Q, **options))


@pytest.mark.parametrize("enable_gqa", [False, True])
def test_dropout_keeps_the_mean(enable_gqa: bool, without_torch: None) -> None:
    """4096 weights of 1/4096 each: about 0.7 of them survive, scaled up by 1 / 0.7."""
    query = torch.zeros(1, 4, 64, 8)
    key = torch.zeros(1, 2 if enable_gqa else 4, 4096, 8)
    value = torch.ones_like(key)
    out = scaled_dot_product_attention(query, key, value, dropout_p=0.3, enable_gqa=enable_gqa)
    assert out.std() > 0.005 and abs(out.mean() - 1) < 0.005
    assert (scaled_dot_product_attention(query, key, value, dropout_p=1.0, enable_gqa=enable_gqa) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torch_does(dtype: torch.dtype, without_torch: None) -> None:
    cases = [
        [Q, Q, Q],
        [Q, Q.bfloat16(), Q.half()],
        [Q, Q, Q, MASK],
        [Q, Q, Q, MASK == 0],
        [Q.double(), Q.double(), Q.double()],
    ]
    with torch.autocast("cpu", dtype=dtype):
        for tensors in cases:
            expected, actual = (run(f, tensors, {}) for f in (torch_attention, scaled_dot_product_attention))
            for ours, torchs in zip(actual, expected, strict=True):
                assert ours.dtype == torchs.dtype
                torch.testing.assert_close(ours, torchs, rtol=0.05, atol=0.05)
        with pytest.raises(AssertionError, match="went to torch"):
            scaled_dot_product_attention(Q, Q, Q, MASK.double())


def test_second_derivatives_are_refused() -> None:
    """A loss of first and second derivatives must not quietly lose the second. torch's math kernel has them."""

    def gradient(attention: Callable[..., torch.Tensor]) -> torch.Tensor:
        query = Q[0].double().requires_grad_()
        out = attention(query, query, query, is_causal=True)
        (first,) = torch.autograd.grad(out.sin().sum(), query, create_graph=True)
        return torch.autograd.grad(out.sum() + first.square().sum(), query)[0]

    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient(scaled_dot_product_attention)
    with sdpa_kernel(SDPBackend.MATH), pytest.warns(FlashxFallbackWarning, match="sdpa_kernel"):
        torch.testing.assert_close(gradient(scaled_dot_product_attention), gradient(torch_attention))


def test_function_transforms_and_forward_mode_go_to_torch() -> None:
    q = Q[0]
    with pytest.warns(FlashxFallbackWarning, match=r"torch\.func"):
        torch.testing.assert_close(
            torch.vmap(lambda q: scaled_dot_product_attention(q, q, q))(Q), torch_attention(Q, Q, Q)
        )
    gradient, expected = (
        torch.func.grad(lambda q, f=f: f(q, q, q).sum())(Q) for f in (scaled_dot_product_attention, torch_attention)
    )
    torch.testing.assert_close(gradient, expected)
    tangent, expected = (
        torch.func.jvp(lambda q, f=f: f(q, q, q), (q,), (q,))[1]
        for f in (scaled_dot_product_attention, torch_attention)
    )
    torch.testing.assert_close(tangent, expected)
    with torch.autograd.forward_ad.dual_level(), pytest.warns(FlashxFallbackWarning, match="forward-mode"):
        dual = torch.autograd.forward_ad.make_dual(q, q)
        out = scaled_dot_product_attention(dual, dual, dual)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, expected)


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


def test_plain_subclasses_run_on_flashx_and_stay(without_torch: None) -> None:
    out = scaled_dot_product_attention(Q.as_subclass(Plain), Q, Q)
    assert type(out) is Plain
    torch.testing.assert_close(out.as_subclass(torch.Tensor), torch_attention(Q, Q, Q))
    parameter = torch.nn.Parameter(Q)
    assert type(scaled_dot_product_attention(parameter, parameter, parameter)) is torch.Tensor


class Listening(torch.Tensor):
    """A subclass that notes which function it handled."""

    heard: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.heard.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_with_a_say_get_torchs_builtin() -> None:
    Listening.heard.clear()
    with pytest.warns(FlashxFallbackWarning, match="Listening"):
        out = scaled_dot_product_attention(Q, Q.as_subclass(Listening), Q)
    assert torch_attention in Listening.heard and type(out) is Listening


def test_function_modes_see_the_call_and_flashx_runs(without_torch: None) -> None:
    class Mode(TorchFunctionMode):
        seen: ClassVar[list[Any]] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    with torch.device("cpu"), Mode():
        out = scaled_dot_product_attention(Q, Q, Q, is_causal=True)
    assert Mode.seen[0] is scaled_dot_product_attention
    torch.testing.assert_close(out, torch_attention(Q, Q, Q, is_causal=True))


def test_fake_tensors_have_the_real_ones_shape_and_strides(without_torch: None) -> None:
    for call in CALLS:
        tensors = call.tensors(torch.float32)
        real = scaled_dot_product_attention(*tensors, **call.options)
        with FakeTensorMode() as mode:
            fake = scaled_dot_product_attention(*map(mode.from_tensor, tensors), **call.options)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype), str(call)


def test_neg_and_zero_tensors(without_torch: None) -> None:
    """Lazily negated and absent memory: the dispatcher makes it real before a kernel reads it."""
    negated = torch.conj(torch.complex(Q, Q)).imag
    assert negated.is_neg()
    torch.testing.assert_close(scaled_dot_product_attention(negated, negated, negated), torch_attention(-Q, -Q, -Q))
    zero = torch._efficientzerotensor(2, 4, 5, 8)
    assert (scaled_dot_product_attention(zero, zero, zero) == 0).all()


def causal_bias(variant: str, q_len: int, k_len: int) -> torch.Tensor:
    from torch.nn.attention import bias

    return getattr(bias, variant)(q_len, k_len)


@pytest.mark.parametrize("variant", ["causal_upper_left", "causal_lower_right"])
@pytest.mark.parametrize(("q_len", "k_len"), [(5, 9), (7, 7), (1, 6)])
def test_causal_bias_needs_no_mask(variant: str, q_len: int, k_len: int, without_torch: None) -> None:
    query, key = torch.randn(2, 4, q_len, 8).double(), torch.randn(2, 4, k_len, 8).double()
    mask = causal_bias(variant, q_len, k_len)
    with Arguments() as arguments:
        actual = scaled_dot_product_attention(query, key, key, mask)
    assert arguments.calls[0][3] is None
    expected = torch_attention(query, key, key, mask._materialize())
    torch.testing.assert_close(actual, expected)


def test_causal_bias_errors_are_torchs() -> None:
    for args, options in [
        ((Q, Q, Q, causal_bias("causal_upper_left", 5, 5)), {"is_causal": True}),
        ((Q, Q, Q, causal_bias("causal_lower_right", 4, 5)), {}),
        ((Q, Q[..., :7], Q, causal_bias("causal_lower_right", 5, 5)), {}),
    ]:
        with pytest.raises(Exception) as expected:
            torch_attention(*args, **options)
        with pytest.raises(type(expected.value)) as actual:
            scaled_dot_product_attention(*args, **options)
        assert str(actual.value) == str(expected.value)


def graph_targets(function: Callable[..., torch.Tensor], *args: Any, dynamic: bool = False) -> list[str]:
    """What torch.compile(fullgraph=True) puts into the graph; the compiled result must be the eager one."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    torch.testing.assert_close(compiled(*args), function(*args))
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


LOWER_RIGHT = causal_bias("causal_lower_right", 5, 5)

COMPILED: dict[str, tuple[Callable[..., torch.Tensor], tuple[Any, ...]]] = {
    "four dimensions": (lambda q: scaled_dot_product_attention(q, q, q), (Q,)),
    "mask": (lambda q, m: scaled_dot_product_attention(q, q, q, m), (Q, MASK)),
    "three dimensions": (lambda q: scaled_dot_product_attention(q, q[:, :4], q[:, :4], is_causal=True), (Q[0],)),
    "five dimensions": (lambda q: scaled_dot_product_attention(q, q, q), (Q.expand(3, 2, 4, 5, 8),)),
    "gqa": (lambda q: scaled_dot_product_attention(q, q[:, :2], q[:, :1], enable_gqa=True), (Q,)),
    "scale": (lambda q, s: scaled_dot_product_attention(q, q, q, scale=s), (Q, 0.3)),
    "parameter": (lambda q: scaled_dot_product_attention(q, q, q), (torch.nn.Parameter(Q),)),
    "subclass": (lambda q: scaled_dot_product_attention(q, q, q), (Q.as_subclass(Plain),)),
    "causal bias": (lambda q, m: scaled_dot_product_attention(q, q, q, m), (Q, LOWER_RIGHT)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(name: str, dynamic: bool, without_torch: None) -> None:
    function, args = COMPILED[name]
    assert "flashx.attention" in graph_targets(function, *args, dynamic=dynamic)


def test_fallbacks_compile_too() -> None:
    def under_sdpa_kernel(q: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(q, q, q)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for targets in (
            graph_targets(lambda q: scaled_dot_product_attention(q, q, q), WIDE),
            graph_targets(lambda q: torch.vmap(lambda q: scaled_dot_product_attention(q, q, q))(q), Q),
            graph_targets(under_sdpa_kernel, Q),
        ):
            assert "flashx.attention" not in targets and any("scaled_dot_product" in target for target in targets)


def test_compiled_gradients_and_dynamic_lengths(without_torch: None) -> None:
    """One compilation serves all lengths, forward and backward, with dropout's seed drawn anew in each call."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def attention(q: torch.Tensor, m: torch.Tensor, p: float = 0.0) -> torch.Tensor:
        return scaled_dot_product_attention(q, q, q, m, p)

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for length in (5, 7, 12):
        tensors = [torch.randn(2, 3, length, 8).double(), torch.randn(length, length).double()]
        torch.testing.assert_close(run(compiled, tensors, {}), run(attention, tensors, {}))
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]
    torch.manual_seed(5)
    first, second = (compiled(Q, MASK, 0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, compiled(Q, MASK, 0.5)) and not torch.equal(first, second)


class Block(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_saved_loads_without_flashx() -> None:
    """torch.jit.script, torch.jit.trace and torch.export keep torch's operator."""
    expected = torch_attention(Q, Q, Q, is_causal=True)
    scripted = torch.jit.script(Block())
    with pytest.warns(FlashxFallbackWarning, match=r"torch\.jit\.trace"):
        traced = torch.jit.trace(Block(), (Q, Q, Q))
    for module in (scripted, traced):
        assert "aten::scaled_dot_product_attention" in str(module.graph)
        buffer = io.BytesIO()
        torch.jit.save(module, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(Q, Q, Q), expected)
    with pytest.warns(FlashxFallbackWarning, match=r"torch\.export"):
        programs = [torch.export.export(Block(), (Q, Q, Q), strict=strict) for strict in (False, True)]
    for program in programs:
        assert "flashx" not in str(program.graph)
        torch.testing.assert_close(program.module()(Q, Q, Q), expected)


def test_pickles_and_copies_by_name() -> None:
    assert pickle.loads(pickle.dumps(scaled_dot_product_attention)) is scaled_dot_product_attention
    assert copy.deepcopy(scaled_dot_product_attention) is scaled_dot_product_attention
