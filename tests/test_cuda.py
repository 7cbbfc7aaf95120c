"""What needs a GPU: the ops' kernels, their layouts, precision, streams, graphs and sizes, and how it is timed.

`scripts/check_gpu.py` runs the same checks over many more types, layouts and shapes, and measures.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from gpu_checks import (
    LEARNED,
    bytes_for_large,
    check_dynamic_conv,
    check_graph,
    check_large,
    check_low_memory,
    check_module,
    check_stream,
    check_training,
    module_names,
)
from op_checks import (
    HALF,
    LAYOUTS,
    OPS,
    assert_right,
    check_compiled,
    check_derivatives,
    check_layout,
    check_repeats,
    check_second_derivatives,
    draw_map,
    draw_pair,
)

from rtdetr_act.analysis.memory import measure_step_memory
from rtdetr_act.integrations.ultralytics.costs import compare_costs
from rtdetr_act.integrations.ultralytics.models import load_variants
from rtdetr_act.kernels.backend import can_use_triton, triton
from rtdetr_act.timing import time_medians

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]


@pytest.fixture(autouse=True)
def _seed_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("activation", [*LEARNED, "silu", "leaky_relu", "mish"])
def test_what_is_computed_again_gives_the_same_gradients(activation: str, dtype: torch.dtype) -> None:
    check_low_memory(activation, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", OPS)
def test_result_and_gradients_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    for shape, layout in product(((3, 5, 9, 7), (2, 64, 40, 40), (0, 4, 3, 3), (1, 1, 1, 1)), LAYOUTS):
        x, grad = draw_pair(shape, dtype, layout, "cuda")
        assert can_use_triton(x) == (triton is not None and x.numel() > 0)
        assert_right(name, x, grad)


@pytest.mark.parametrize("name", OPS)
def test_derivatives_and_second_ones(name: str) -> None:
    check_derivatives(name, "cuda")
    for dtype in (torch.float32, *HALF):
        check_second_derivatives(name, *draw_pair((2, 5, 4, 3), dtype, "channels_last", "cuda"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", [name for name in OPS if name not in ("mean", "logits")])
def test_layout_of_result_and_gradient_is_that_of_the_input(name: str, channels_last: bool) -> None:
    check_layout(name, channels_last, "cuda")


@pytest.mark.parametrize("name", OPS)
def test_repeats_to_the_bit_also_on_a_stream_of_its_own(name: str) -> None:
    check_repeats(name, "cuda")
    check_stream(name, "cuda")


@pytest.mark.parametrize("name", OPS)
def test_replays_in_a_graph_with_other_inputs(name: str) -> None:
    check_graph(name, torch.float16, "cuda")


@pytest.mark.parametrize("name", ["arelu", "prelu-channels", "acon", "dyrelu-c"])
def test_compiles_by_inductor(name: str) -> None:
    check_compiled(name, *draw_pair((2, 8, 20, 17), torch.bfloat16, "contiguous", "cuda"))


@pytest.mark.parametrize("name", module_names())
def test_modules_give_what_numpy_gives(name: str) -> None:
    for dtype in (torch.float32, *HALF):
        check_module(name, dtype, "contiguous", "cuda")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", LEARNED)
def test_learns_under_autocast_what_it_learns_in_float32(name: str, dtype: torch.dtype) -> None:
    check_training(name, dtype, "cuda")


@pytest.mark.parametrize("channels_last", [False, True])
def test_dynamic_convolution(channels_last: bool) -> None:
    for dtype in (torch.float32, *HALF):
        check_dynamic_conv(8, 3, dtype, channels_last, "cuda")


def test_more_elements_than_32_bits_count() -> None:
    shape = (1, 3, 26_755, 26_756)
    if torch.cuda.mem_get_info()[0] < bytes_for_large(shape):
        pytest.skip(f"takes {bytes_for_large(shape) / 2**30:.0f} GiB of the GPU's memory")
    check_large("arelu", shape, torch.bfloat16, False, "cuda")


def test_further_devices_are_used_whichever_is_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU here")
    for name in OPS:
        assert_right(name, *draw_pair((2, 8, 9, 7), torch.float32, "contiguous", "cuda:1"))


def test_memory_and_time_are_those_of_the_device_that_is_named() -> None:
    small, large = torch.zeros(1000, requires_grad=True), torch.zeros(2**20, device="cuda", requires_grad=True)
    assert measure_step_memory(lambda: small.exp()).kept == 4000  # on the CPU, although there is a GPU
    memory = measure_step_memory(lambda: large.exp().sin(), device="cuda")
    assert memory.kept == 2**22 and memory.by_operator == {"exp": 2**22}
    assert 2 * 2**22 <= memory.peak <= 4 * 2**22
    work = draw_map((64, 64, 64, 64)).cuda()
    seconds = time_medians({"work": lambda: [work.exp() for _ in range(50)]}, 3, device="cuda")["work"]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(50):
        work.exp()
    end.record()
    end.synchronize()
    assert max(seconds) > 0.5 * start.elapsed_time(end) / 1e3


def test_a_model_is_measured() -> None:
    pytest.importorskip("ultralytics")
    models = load_variants("yolo11n.yaml", ["stock", "arelu"])
    stock, arelu = compare_costs(models, imgsz=64, batch=2, device="cuda", rounds=2)
    assert stock.peak_bytes > arelu.peak_bytes > 0
