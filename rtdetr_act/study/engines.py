"""Where the runs of a study go, found and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rtdetr_act.errors import InputError, quote
from rtdetr_act.study import cluster, local

Engine = Callable[..., None]  # (folders, watch=…): runs what is not finished in those folders


def check_engine(name: str, address: str | None, halving: bool) -> None:
    """Check the words that choose an engine; raises InputError."""
    if name not in ("local", "ray"):
        raise InputError(f"--engine is local or ray, not {quote(name)}")
    if (address or halving) and name != "ray":
        raise InputError("--address and --halving need --engine ray")


@contextmanager
def open_engine(
    name: str,
    *,
    device: Any,
    cpus: int | None,
    retries: int,
    address: str | None = None,
    halving: str | None = None,
) -> Iterator[Engine]:
    """Find the machines for the runs of a study, and hold them for the body.

    Args:
        name: "local" or "ray".
        device: The `device` of all runs as Ultralytics takes it; None for a GPU each, or the CPU where there is none.
        cpus: Cores of each run; None for one on a CPU.
        retries: Further tries of a run whose process ended without a result.
        address: With "ray": where the cluster is; None starts Ray on this machine.
        halving: With "ray": the baseline, which is not stopped early; None stops none.

    Raises:
        InputError: There is no such engine, Ray is missing, or a run needs more than the machines have.
    """
    check_engine(name, address, halving is not None)
    if name == "local":
        yield partial(local.run_locally, places=local.find_slots(device, cpus), retries=retries)
        return

    with cluster.join_cluster(address, device=device, cpus=cpus, halving=halving is not None) as order:
        yield partial(cluster.run_on_cluster, order=order, retries=retries, halving=halving)
