"""The folder of a study with all records that there are, written without a training."""

from __future__ import annotations

from pathlib import Path

from rtdetr_act.study.grid import expand_study, make_study
from rtdetr_act.study.storage import write_json

DEFAULTS = {"model": "rtdetr-n.yaml", "data": "shapes"}
TABLE = "epoch,time,train/loss,metrics/mAP50(B),metrics/mAP50-95(B)\n1,2.5,1.5,0.5,0.25\n2,5,1.25,0.6,0.375\n"


def make_folder(folder: Path) -> Path:
    """Write a study of two variants and two seeds with all records that there are."""
    for row in expand_study(
        make_study({"activations": ["stock", "arelu"], "seeds": 2, "epochs": 2}, defaults=DEFAULTS)
    ):
        place = folder / "runs" / row.name
        place.mkdir(parents=True)
        write_json(place / "run.json", row.to_plain())
        (place / "results.csv").write_text(TABLE)
        write_json(place / "attempts.json", [{"ended": "2026-01-01T00:00:00+00:00", "reason": "killed by SIGKILL"}])
        score = 0.5 + 0.01 * row.seed + 0.1 * (row.activation == "arelu")
        result = {
            "state": "done", "scores": {"mAP50": score, "mAP50-95": score / 2}, "classes": {"circle": 0.5}, "epochs": 2,
            "precision": 0.75, "recall": 0.625,
            "sites": 25, "parameters": 1000, "gflops_640": 0.5, "seconds_per_epoch": 2.5, "versions": {"torch": "2.4"},
            "command": "rtdetr-act train", "reason": "",
        }  # fmt: skip
        write_json(place / "result.json", result)
        curve = {"name": "model.0.act", "activation": "AReLU", "before": [0.0, None, 1.0], "after": [0.0, 0.5, 1.5]}
        write_json(place / "activations.json", {"x": [-1.0, 0.0, 1.0], "sites": [curve]})
    write_json(folder / "study.json", {"baseline": "stock"})
    write_json(folder / "latency.json", {"milliseconds": {"stock": 2.5, "arelu": 3.5}, "note": "Latency."})
    return folder
