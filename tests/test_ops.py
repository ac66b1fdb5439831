"""flashx.ops: the operators under torch's own examinations, in autograd, torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tolerance
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from cases import COMBINED, Bias, Case, default_scale

import flashx
from flashx.problem import accumulation_dtype


def _operator_arguments(case: Case, dtype: torch.dtype, backend: str, requires_grad: bool) -> tuple[Any, ...]:
    """torch.ops.flashx.attention's arguments for a case."""
    inputs = case.inputs(dtype)
    tensors = inputs.arguments()
    if case.sinks:
        tensors["sinks"] = tensors["sinks"].to(accumulation_dtype(dtype))
    if requires_grad:
        tensors |= {name: tensors[name].detach().requires_grad_() for name in inputs.differentiable()}
    seed = torch.tensor(tolerance.dropout_seed(case)) if case.dropout_p > 0 else None
    left, right = case.window or (None, None)
    return (
        *tensors.values(), seed, left, 0 if case.causal else right, case.k_len - case.q_len,
        default_scale(case), case.softcap, case.dropout_p, backend,
    )  # fmt: skip


SAMPLES = [
    Case(5, 7, 8),
    Case(17, 9, 8, 3, batch=2, heads=4, kv_heads=2, causal=True, query_storage="blhd", kv_storage="packed"),
    Case(9, 17, 8, heads=2, window=(3, 1), bias=Bias("1hqk"), alibi="h", softcap=2.0, sinks=True, dropout_p=0.2),
    Case(9, 17, 8, batch=2, heads=2, bias=Bias("b11k", "bool"), alibi="bh"),
    Case(9, 17, 3, heads=2, bias=Bias("qk", "add32"), query_storage="bhdl"),
    Case(3, 0, 8),
    Case(0, 3, 8, batch=0),
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_attention(case: Case, backend: str, requires_grad: bool) -> None:
    """Schema, fake against real, autograd registration, AOT dispatch with dynamic shapes."""
    for dtype in (torch.float32, torch.bfloat16):
        arguments = _operator_arguments(case, dtype, backend, requires_grad)
        torch.library.opcheck(torch.ops.flashx.attention, arguments)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_attention_backward(case: Case, backend: str, wanted: bool) -> None:
    inputs = case.inputs(torch.float32)
    arguments = _operator_arguments(case, torch.float32, backend, False)
    out, lse = torch.ops.flashx.attention(*arguments)
    grad_lse = inputs.grad_lse if wanted else None
    bias_grad = wanted and inputs.bias is not None and inputs.bias.is_floating_point()
    flags = bias_grad, wanted and inputs.sinks is not None
    torch.library.opcheck(
        torch.ops.flashx.attention_backward,
        (*arguments, out, lse, inputs.grad_out, grad_lse, *flags),
        test_utils=("test_schema", "test_faketensor"),
    )


def _ragged(requires_grad: bool) -> dict[str, tuple[torch.Tensor, tuple[object, ...]]]:
    """Operators of ragged calls with their arguments, by name."""
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, requires_grad=requires_grad)

    def table(*rows: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32)

    plain = (None, None, None, None, None, 0, 0, 0.3, 0.0, 0.0, "cpu")
    block_map, bits = table((1, 0), (2, 1))[None, None], torch.randint(0, 99, (1, 16, 1), dtype=torch.int32)
    packed = table((0, 9, 0, 12, 3, 0), (9, 11, 12, 8, -3, 0))
    shared = table((0, 3, 0, 7, 9, 0), (0, 3, 0, 7, 9, 0))
    own = table((0, 3, 0, 5, 2, 7), (0, 3, 0, 4, 1, 7))
    order, begins = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    levels = ([draw(1, 1, 7, 4), draw(2, 1, 5, 4)], [draw(1, 1, 7, 4), draw(2, 1, 5, 4)], [shared, own])
    no_tables = (None, None, None, None)
    return {
        "blocks": (
            torch.ops.flashx.attention,
            (draw(2, 2, 20, 4), draw(2, 1, 20, 4), draw(2, 1, 20, 4), *plain, block_map, bits, *no_tables, 2, 16, 16),
        ),
        "packed": (
            torch.ops.flashx.attention,
            (draw(1, 2, 20, 4), draw(1, 1, 20, 4), draw(1, 1, 20, 4), *plain, None, None, packed),
        ),
        "levels": (
            torch.ops.flashx.level_attention,
            (draw(2, 2, 3, 4), *levels, [order], [begins], None, draw(2), None, None, 4, 0, 0, 0, 0, 0.3, 0.0, "cpu"),
        ),
    }


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", list(_ragged(False)))
def test_opcheck_variants(name: str, requires_grad: bool) -> None:
    operator, arguments = _ragged(requires_grad)[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", list(_ragged(False)))
def test_gradcheck_variants(name: str) -> None:
    operator, arguments = _ragged(True)[name]
    wide = [
        [t.detach().double().requires_grad_() for t in a] if isinstance(a, list) and a[0].is_floating_point() else a
        for a in arguments
    ]
    wide = [
        a.detach().double().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in wide
    ]
    leaves = [
        t for a in wide for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor) and t.requires_grad
    ]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left = iter(tensors)
        again = [
            [next(left) if t.requires_grad else t for t in a]
            if isinstance(a, list)
            else next(left)
            if isinstance(a, torch.Tensor) and a.requires_grad
            else a
            for a in wide
        ]
        out, lse = operator(*again)
        return out, lse.masked_fill(lse == -torch.inf, 0)  # no neighbourhood there

    assert torch.autograd.gradcheck(run, leaves)


