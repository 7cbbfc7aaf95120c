"""The ops: values, gradients and memory of every backend against float64; Triton's on the CPU, in its interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    HALF,
    LAYOUTS,
    OPS,
    Inputs,
    arelu_formula,
    assert_right,
    check_compiled,
    check_derivatives,
    check_layout,
    check_repeats,
    check_second_derivatives,
    draw_map,
    draw_pair,
    exactly,
    run,
    scalar,
)
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act import create, patch_model
from rtdetr_act.activations.arelu import arelu
from rtdetr_act.activations.dyrelu import dyrelu
from rtdetr_act.activations.frelu import maximum
from rtdetr_act.activations.glu import glu
from rtdetr_act.kernels import blocks
from rtdetr_act.kernels.backend import INTERPRETING, can_use_triton
from rtdetr_act.kernels.blocks import empty_like
from rtdetr_act.kernels.tiles import tile


@pytest.fixture(autouse=True)
def _seed_and_no_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        pytest.importorskip("triton")
    torch.manual_seed(0)
    monkeypatch.setattr(
        blocks, "SMALL_NUMEL", 0
    )  # small maps take torch's own graph, which would leave nothing to test


# ---------------------------------------------------------------- values and gradients


@pytest.mark.kernels
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", OPS)
def test_result_and_gradients_are_those_of_the_formula(name: str, dtype: torch.dtype, channels_last: bool) -> None:
    x, grad = (draw_map((3, 5, 9, 7), dtype, channels_last) for _ in range(2))
    assert can_use_triton(x) == INTERPRETING
    assert_right(name, x, grad)


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(2, 3, 40, 41), (1, 1, 70, 70), (1, 300, 2, 2), (9, 4, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_cutting_into_blocks_changes_nothing(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ELEMENTS_PER_THREAD", 200)
    assert INTERPRETING or len(blocks.split_blocks(torch.empty(shape))) > 1
    assert_right(name, draw_map(shape, dtype), draw_map(shape, dtype))


@pytest.mark.kernels
@settings(max_examples=6 if INTERPRETING else 25, deadline=None)
@given(
    st.sampled_from(sorted(OPS)),
    st.tuples(*(st.integers(1, top) for top in (3, 40, 12, 12))),
    st.sampled_from([torch.float32, *HALF]),
    st.sampled_from(LAYOUTS),
)
def test_any_shape_type_and_strides(name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    assert_right(name, *draw_pair(shape, dtype, layout))


@pytest.mark.parametrize("name", OPS)
def test_first_and_second_derivatives(name: str) -> None:
    check_derivatives(name)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_those_of_the_formula(name: str, dtype: torch.dtype, layout: str) -> None:
    check_second_derivatives(name, *draw_pair((2, 5, 4, 3), dtype, layout))


@pytest.mark.kernels
def test_tiles_of_more_images_than_a_grid_has_rows() -> None:
    across, along = tile(torch.empty(70_000, 3, 1, 1)).grid
    assert across == 70_000 and along == 1


@pytest.mark.kernels
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", [name for name in OPS if name not in ("mean", "logits")])
def test_layout_of_result_and_gradient_is_that_of_the_input(name: str, channels_last: bool) -> None:
    check_layout(name, channels_last)


@pytest.mark.parametrize("name", OPS)
def test_small_maps_take_another_way_to_the_same_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALL_NUMEL", 1 << 15)
    assert_right(name, draw_map((2, 3, 5, 5)), draw_map((2, 3, 5, 5)))


@pytest.mark.kernels
def test_glu_in_both_layouts() -> None:
    for channels_last in (False, True):
        x, grad = (
            draw_map((2, 8, 5, 6), channels_last=channels_last),
            draw_map((2, 4, 5, 6), channels_last=channels_last),
        )
        y, grad_x = run(glu, [x], grad)
        want, want_x = run(lambda t: t[:, :4] * torch.sigmoid(t[:, 4:]), [x.double()], grad.double())
        torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad_x.double(), want_x, rtol=1e-6, atol=1e-6)
        assert grad_x.stride() == x.stride()
        assert torch.autograd.gradgradcheck(glu, [x.double().requires_grad_()])


# ---------------------------------------------------------------- where formulas meet, and at the ends of the range


@pytest.mark.kernels
def test_equal_terms_give_the_gradient_of_relu_at_zero() -> None:
    x = torch.tensor([-1.0, 0.0, 0.0, 2.0]).view(1, 1, 2, 2)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    got = run(lambda t: dyrelu(t, [one, zero], [zero, zero]), [x], torch.ones_like(x))
    assert all(torch.equal(a, b) for a, b in zip(got, run(F.relu, [x], torch.ones_like(x)), strict=True))


def test_equal_maps_give_the_gradient_to_the_first() -> None:
    x = torch.tensor([1.0, 2.0])
    _, grad_x, grad_funnel = run(maximum, [x, x.clone()], torch.ones(2))
    assert grad_x.tolist() == [1, 1] and grad_funnel.tolist() == [0, 0]


@pytest.mark.parametrize("magnitude", [1e-12, 1e-6, 1e6, 1e10])
def test_arelu_is_exact_over_22_orders_of_magnitude(magnitude: float) -> None:
    x = magnitude * torch.randn(1000)
    alpha, beta = torch.tensor([0.9]), torch.tensor([2.0])
    got = run(arelu, [x, alpha, beta], torch.full((1000,), 1e-8))
    want = run(arelu_formula, [t.double() for t in (x, alpha, beta)], torch.full((1000,), 1e-8).double())
    for g, w in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(g.double(), w, rtol=3e-7, atol=0)


# Elementwise ops whose formulas overflow to NaN, or whose gradients do.
FINITE = "swish_beta hard_mish smu smu1 squared_relu star_relu golu telu squareplus".split()


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", FINITE)
def test_no_finite_input_gives_nan(name: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:
        monkeypatch.setattr(blocks, "SMALL_NUMEL", 1000)
    op, formula, more = OPS[name]
    for dtype in (torch.float64, torch.float32, *HALF):
        steps = [0, 1e-5, 2, 5, 10, 20, 88, 89, 104, 200, 300, 6e4, 1e10, 1e19, 1e30, 1e38]
        positive = torch.tensor(steps, dtype=torch.float64).clamp(max=torch.finfo(dtype).max / 2)
        x = torch.cat([positive, -positive]).to(dtype)
        inputs = [x, *more(x)]
        found = run(op, inputs, torch.ones_like(x))
        assert not any(t.isnan().any() for t in found)
        # Where the formula and its gradient are finite in float64 and within the type, they are the result.
        for got, want in zip(found[:2], run(formula, exactly(inputs), torch.ones_like(x).double())[:2], strict=True):
            fits = want.abs() < torch.finfo(dtype).max / 2
            scale = 1 + want.abs() + (x.double().abs() if got is found[0] else 0)
            error = (got.double() - want).abs() / scale
            assert float(error[fits].max()) < 8 * torch.finfo(dtype).eps


@pytest.mark.kernels
@pytest.mark.parametrize("name", OPS)
def test_nan_stays_nan(name: str) -> None:
    op, _, more = OPS[name]
    x = torch.full((1, 2, 2, 2), float("nan"))
    assert op(x, *more(x)).isnan().all()


@pytest.mark.kernels
@pytest.mark.parametrize("name", OPS)
def test_no_images_at_all(name: str) -> None:
    op, _, more = OPS[name]
    x = torch.zeros(0, 4, 3, 3)
    y, *grads = run(op, [x, *more(x)], torch.zeros(0, 4, 3, 3))
    assert y.shape == x.shape
    assert all(not grad.any() for grad in grads)


# ---------------------------------------------------------------- memory


def saved_maps(function: Callable[[], Any], shape: torch.Size) -> int:
    """Count the distinct maps of a shape that autograd keeps for the backward."""
    seen: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        if t.shape == shape:
            seen[t.untyped_storage().data_ptr()] = t  # kept, so that no address is seen twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kept = function()
    del kept
    return len(seen)


def test_arelu_saves_only_its_result_which_the_next_layer_saves_anyway() -> None:
    x, conv = draw_map((2, 4, 6, 6)).requires_grad_(), nn.Conv2d(4, 4, 1)
    alpha, beta = (scalar(0.2, 0.8).requires_grad_() for _ in range(2))
    assert saved_maps(lambda: conv(arelu(x, alpha, beta)), x.shape) == 1
    assert saved_maps(lambda: conv(F.silu(x)), x.shape) == 2


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((name, 1) for name in ("dyrelu-2", "acon", "aglu", "prelu", "mean", "logits", *FINITE)),
        *(("maximum", 2), ("pwlu", 1), ("rational", 1), ("repact", 1)),
    ],
)
def test_no_op_saves_more_than_what_it_reads(name: str, count: int) -> None:
    op, _, more = OPS[name]
    x = draw_map((2, 4, 6, 6))
    inputs = [t.requires_grad_() for t in (x, *more(x))]
    assert saved_maps(lambda: op(*inputs), x.shape) == count


def test_arelu_in_place_behind_batch_norm() -> None:
    bn, alpha, beta = nn.BatchNorm2d(4), scalar(0.2, 0.8).requires_grad_(), scalar(-2, 2).requires_grad_()
    x = draw_map((2, 4, 6, 6)).requires_grad_()
    before = bn(x)
    y = arelu(before, alpha, beta, inplace=True)
    assert y.data_ptr() == before.data_ptr()
    in_place = torch.autograd.grad(y.square().sum(), [x, alpha, beta])
    apart = torch.autograd.grad(arelu(bn(x), alpha, beta).square().sum(), [x, alpha, beta])
    for got, want in zip(in_place, apart, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_in_place_on_what_others_need_is_an_error_not_a_wrong_gradient() -> None:
    x = draw_map((2, 4)).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        arelu(x, scalar(0.2, 0.8), scalar(-2, 2), inplace=True)
    y = torch.sigmoid(x)  # its backward reads its result
    arelu(y, scalar(0.2, 0.8), scalar(-2, 2), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_scratch_memory_serves_training_after_inference_and_threads_apart() -> None:
    x = draw_map((1, 8, 60, 60))  # large enough for it
    coefs = [torch.randn(1, 8, 1, 1) for _ in range(4)]
    with torch.inference_mode():
        want = dyrelu(x, coefs[:2], coefs[2:])
    y, *grads = run(lambda t, *c: dyrelu(t, c[:2], c[2:]), [x, *coefs], torch.ones_like(x))
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    with ThreadPoolExecutor(4) as pool:
        calls = [lambda: run(lambda t, *c: dyrelu(t, c[:2], c[2:]), [x, *coefs], torch.ones_like(x))] * 32
        for found in pool.map(lambda call: call(), calls):
            assert all(torch.equal(a, b) for a, b in zip(found, [y, *grads], strict=True))


# ---------------------------------------------------------------- what records, transforms and repeats


@pytest.mark.integration
@pytest.mark.parametrize("name", OPS)
def test_compiles_without_a_break(name: str) -> None:
    check_compiled(name, draw_map((2, 4, 6, 5)), draw_map((2, 4, 6, 5)), "aot_eager")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("op", "gradient"),
    [
        (lambda x: dyrelu(x, [x.new_ones(1, 1, 1, 1), x.new_zeros(1, 1, 1, 1)], [x.new_zeros(1, 1, 1, 1)] * 2), 0.0),
        (lambda x: maximum(x, 2 * x), 1.0),
    ],
)
def test_ties_pass_the_gradient_to_one_term_compiled_too(op: Callable[[Tensor], Tensor], gradient: float) -> None:
    for call in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
        x = torch.zeros(1, 1, 2, 2, requires_grad=True)
        call(x).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, gradient))


@pytest.mark.integration
@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch.export tells since torch 2.7")
@pytest.mark.parametrize("name", ["dyrelu_b", "dyrelu_c", "frelu"])
def test_exports_as_a_maximum_and_a_convolution(name: str) -> None:
    # Without torch.no_grad, as many call it; few runtimes of NPUs know Sign.
    net = nn.Sequential(nn.Conv2d(4, 8, 1), create(name, 8)).eval()
    exported = torch.export.export(net, (draw_map((1, 4, 8, 8)),))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert "aten.maximum.default" in called and "aten.sign.default" not in called
    convolutions = [each for each in called if "conv" in each]
    assert len(convolutions) == (1 if name == "dyrelu_b" else 2)


@pytest.mark.parametrize("name", OPS)
def test_traces_to_torchs_own_operators(name: str) -> None:
    op, _, more = OPS[name]
    x = draw_map((2, 4, 6, 5))
    inputs = (x, *more(x))
    traced = torch.jit.trace(op, inputs)
    assert "PythonOp" not in str(traced.graph)
    torch.testing.assert_close(traced(*inputs), op(*inputs))


@pytest.mark.parametrize("name", OPS)
def test_gradients_per_image_by_torch_func(name: str) -> None:
    op, _, more = OPS[name]
    x = draw_map((3, 4, 6, 5))
    rest = more(x[:1])
    found = torch.func.vmap(torch.func.grad(lambda t: op(t[None], *rest).sum()))(x)
    for image, got in zip(x, found, strict=True):
        _, want, *_ = run(op, [image[None], *rest], torch.ones(1, 4, 6, 5))
        torch.testing.assert_close(got[None], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_runs_on_tensors_without_memory(name: str) -> None:
    op, _, more = OPS[name]
    inputs = [t.to("meta") for t in [draw_map((2, 4, 6, 5)), *more(draw_map((2, 4, 6, 5)))]]
    assert op(*inputs).shape == (2, 4, 6, 5)


@pytest.mark.kernels
@pytest.mark.parametrize("name", OPS)
def test_repeats_to_the_bit_where_only_deterministic_algorithms_may_run(name: str) -> None:
    check_repeats(name)


def test_new_memory_is_not_filled_first_and_the_setting_comes_back() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        empty_like(torch.zeros(3))
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------- other numbers of dimensions


@pytest.mark.kernels
@pytest.mark.parametrize("sizes", [(45,), (3, 5, 3)], ids=["1-d", "3-d"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "spec",
    ["arelu", "prelu", "prelu(per_channel=True)", "aconc", "meta_aconc", "dyrelu_a", "dyrelu_b", "dyrelu_c", "glu"],
)
def test_positions_may_have_any_number_of_dimensions(
    spec: str, channels_last: bool, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ELEMENTS_PER_THREAD", 200)
    module, image = create(spec, 5), draw_map((3, 5, 9, 5), channels_last=channels_last)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = image.movedim(1, -1).reshape(3, *sizes, 5).movedim(-1, 1) if channels_last else image.reshape(3, 5, *sizes)
    assert x.is_contiguous() != channels_last
    found, expected = module(x.requires_grad_()), module(image.requires_grad_())
    torch.testing.assert_close(found.reshape(image.shape), expected, rtol=1e-5, atol=1e-5)
    grads, expected_grads = (
        torch.autograd.grad(y.square().sum(), [of, *module.parameters()]) for y, of in ((found, x), (expected, image))
    )
    torch.testing.assert_close(grads[0].reshape(image.shape), expected_grads[0], rtol=1e-4, atol=1e-4)
    for one, other in zip(grads[1:], expected_grads[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------- Triton


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETING, reason="the operators exist where Triton runs: TRITON_INTERPRET=1")
def test_registered_operators_keep_their_promises() -> None:
    x, grad = draw_map((2, 5, 6, 7)), draw_map((2, 5, 6, 7), channels_last=True)
    alpha, beta, coefs = scalar(0.2, 0.8), scalar(-2, 2), torch.randn(4, 2, 5)
    pi, ops = torch.rand(2, 1, 6, 7), torch.ops.rtdetr_act
    calls = [
        (ops.arelu, (x, alpha, beta)),
        (ops.arelu_, (x.clone(), alpha, beta)),
        (ops.arelu_backward, (x, x, alpha, beta)),
        (ops.dyrelu, (grad, coefs, None)),
        (ops.dyrelu, (x, coefs, pi)),
        (ops.dyrelu_backward, (x, x, coefs, None)),
        (ops.dyrelu_backward, (grad, grad, coefs, pi)),
        (ops.prelu_backward, (x, x, torch.rand(5))),
        (ops.prelu_backward, (x, x, torch.rand(1))),
        (ops.acon, (x, coefs[:3])),
        (ops.acon_backward, (x, x, coefs[:3].contiguous())),
        (ops.maximum_backward, (x, x, x)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


# ---------------------------------------------------------------- modules


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", ["arelu", "dyrelu_a", "dyrelu_b", "dyrelu_c", "aconc", "meta_aconc", "aglu", "prelu", "frelu", "repact"]
)
def test_modules_learn_alike_compiled_and_eager(name: str) -> None:
    module, x = create(name, 6), draw_map((2, 6, 8, 8))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))

    def gradients(call: Callable[[Tensor], Tensor]) -> Inputs:
        return list(torch.autograd.grad(call(x).square().mean(), list(module.parameters())))

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled), gradients(module), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["arelu", "dyrelu_b", "dyrelu_c", "aconc", "prelu"])
def test_a_block_of_a_patched_network_is_one_graph(name: str) -> None:
    from ultralytics.nn.modules import Conv

    block = nn.Sequential(Conv(8, 4, 3), Conv(4, 8, 1))
    assert len(patch_model(block, name)) == 2
    x, reference = draw_map((2, 8, 10, 10)), copy.deepcopy(block)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        run(compiled, [x], torch.ones(2, 8, 10, 10)), run(reference, [x], torch.ones(2, 8, 10, 10)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    [
        *"arelu dyrelu_a dyrelu_b dyrelu_b(k=3) dyrelu_c aconc meta_aconc aglu prelu frelu".split(),
        *"golu hard_mish rational repact smu1 squared_relu telu".split(),
    ],
)
def test_a_compiled_training_saves_no_masks(name: str) -> None:
    # Inductor's code for a mask is scalar on a CPU, and the partitioner prefers one to computing a condition again.
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    saved: list[Tensor] = []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        saved.extend(node.meta["val"] for node in [*graph.graph.nodes][-1].args[0] if node is not None)
        return make_boxed_func(graph.forward)

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), create(name, 8), nn.Conv2d(8, 8, 1))
    torch._dynamo.reset()
    torch.compile(block, fullgraph=True, backend=backend)(draw_map((2, 8, 10, 10))).sum().backward()
    maps = [value for value in saved if isinstance(value, Tensor) and value.shape == (2, 8, 8, 8)]
    assert maps and all(value.dtype == torch.float32 for value in maps)
