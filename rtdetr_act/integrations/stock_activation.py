"""A stock `activation:` of a model YAML, such as `nn.ReLU()`, as the default of a convolution class, without `eval`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rtdetr_act.errors import SpecError
from rtdetr_act.spec import ActSpec


def build_stock_activation(text: str) -> nn.Module:
    """Build the module of a stock `activation:`.

    Args:
        text: A form such as "nn.SiLU()" or "torch.nn.LeakyReLU(0.1)".

    Raises:
        SpecError: It is not a class of torch.nn, or its arguments are wrong.

    >>> build_stock_activation("torch.nn.LeakyReLU(0.1)")
    LeakyReLU(negative_slope=0.1)
    """
    spec = ActSpec.parse(text)
    cls = getattr(nn, spec.name.rpartition(".")[2], None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise SpecError(f"'activation: {text}' is not a class of torch.nn: write e.g. nn.SiLU() or a name such as silu")
    try:
        return cls(*spec.args, **dict(spec.kwargs))
    except (TypeError, ValueError) as error:
        raise SpecError(f"'activation: {text}' cannot be built: {error}") from None


@contextmanager
def stock_default_act(conv: Any, text: str) -> Iterator[None]:
    """Set `default_act` of a convolution class to a stock `activation:` inside the block.

    Args:
        conv: The class `Conv` of Ultralytics or YOLOv5.
        text: As in `build_stock_activation`.
    """
    before = conv.default_act
    conv.default_act = build_stock_activation(text)
    try:
        yield
    finally:
        conv.default_act = before  # Ultralytics before 8.4, and YOLOv5, leave it to the next model
