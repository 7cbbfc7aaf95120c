"""Rebuild the layers of a task model from its `model.yaml`, as the next training does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.modules.conv import Conv, ConvTranspose, RepConv

from rtdetr_act.errors import RtdetrActError, SpecError, reason
from rtdetr_act.integrations.ultralytics.downloads import no_downloads
from rtdetr_act.integrations.ultralytics.model_yaml import BUILD_ERRORS
from rtdetr_act.surgery.patcher import KINDS
from rtdetr_act.surgery.sites import Site, collect_sites

_DEFAULT_OWNERS = (Conv, ConvTranspose, RepConv)  # each has a class attribute `default_act` of its own


@dataclass(frozen=True)
class Rebuilt:
    """A network that was built from a `model.yaml`.

    Attributes:
        network: A module with its layers under `model`, as in a task model.
        sites: Its sites, of activations and of convolutions, in module order.
        default_sites: Names of the sites that hold `Conv.default_act`, or that of ConvTranspose or RepConv.
    """

    network: nn.Module
    sites: tuple[Site, ...]
    default_sites: frozenset[str]


def rebuild(model: Any) -> Rebuilt:
    """Build the layers of a task model anew from its `model.yaml`, with fresh weights; nothing is downloaded.

    An edit of `Conv.default_act` in this process or installation is left out, since no file carries it. The random
    state is not changed.

    Args:
        model: Task model, which is not changed.

    Raises:
        RtdetrActError: The layers cannot be built: the plan names an unknown activation, or a row an unknown module.
    """
    model_yaml = copy.deepcopy(model.yaml)
    channels = model_yaml.get("channels", model_yaml.get("ch", 3))
    with no_downloads(), torch.random.fork_rng(devices=[]), shipped_default_act() as default:
        try:
            layers, _ = tasks.parse_model(model_yaml, channels, verbose=False)
        except RtdetrActError:
            raise
        except BUILD_ERRORS as error:
            raise SpecError(f"the model YAML cannot be built: {type(error).__name__}: {reason(error)}") from error
    network = nn.Module()
    network.model = layers
    sites = collect_sites(layers, "model", model_yaml, KINDS)
    return Rebuilt(network, tuple(sites), frozenset(site.name for site in sites if site.module is default))


def find_edited_defaults() -> list[str]:
    """Return what is edited in this Ultralytics, such as "Conv.default_act is ReLU()"; empty if nothing is."""
    owners = {cls.__name__: cls.default_act for cls in _DEFAULT_OWNERS}
    return [f"{name}.default_act is {act}" for name, act in owners.items() if type(act) is not nn.SiLU]


@contextmanager
def shipped_default_act() -> Iterator[nn.Module]:
    """Let every `default_act` be one new SiLU inside the block, like the one that Ultralytics ships; yield it."""
    default = nn.SiLU()
    before = [(cls, cls.default_act) for cls in _DEFAULT_OWNERS]
    for cls, _ in before:
        cls.default_act = default
    try:
        yield default
    finally:
        for cls, act in before:
            cls.default_act = act
