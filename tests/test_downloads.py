"""A data set's YAML runs no code, and what only looks downloads nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from ultralytics.data import utils
from ultralytics.engine import trainer, validator
from ultralytics.utils import ROOT

from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics.datasets import check_data
from rtdetr_act.integrations.ultralytics.downloads import ALLOW_CODE, ALLOW_CODE_FLAG, no_downloads

PYTHON = "import pathlib\npathlib.Path('ran').touch()\npathlib.Path('images').mkdir()"


def data_yaml(folder: Path, download: str) -> Path:
    """Write a data set whose images are missing."""
    return tiny.write_yaml(
        folder / "mine.yaml",
        {"path": str(folder), "train": "images", "val": "images", "names": ["a"], "download": download},
    )


@pytest.mark.parametrize(
    "download", [PYTHON, "bash touch ran", "https://x.invalid/a.zip\nopen('ran', 'w')", "print(1)"]
)
@pytest.mark.parametrize("where", [utils, trainer, validator])
def test_code_of_a_users_own_data_set_is_not_run(where, download, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = data_yaml(tmp_path, download)
    first = download.splitlines()[0]
    with pytest.raises(InputError, match=ALLOW_CODE_FLAG) as caught:
        where.check_det_dataset(str(path))
    assert first in str(caught.value) and str(caught.value).isprintable()
    with pytest.raises(InputError, match="not run"):
        check_data(str(path), "detect")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.yaml"]


def test_code_is_run_where_the_user_allows_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ALLOW_CODE, "1")
    utils.check_det_dataset(str(data_yaml(tmp_path, PYTHON)))
    assert (tmp_path / "ran").exists()


def test_code_of_ultralytics_own_data_sets_is_run(tmp_path: Path, monkeypatch) -> None:
    # What it would download is not to be had here: it fails in the middle of its own code, not before.
    monkeypatch.setattr(utils, "DATASETS_DIR", tmp_path)
    own = next(path for path in (ROOT / "cfg" / "datasets").glob("*.yaml") if "download: |" in path.read_text("utf-8"))
    with pytest.raises(Exception) as caught:
        utils.check_det_dataset(own.name)
    assert "not run" not in str(caught.value)


def test_a_data_set_that_is_there_is_read_as_before(data) -> None:
    original = utils.check_det_dataset.__wrapped__
    assert utils.check_det_dataset(str(data.detect)) == original(str(data.detect))
    with pytest.raises(FileNotFoundError):
        utils.check_det_dataset("nowhere.yaml")


def test_nothing_is_downloaded_where_a_command_only_looks(tmp_path: Path, monkeypatch) -> None:
    from ultralytics import YOLO
    from ultralytics.utils import downloads

    monkeypatch.chdir(tmp_path)
    before = torch.hub.download_url_to_file, downloads.safe_download, utils.safe_download
    with no_downloads():
        for call in (
            lambda: torch.hub.load_state_dict_from_url("https://x.invalid/a.pth", model_dir=str(tmp_path / "hub")),
            lambda: downloads.safe_download("https://x.invalid/a.zip"),
            lambda: utils.check_det_dataset("coco8.yaml"),
            lambda: utils.check_cls_dataset("https://x.invalid/a.zip"),
            lambda: YOLO("yolo11n.pt"),
        ):
            with pytest.raises(InputError, match="downloads nothing"):
                call()
    assert (torch.hub.download_url_to_file, downloads.safe_download, utils.safe_download) == before
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    "words",
    [
        ["sites", "rtdetr-l.pt"],
        ["learned", "rtdetr-l.pt"],
        ["plot", "rtdetr-l.pt"],
        ["maps", "rtdetr-l.pt", "image=x.jpg"],
        ["fold", "rtdetr-l.pt"],
        ["bench", "--act", "arelu", "--model", "rtdetr-l.pt"],
        ["diagnose", "--model", "rtdetr-l.pt"],
        ["diagnose", "--data", "coco8.yaml"],
    ],
)
def test_looking_commands_download_nothing(words: list[str], tmp_path: Path, monkeypatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="downloads nothing"):
        CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=False)
    assert not list(tmp_path.iterdir())
