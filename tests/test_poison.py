"""What a row may not see must not touch it: NaN and inf in hidden keys, values and padding change not one bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tolerance
import torch
from cases import NAN, STORAGES, Bias, Case

import flashx

pytestmark = pytest.mark.usefixtures("poisoned_memory")

POISONS = (NAN, float("inf"), -float("inf"), 2.0**30)


def assert_same(actual: tolerance.Results, expected: tolerance.Results) -> None:
    for name in expected:
        tolerance.same_bits(name, actual[name], expected[name])


# A case, how many of its first keys no row sees, and how many of its first rows see no key.
OUTSIDE = [
    (Case(40, 150, 24, 40, heads=4, kv_heads=2, window=(9, 0)), 101, 0),
    (Case(1, 300, 16, batch=2, heads=2, window=(99, 0), causal=True, alibi="h"), 200, 0),
    (Case(150, 40, 16, heads=2, causal=True), 0, 110),
    (Case(300, 90, 16, heads=2, window=(20, 20), softcap=2.0), 0, 190),
]


def _poison_first(tensor: torch.Tensor, count: int, poison: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[:, :, :count] = poison
    return tensor


@pytest.mark.parametrize("case, keys, rows", OUTSIDE, ids=str)
def test_outside_the_window(case: Case, keys: int, rows: int, engine: str) -> None:
    inputs = case.inputs(torch.float32)
    clean = tolerance.attend(case, inputs, engine)
    for poison in POISONS:
        poisoned = replace(
            inputs,
            key=_poison_first(inputs.key, keys, poison),
            value=_poison_first(inputs.value, keys, poison),
            query=_poison_first(inputs.query, rows, poison),
            grad_out=_poison_first(inputs.grad_out, rows, poison),
        )
        assert_same(tolerance.attend(case, poisoned, engine), clean)


MASKED = [
    Case(35, 150, 24, 40, batch=2, heads=4, kv_heads=2),
    Case(67, 67, 16, heads=2, causal=True, alibi="h", softcap=3.0),
    Case(5, 300, 16, heads=2, sinks=True, dropout_p=0.3),
    Case(131, 131, 16, window=(30, 30)),
]


@pytest.mark.parametrize("kind", ["bool", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_masked_keys(case: Case, dtype: torch.dtype, kind: str, engine: str) -> None:
    """A key padding mask over random keys, the last ones among them."""
    inputs = case.inputs(dtype)
    visible = torch.rand(case.k_len, generator=torch.Generator().manual_seed(1)) > 0.4
    visible[-20:] = False
    bias = visible if kind == "bool" else torch.zeros(case.k_len, dtype=dtype).masked_fill(~visible, -torch.inf)
    clean = tolerance.attend(case, replace(inputs, bias=bias), engine)
    for poison in POISONS:
        key, value = (tensor.masked_fill(~visible[:, None], poison) for tensor in (inputs.key, inputs.value))
        poisoned = replace(inputs, bias=bias, key=key, value=value)
        assert_same(tolerance.attend(case, poisoned, engine), clean)


@pytest.mark.parametrize("poison", POISONS[:3])
@pytest.mark.parametrize("feature", ["causal", "window", "bool"])
def test_a_poisoned_key_that_some_rows_see(feature: str, poison: float, engine: str) -> None:
    """Only the rows that see it change: the others' out, lse and query gradient keep their bits."""
    case = Case(150, 150, 16, 24, heads=2, causal=feature == "causal", window=(20, 20) if feature == "window" else None)
    inputs = case.inputs(torch.float32)
    bad = 77
    distance = torch.arange(150) - bad
    sees = {"causal": distance >= 0, "window": distance.abs() <= 20, "bool": distance % 3 == 0}[feature]
    if feature == "bool":
        mask = torch.ones(150, 150, dtype=torch.bool)
        mask[~sees, bad] = False
        inputs = replace(inputs, bias=mask)
    clean = tolerance.attend(case, inputs, engine)
    for name in ("key", "value"):
        changed = getattr(inputs, name).clone()
        changed[:, :, bad] = poison
        results = tolerance.attend(case, replace(inputs, **{name: changed}), engine)
        for result in ("out", "lse", "grad_query"):
            tolerance.same_bits(f"{result}, bad {name}", results[result][:, :, ~sees], clean[result][:, :, ~sees])
        if poison != poison:
            assert results["out"][:, :, sees].isnan().all(), name
        if name == "key" and poison != poison:
            assert results["lse"][:, :, sees].isnan().all()


def test_a_poisoned_row_spares_the_keys_it_does_not_see(engine: str) -> None:
    """Backward sums over rows: the NaN gradient of one row must not reach the keys hidden from it."""
    case = Case(150, 150, 16, 24, heads=2, causal=True)
    inputs = case.inputs(torch.float32)
    clean = tolerance.attend(case, inputs, engine)
    bad = 40
    grad_out = inputs.grad_out.clone()
    grad_out[:, :, bad] = NAN
    results = tolerance.attend(case, replace(inputs, grad_out=grad_out), engine)
    for name in ("grad_key", "grad_value"):
        tolerance.same_bits(name, results[name][:, :, bad + 1 :], clean[name][:, :, bad + 1 :])
        assert results[name][:, :, : bad + 1].isnan().all(), name
    others = torch.arange(150) != bad
    tolerance.same_bits("grad_query", results["grad_query"][:, :, others], clean["grad_query"][:, :, others])