GRADCHECKS = [
    Case(4, 5, 3, 2, batch=2, heads=2, kv_heads=1, causal=True),
    Case(5, 4, 2, heads=2, bias=Bias("1hqk"), sinks=True, alibi="h", softcap=1.5),
    Case(4, 6, 2, window=(1, 2), bias=Bias("k"), dropout_p=0.4, heads=2),
    Case(3, 5, 2, bias=Bias("qk", "bool_rows"), sinks=True, scale=0.7),
]


@pytest.mark.parametrize("case", GRADCHECKS, ids=str)
def test_gradcheck(case: Case, engine: str) -> None:
    """Against finite differences, through out and lse. Rows that see nothing have an lse without a neighbourhood."""
    inputs = case.inputs(torch.float64)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.differentiable().items()}
    finite = tolerance.oracle(case, torch.float64)["lse"] > -torch.inf

    def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(case.seed)
        arguments = {**inputs.arguments(), **dict(zip(leaves, tensors, strict=True))}
        out, lse = flashx.attention(**arguments, **case.options(), return_lse=True, backend=engine)
        return out, lse[finite]

    assert torch.autograd.gradcheck(attend, tuple(leaves.values()))


def _plain(query: torch.Tensor) -> torch.Tensor:
    return torch.softmax(query @ query.mT / query.shape[-1] ** 0.5, dim=-1) @ query


def _attend(query: torch.Tensor) -> torch.Tensor:
    return flashx.attention(query, query, query)


def _double_backward(function: Callable[[torch.Tensor], torch.Tensor], query: torch.Tensor) -> torch.Tensor:
    query = query.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(query).sum(), query, create_graph=True)
    (query.sum() + grad.square().sum()).backward()
    return query.grad


def _jvp(function: Callable[[torch.Tensor], torch.Tensor], query: torch.Tensor) -> torch.Tensor:
    return torch.func.jvp(function, (query,), (torch.ones_like(query),))[1]


def _forward_ad(function: Callable[[torch.Tensor], torch.Tensor], query: torch.Tensor) -> torch.Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        tangent = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    return torch.zeros_like(query) if tangent is None else tangent


