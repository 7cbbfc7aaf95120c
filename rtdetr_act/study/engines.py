"""Engines that run a study, chosen and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

from rtdetr_act.errors import InputError, quote
from rtdetr_act.study import cluster, local

Engine = Callable[..., None]  # (folders, watch=…): runs what is not finished in the run folders
EngineName = Literal["local", "ray"]


def parse_engine(name: str, address: str | None, halving: bool) -> EngineName:
    """Return the engine named by command-line options, after checking that they are consistent.

    Args:
        name: Value of `--engine`.
        address: Value of `--address`.
        halving: Value of `--halving`.

    Raises:
        InputError: There is no such engine, or it has no such option.
    """
    if name not in get_args(EngineName):
        raise InputError(f"engine must be local or ray, not {quote(name)}")
    if (address or halving) and name != "ray":
        raise InputError("address= and halving= need engine=ray")
    engine: EngineName = "ray" if name == "ray" else "local"
    return engine


@contextmanager
def open_engine(
    name: EngineName,
    *,
    device: Any,
    cpus: int | None,
    retries: int,
    address: str | None = None,
    halving: str | None = None,
) -> Iterator[Engine]:
    """Open an engine for the body of a `with` statement; a context manager.

    Args:
        name: "local" for this machine, "ray" for a cluster.
        device: Ultralytics' `device` for all runs; None for a GPU per run, or the CPU without a GPU.
        cpus: CPU cores per run; None for 1.
        retries: Number of further attempts at a run whose process ends without a result.
        address: With "ray": address of the cluster; None starts Ray on this machine.
        halving: With "ray": the baseline, for stopping variants early by successive halving; None stops none.

    Raises:
        InputError: Ray is missing, or a run needs more than the machines have.
    """
    parse_engine(name, address, halving is not None)
    if name == "local":
        yield partial(local.run_locally, slots=local.find_slots(device, cpus), retries=retries)
        return

    with cluster.join_cluster(address, device=device, cpus=cpus, halving=halving is not None) as settings:
        yield partial(cluster.run_on_cluster, settings=settings, retries=retries, halving=halving)