def test_a_nan_sequence_stays_in_its_place(engine: str) -> None:
    """Other batch entries, heads and later calls share threads and workspaces with it."""
    case = Case(150, 170, 16, batch=3, heads=4, kv_heads=2, causal=True)
    inputs = case.inputs(torch.float32)
    clean = tolerance.attend(case, inputs, engine)

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[1] = NAN
        tensor[2, : tensor.shape[1] // 2] = NAN
        return tensor

    results = tolerance.attend(case, inputs.map(lambda t: spoil(t) if t.dim() == 4 else t), engine)
    for name in clean:
        half = clean[name].shape[1] // 2
        assert results[name][1].isnan().all(), name
        tolerance.same_bits(f"{name}[0]", results[name][0], clean[name][0])
        tolerance.same_bits(f"{name}[2]", results[name][2, half:], clean[name][2, half:])
    assert_same(tolerance.attend(case, inputs, engine), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("storage", ["sliced", "packed", "odd_heads", "odd_rows"])
def test_memory_around_the_tensors(storage: str, dtype: torch.dtype, engine: str) -> None:
    """The storages of cases.py are NaN between and around the elements; nothing of it may be read into a result."""
    case = Case(17, 33, 17, 9, batch=2, heads=2, causal=True)
    inputs = case.inputs(dtype)
    around = inputs.map(lambda tensor: STORAGES[storage](tensor) if tensor.dim() == 4 else tensor)
    assert around.key.untyped_storage().nbytes() > inputs.key.untyped_storage().nbytes()
    assert_same(tolerance.attend(case, around, engine), tolerance.attend(case, inputs, engine))


def test_memory_around_the_results_is_left_alone(engine: str) -> None:
    """Rows of 17 elements end inside a vector: the one behind them is not theirs to write."""
    case = Case(17, 33, 17, 9, heads=2)
    inputs = case.inputs(torch.float32)
    results = tolerance.attend(case, inputs, engine)
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        assert results[name].isfinite().all(), name


def test_hidden_bias_values(engine: str) -> None:
    """NaN in the bias of a key that the causal mask hides; its gradient there is 0."""
    case = Case(67, 67, 16, heads=2, causal=True, bias=Bias("bhqk"))
    inputs = case.inputs(torch.float32)
    future = torch.ones(67, 67, dtype=torch.bool).triu(1)
    poisoned = replace(inputs, bias=inputs.bias.masked_fill(future, NAN))
    results = tolerance.attend(case, poisoned, engine)
    assert_same(results, tolerance.attend(case, inputs, engine))
    assert (results["grad_bias"][..., future] == 0).all()


def test_a_visible_nan_shows(engine: str) -> None:
    """Nothing hides a NaN that a row does see: the opposite of everything above."""
    case = Case(40, 70, 16, heads=2, causal=True)
    inputs = case.inputs(torch.float32)
    for name in ("query", "key", "value"):
        changed = getattr(inputs, name).clone()
        changed[0, 0, 3, 5] = NAN
        out = flashx.attention(**{**inputs.arguments(), name: changed}, **case.options(), backend=engine)
        assert out[0, 0].isnan().any() and out[0, 1].isfinite().all(), name
    for poison in (NAN, float("inf")):
        bias = torch.zeros(70)
        bias[3] = poison
        out = flashx.attention(**{**inputs.arguments(), "bias": bias}, backend=engine)
        assert out.isnan().all()


def test_infinite_logits(engine: str) -> None:
    """A key at -inf is hidden from those who multiply it with a positive query, as in naive attention."""
    query, key, value = torch.ones(1, 1, 3, 1), torch.zeros(1, 1, 4, 1), torch.randn(1, 1, 4, 8)
    key[0, 0, 1] = -torch.inf
    out, lse = flashx.attention(query, key, value, return_lse=True, backend=engine)
    rest = value[:, :, [0, 2, 3]].mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, rest)
    torch.testing.assert_close(lse, torch.full_like(lse, 3.0).log())


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("queries", [1, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_past_the_last_meet_infinite_keys(dtype: torch.dtype, queries: int, softcap: float, engine: str) -> None:
    """Kernels that fill up a tile of rows with zeros must not multiply them with the key: 0 * inf."""
    key = torch.zeros(1, 1, 64, 16, dtype=dtype)
    value = torch.randn(1, 1, 64, 16, dtype=dtype, requires_grad=True)
    key[0, 0, ::2] = -torch.inf
    query = torch.ones(1, 1, queries, 16, dtype=dtype)
    out = flashx.attention(query, key, value, softcap=softcap, backend=engine)
    out.sum().backward()
    assert value.grad is not None
    expected = torch.full((64, 16), queries / 32.0)
    if softcap:
        weight = 1 / (1 + torch.tensor(-softcap).exp())
        expected *= weight
        expected[::2] = queries / 32 * (1 - weight)
    else:
        expected[::2] = 0
    torch.testing.assert_close(value.grad[0, 0], expected.to(dtype))