TRANSFORMS: dict[str, Callable[..., torch.Tensor]] = {
    "double backward": _double_backward,
    "jvp": _jvp,
    "forward_ad": _forward_ad,
    "vmap": lambda function, query: torch.func.vmap(function)(query[None].repeat(2, 1, 1, 1, 1)),
    "grad": lambda function, query: torch.func.grad(lambda x: function(x).square().sum())(query),
    "hessian": lambda function, query: torch.func.hessian(lambda x: function(x).sum())(query),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_are_right_or_refused(transform: Callable[..., torch.Tensor]) -> None:
    """What autograd cannot do with the operator must be an error, never a derivative that is silently missing."""
    query = torch.randn(1, 1, 3, 2, dtype=torch.float64)
    try:
        actual = transform(_attend, query)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(actual, transform(_plain, query))


# torch.compile. Results are the eager ones, bit by bit: the same kernel runs.


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def _step(attend: Callable[..., Any], case: Case, inputs: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs and gradients of a function of a case's tensors."""
    torch.manual_seed(case.seed)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.differentiable().items()}
    results = attend(**{**inputs.arguments(), **leaves})
    torch.autograd.backward(results, [inputs.grad_out, inputs.grad_lse])
    return [result.detach() for result in results], {name: leaf.grad for name, leaf in leaves.items()}


def _assert_same(compiled: Any, eager: Any) -> None:
    for number, result in enumerate(eager[0]):
        tolerance.same_bits(f"result {number}", compiled[0][number], result)
    for name, grad in eager[1].items():
        tolerance.same_bits(f"grad_{name}", compiled[1][name], grad)


COMPILED = [
    SAMPLES[0],
    SAMPLES[1],
    Case(9, 17, 8, heads=2, window=(3, 1), bias=Bias("1hqk"), alibi="h", softcap=2.0, sinks=True),
    Case(9, 17, 8, batch=2, heads=2, bias=Bias("b11k", "bool"), causal=True),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_graph(case: Case, dynamic: bool) -> None:
    """Dynamo and AOTAutograd without code generation: no graph break, same results."""

    def attend(**tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
        result = flashx.attention(**tensors, **case.options(), return_lse=True)
        return result.out, result.lse

    inputs = case.inputs(torch.float32)
    compiled = _compiled(attend, backend="aot_eager", dynamic=dynamic)
    _assert_same(_step(compiled, case, inputs), _step(attend, case, inputs))


def test_compiled_graph_with_dropout() -> None:
    """The seed is drawn inside the graph: reproducible, and another one each call."""
    query = torch.randn(1, 2, 33, 8)
    compiled = _compiled(lambda q: flashx.attention(q, q, q, dropout_p=0.5), backend="aot_eager")
    torch.manual_seed(1)
    first, second = compiled(query), compiled(query)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    tolerance.same_bits("out", compiled(query), first)


def test_one_graph_serves_many_lengths() -> None:
    """dynamic=True: other sizes, the same graph, the causal shift still that of the call."""
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attend = lambda q, k, v: flashx.attention(q, k, v, causal=True, window=(9, 9))  # noqa: E731
    compiled = _compiled(attend, backend=compiles, dynamic=True)
    graphs = 0
    for q_len, k_len in [(5, 9), (6, 11), (17, 7), (33, 130)]:
        inputs = Case(q_len, k_len, 8, heads=2).inputs(torch.float32)
        tensors = inputs.query, inputs.key, inputs.value
        tolerance.same_bits(f"{q_len}x{k_len}", compiled(*tensors), attend(*tensors))
        graphs = graphs or compiles.frame_count
    assert compiles.frame_count == graphs


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor(dynamic: bool) -> None:
    """The default compiler, in the middle of a layer: projections before and after, gradients to the weights."""
    torch.manual_seed(0)
    layer = torch.nn.ModuleList([torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)])

    def block(x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        query, key, value = layer[0](x).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        out, lse = flashx.attention(query, key, value, causal=True, return_lse=True)
        return layer[1](out.transpose(1, 2).reshape(batch, length, 16)) + lse.mean()

    compiled = _compiled(block, dynamic=dynamic)
    for length in (7, 12) if dynamic else (7,):
        x = torch.randn(2, length, 16)
        results = []
        for function in (compiled, block):
            layer.zero_grad()
            out = function(x)
            out.square().sum().backward()
            results.append([out.detach(), *(parameter.grad.clone() for parameter in layer.parameters())])
        # Inductor sums lse.mean() and the biases' gradients in an order of its own.
        torch.testing.assert_close(results[0], results[1])


def test_exported_module() -> None:
    class Layer(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out, lse = flashx.attention(query, key, value, causal=True, return_lse=True)
            return out, lse

    length = torch.export.Dim("length", min=2, max=1000)
    dims = {2: length}
    shapes = {"query": dims, "key": dims, "value": dims}
    tensors = tuple(torch.randn(2, 2, 9, 8) for _ in range(3))
    exported = torch.export.export(Layer(), tensors, dynamic_shapes=shapes)
    assert any(node.target == torch.ops.flashx.attention.default for node in exported.graph.nodes)
    for length in (9, 21):
        other = tuple(torch.randn(2, 2, length, 8) for _ in range(3))
        for actual, expected in zip(exported.module()(*other), Layer()(*other), strict=True):
            tolerance.same_bits("exported", actual, expected)


def test_bad_input_is_the_same_error_in_a_graph() -> None:
    query = torch.randn(1, 2, 3, 4)
    compiled = _compiled(lambda q: flashx.attention(q, q, q, window=(-1, 0)), backend="aot_eager")
    with pytest.raises(Exception, match="window's left width must be >= 0"):
        compiled(query)


def test_activation_checkpointing() -> None:
    """Activation checkpointing runs the forward again, dropout and all."""
    case = COMBINED[2]
    inputs = case.inputs(torch.float32)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        arguments = dict(zip(inputs.differentiable(), tensors, strict=True))
        return flashx.attention(**{**inputs.arguments(), **arguments}, **case.options())

    grads = []
    for checkpoint in (False, True):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs.differentiable().values()]
        torch.manual_seed(0)
        if checkpoint:
            out = torch.utils.checkpoint.checkpoint(attend, *leaves, use_reentrant=False)
        else:
            out = attend(*leaves)
        grads.append(torch.autograd.grad(out, leaves, inputs.grad_out))
    for again, once in zip(grads[1], grads[0], strict=True):
        tolerance.same_bits("grad", again, once)
