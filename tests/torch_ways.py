"""What torch can do around a call: modes, tracing, transforms, tensors of other kinds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., torch.Tensor]


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    """Keeps itself on results."""


class _Handling(torch.Tensor):
    """Has a say of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("attention", "level_attention"):
            return "handled", None
        if name == "scaled_dot_product_attention":
            return "handled"
        return super().__torch_function__(func, types, args, kwargs)


def dispatch_mode(f: Function, tensors: Tensors) -> Any:
    with _Names() as mode:
        out = f(*tensors)
    return out, [name for name in mode.seen if name.startswith("flashx")]


def _function_mode(f: Function, tensors: Tensors) -> Any:
    with _Functions() as mode:
        out = f(*tensors)
    return out, "attention" in mode.seen or "scaled_dot_product_attention" in mode.seen


def fake(f: Function, tensors: Tensors) -> Any:
    with FakeTensorMode() as mode:
        out = f(*(mode.from_tensor(tensor) for tensor in tensors))
    return type(out).__name__, out.shape, out.stride()


def fake_from_real(f: Function, tensors: Tensors) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = f(*tensors)
    return type(out).__name__, out.shape, out.stride()


def traced(f: Function, tensors: Tensors) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.trace(f, tensors, check_trace=False).graph  # type: ignore[no-untyped-call]
    return sorted(node.kind() for node in graph.nodes() if "attention" in node.kind())


def fx(mode: str) -> Callable[[Function, Tensors], Any]:
    def way(f: Function, tensors: Tensors) -> Any:
        graph = make_fx(lambda given: f(*given), tracing_mode=mode)(list(tensors)).graph  # type: ignore[no-untyped-call]
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]

    return way


def _symbolic(f: Function, tensors: Tensors) -> Any:
    graph = torch.fx.symbolic_trace(lambda query: f(query, *tensors[1:])).graph
    return [str(node.target) for node in graph.nodes]


def _dual(index: int) -> Callable[[Function, Tensors], Any]:
    def way(f: Function, tensors: Tensors) -> Any:
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(tensor, torch.ones_like(tensor)) if i == index else tensor
                for i, tensor in enumerate(tensors)
            ]
            return forward_ad.unpack_dual(f(*duals)).tangent

    return way


def _jvp(f: Function, tensors: Tensors) -> Any:
    return torch.func.jvp(lambda query: f(query, *tensors[1:]), tensors[:1], tensors[:1])[1]


def _func_grad(f: Function, tensors: Tensors) -> Any:
    return torch.func.grad(lambda query: f(query, *tensors[1:]).sum())(tensors[0])


def _vmap(which: int) -> Callable[[Function, Tensors], Any]:
    def way(f: Function, tensors: Tensors) -> Any:
        dims = tuple(0 if which in (i, -1) else None for i in range(len(tensors)))
        stacked = [t if dim is None else torch.stack([t, t]) for t, dim in zip(tensors, dims, strict=True)]
        return torch.func.vmap(f, in_dims=dims)(*stacked)

    return way


def _within(context: Callable[[], Any]) -> Callable[[Function, Tensors], Any]:
    def way(f: Function, tensors: Tensors) -> Any:
        with context():
            return f(*tensors)

    return way


def profiled(f: Function, tensors: Tensors) -> Any:
    with torch.autograd.profiler.profile() as profile:
        out = f(*tensors)
    return out, sorted({event.name for event in profile.function_events if event.name.startswith("flashx")})


def _one(index: int, change: Callable[[torch.Tensor], Any]) -> Callable[[Function, Tensors], Any]:
    def way(f: Function, tensors: Tensors) -> Any:
        return f(*(change(tensor) if i == index else tensor for i, tensor in enumerate(tensors)))

    return way


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its neg bit set, in memory that holds -tensor, with the same strides."""
    stored = torch.complex(torch.zeros(tensor.shape), -tensor)
    negated = stored.conj().imag
    assert negated.is_neg()
    return negated


def _zero(tensor: torch.Tensor) -> torch.Tensor:
    return torch._efficientzerotensor(tensor.shape)


def _jagged(f: Function, tensors: Tensors) -> Any:
    query, *_, key, value = ([t[0].transpose(0, 1), t[1, :, :2].transpose(0, 1)] for t in tensors)
    parts = [torch.nested.nested_tensor(part, layout=torch.jagged).transpose(1, 2) for part in (query, key, value)]
    return f(*parts).values()


def _functional(f: Function, tensors: Tensors) -> Any:
    torch._enable_functionalization(reapply_views=True)  # type: ignore[attr-defined]
    try:
        out = f(*map(torch._to_functional_tensor, tensors))  # type: ignore[attr-defined]
        torch._sync(out)  # type: ignore[attr-defined]
        return torch._from_functional_tensor(out)  # type: ignore[attr-defined]
    finally:
        torch._disable_functionalization()  # type: ignore[attr-defined]


WAYS: dict[str, Callable[[Function, Tensors], Any]] = {
    "dispatch mode": dispatch_mode,
    "function mode": _function_mode,
    "fake tensors": fake,
    "real tensors in a fake mode": fake_from_real,
    "jit.trace": traced,
    "make_fx": fx("real"),
    "make_fx, fake": fx("fake"),
    "make_fx, symbolic": fx("symbolic"),
    "symbolic_trace": _symbolic,
    "dual query": _dual(0),
    "dual value": _dual(2),
    "jvp": _jvp,
    "func.grad": _func_grad,
    "vmap": _vmap(-1),
    "vmap of value": _vmap(2),
    "functionalize": lambda f, tensors: torch.func.functionalize(lambda *given: f(*given))(*tensors),
    "functional tensors": _functional,
    "autocast": _within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "sdpa_kernel math": _within(lambda: sdpa_kernel(SDPBackend.MATH)),
    "sdpa_kernel flash": _within(lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    "profiler": profiled,
    "jagged": _jagged,
}
for _index in range(3):
    WAYS |= {
        f"parameter {_index}": _one(_index, torch.nn.Parameter),
        f"subclass {_index}": _one(_index, lambda t: t.as_subclass(_Subclass)),
        f"handling {_index}": _one(_index, lambda t: t.as_subclass(_Handling)),
        f"sparse {_index}": _one(_index, torch.Tensor.to_sparse),
        f"csr {_index}": _one(_index, lambda t: t[0, 0].to_sparse_csr()),
        f"nested {_index}": _one(_index, lambda t: torch.nested.nested_tensor(list(t))),
        f"mkldnn {_index}": _one(_index, torch.Tensor.to_mkldnn),
        f"meta {_index}": _one(_index, lambda t: t.to("meta")),
        f"complex {_index}": _one(_index, lambda t: t.to(torch.complex64)),
        f"zero {_index}": _one(_index, _zero),
        f"functional {_index}": _one(_index, lambda t: torch._to_functional_tensor(t)),  # type: ignore[attr-defined]
    }


def comparable(result: Any) -> Any:
    """A result with its tensors as what must not differ."""
    if isinstance(result, (tuple, list)):
        return [comparable(part) for part in result]
    if not isinstance(result, torch.Tensor):
        return result
    if torch._is_functional_tensor(result):  # type: ignore[attr-defined]
        return ["functional", comparable(torch._from_functional_tensor(result))]  # type: ignore[attr-defined]
    about = [type(result).__name__, result.shape, result.dtype, result.device.type, result.requires_grad]
    return about if result.is_meta else [*about, result.stride(), result.detach().as_subclass(torch.Tensor).tolist()]
