"""patch() and unpatch(): what they replace, that they put it back, and that torch's modules then run on flashx."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flashx
from flashx.nn.functional import scaled_dot_product_attention

torch_attention = torch._C._nn.scaled_dot_product_attention


def patched() -> bool:
    return F.scaled_dot_product_attention is scaled_dot_product_attention


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert F.scaled_dot_product_attention is torch_attention
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        flashx.unpatch()


class Calls(TorchDispatchMode):
    """Counts the calls of flashx's operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.flashx.attention.default
        return func(*args, **(kwargs or {}))


def test_patch_and_unpatch() -> None:
    flashx.patch()
    assert patched() and not torch.backends.mha.get_fastpath_enabled()
    flashx.unpatch()
    assert F.scaled_dot_product_attention is torch_attention and torch.backends.mha.get_fastpath_enabled()


def test_context_manager_and_errors_inside() -> None:
    with flashx.patch():
        assert patched()
    with pytest.raises(ZeroDivisionError), flashx.patch():
        raise ZeroDivisionError
    assert not patched()


def test_patches_nest() -> None:
    flashx.patch()
    with flashx.patch():
        with flashx.patch():
            pass
        assert patched()
        flashx.unpatch()
        assert patched()
    assert not patched()


def test_unpatch_without_patch_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"flashx\.unpatch\(\) without flashx\.patch\(\)"):
        flashx.unpatch()


def test_the_fast_path_returns_as_it_was() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with flashx.patch():
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_another_replacement_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*args: Any, **options: Any) -> None: ...

    flashx.patch()
    F.scaled_dot_product_attention = other
    with pytest.warns(RuntimeWarning, match="was replaced after"):
        flashx.unpatch()
    assert F.scaled_dot_product_attention is other
    with flashx.patch():
        assert patched()
    assert F.scaled_dot_product_attention is other
    F.scaled_dot_product_attention = torch_attention


def test_threads_count_together() -> None:
    start = threading.Barrier(8)
    seen = []

    def work() -> None:
        start.wait()
        for _ in range(200):
            with flashx.patch():
                seen.append(patched())

    threads = [threading.Thread(target=work) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert len(seen) == 1600 and all(seen)


def test_import_patches_nothing_and_warns_of_nothing() -> None:
    code = (
        "import torch; before = torch.nn.functional.scaled_dot_product_attention\n"
        "import flashx\n"
        "assert torch.nn.functional.scaled_dot_product_attention is before\n"
        "assert torch.backends.mha.get_fastpath_enabled()\n"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


PADDED = torch.arange(5) >= torch.tensor([[5], [3]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)

# A module, a call of it on (2, 5, 16), and how many attentions that is.
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, torch.Tensor], torch.Tensor], int]] = {
    "attention": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        lambda module, x: module(x, x, x, need_weights=False)[0],
        1,
    ),
    "masked attention": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True),
        lambda module, x: module(x, x, x, key_padding_mask=PADDED, attn_mask=CAUSAL != 0, need_weights=False)[0],
        1,
    ),
    "unbatched attention": (
        lambda: nn.MultiheadAttention(16, 4, kdim=16, vdim=16),
        lambda module, x: module(x[0], x[1], x[1], need_weights=False)[0],
        1,
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 3),
        lambda module, x: module(x, src_key_padding_mask=PADDED),
        3,
    ),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True), 2),
        lambda module, x: module(x, x, tgt_mask=CAUSAL, tgt_is_causal=True),
        4,
    ),
    "transformer": (
        lambda: nn.Transformer(16, 4, 2, 2, 32, 0.0, batch_first=True),
        lambda module, x: module(x, x),
        6,
    ),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [True, False])
def test_torchs_modules_run_on_flashx(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in inference, where torch's fast path would pass it by."""
    build, call, attentions = MODULES[name]
    module = build().double().train(training)
    x = torch.randn(2, 5, 16).double()
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    expected = outcome(module, call, x)
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", True)
    with flashx.patch(), warnings.catch_warnings(), Calls() as calls:
        warnings.simplefilter("error")
        actual = outcome(module, call, x)
    assert calls.count == attentions
    torch.testing.assert_close(actual, expected)


def outcome(module: nn.Module, call: Callable[[Any, torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
    """The output; in training the parameters' gradients too."""
    with torch.set_grad_enabled(module.training):
        out = call(module, x)
    if not module.training:
        return out
    return [out, *torch.autograd.grad(out.sin().sum(), list(module.parameters()), materialize_grads=True)]


class Block(nn.Module):
    """A user's attention that looks the function up in torch.nn.functional."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def test_nested_tensors_need_the_fast_path() -> None:
    """torch's modules take nested tensors only there; it says so, and can be switched on again under the patch."""
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)])
    with flashx.patch(), torch.no_grad():
        with pytest.raises(AssertionError, match=r"fast path was not hit because .*get_fastpath_enabled"):
            attention(nested, nested, nested)
        torch.backends.mha.set_fastpath_enabled(True)
        assert attention(nested, nested, nested)[0].is_nested


def compiled_operators(model: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Callable[..., Any], list[str]]:
    """The model compiled to one graph, and a list that gets the operators of every graph made."""
    from torch._dynamo.backends.common import aot_autograd

    operators: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=compiler)), operators


@pytest.mark.parametrize("name", ["masked attention", "encoder"])
def test_torchs_modules_compile_under_the_patch(name: str) -> None:
    build, call, attentions = MODULES[name]
    module = build().double().eval()
    x = torch.randn(2, 5, 16).double()
    compiled, operators = compiled_operators(lambda x: call(module, x))
    with flashx.patch():
        torch.testing.assert_close(compiled(x), call(module, x))
    assert operators.count("flashx.attention.default") == attentions


def test_compiled_code_follows_the_patch() -> None:
    """Code that looks the function up in torch.nn.functional is compiled anew when that changes."""
    x = torch.randn(2, 5, 16)
    block = Block()
    compiled, operators = compiled_operators(block)
    for context, attentions in ((nullcontext, 0), (flashx.patch, 1), (nullcontext, 1)):
        with context():
            torch.testing.assert_close(compiled(x), block(x))
        assert operators.count("flashx.attention.default") == attentions


def test_models_copy_pickle_and_load_across_the_patch() -> None:
    x = torch.randn(2, 5, 16)
    block = Block()
    expected = block(x)
    with flashx.patch(), Calls() as calls:
        buffer = io.BytesIO()
        torch.save(block, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(buffer, weights_only=False)]
        for model in copies:
            torch.testing.assert_close(model(x), expected)
    assert calls.count == 3
    with Calls() as calls:
        for model in copies:
            torch.testing.assert_close(model(x), expected)
    assert calls.count == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_script_under_the_patch() -> None:
    """TorchScript records torch's operator, as without the patch."""
    x = torch.randn(2, 5, 16)
    for module, arguments in ((Block(), (x,)), (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), (x,))):
        expected = module(*arguments)
        with flashx.patch():
            scripted = torch.jit.script(module)
            torch.testing.assert_close(scripted(*arguments), expected)
        torch.testing.assert_close(scripted(*arguments), expected)


def test_checkpointing_draws_the_same_dropout_again() -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)

    def attention(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    gradients = []
    with flashx.patch():
        for wrap in (False, True):
            torch.manual_seed(1)
            leaf = x.clone().requires_grad_()
            out = checkpoint(attention, leaf, use_reentrant=False) if wrap else attention(leaf)
            gradients.append(torch.autograd.grad(out.sin().sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
