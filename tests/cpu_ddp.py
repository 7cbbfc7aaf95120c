"""Ultralytics' trainer on two CPU processes: what it does with several GPUs, with gloo in the place of NCCL.

The workers run the file that Ultralytics writes for them. This module must not import rtdetr_act: that they do is what
the tests are for.
"""

from __future__ import annotations

import inspect
import os
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from ultralytics.models.rtdetr.train import RTDETRTrainer
from ultralytics.utils import RANK
from ultralytics.utils.dist import ddp_cleanup, generate_ddp_command

_WORKER = "LOCAL_RANK" in os.environ
# Ultralytics 8.3 passes the number of processes around and takes it from the list of GPUs; 8.4 keeps it on the trainer.
_WORLD = (2,) if "world_size" in inspect.signature(RTDETRTrainer._do_train).parameters else ()


class _DDPOnCpu(DistributedDataParallel):
    """DistributedDataParallel takes no device_ids on the CPU, and Ultralytics always gives some."""

    def __init__(self, module: torch.nn.Module, device_ids: Any = None, **settings: Any) -> None:
        super().__init__(module, **settings)


class CpuDdpTrainer(RTDETRTrainer):
    """Trains RT-DETR in two worker processes, each of which leaves its network as rank0.pt or rank1.pt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world_size = 2
        self.ddp = not _WORKER

    def train(self) -> None:
        if not _WORLD:
            super().train()
        elif _WORKER:
            self._do_train(*_WORLD)
        else:
            command, file = generate_ddp_command(*_WORLD, self)
            try:
                # 8.3 does not give its workers the sys.path of this process.
                subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
            finally:
                ddp_cleanup(self, str(file))

    def _do_train(self, *world_size: int) -> None:
        super()._do_train(*world_size)
        torch.save({"model": self.model.module, "ema": None}, Path(self.args.save_dir) / f"rank{RANK}.pt")

    def final_eval(self) -> None:
        """Leave out the validation of best.pt, for which a worker of 8.4 asks CUDA for its device."""

    def _setup_ddp(self, *_: int) -> None:
        self.device = torch.device("cpu")
        torch.nn.parallel.DistributedDataParallel = _DDPOnCpu
        barrier = distributed.barrier
        distributed.barrier = lambda *_, **__: barrier()  # gloo takes no device_ids, which 8.3 gives
        distributed.init_process_group("gloo", timeout=timedelta(seconds=120), rank=RANK, world_size=2)
