"""What a checkpoint file names is read in linear time, whatever its form, and no file has anything installed."""

from __future__ import annotations

import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from rtdetr_act import find_sites, patch_model
from rtdetr_act.errors import ModelError
from rtdetr_act.integrations.ultralytics.checkpoints import check_classes
from rtdetr_act.integrations.ultralytics.models import load_model

FORMS = [(protocol, True) for protocol in range(6)] + [(protocol, False) for protocol in range(1, 6)]
PLACES = ["gone_package", "gone_package.inner", "torch.nn.modules.gone", "rtdetr_act.gone", "gone-1 package"]


@pytest.fixture
def gone() -> Iterator[type]:
    """Yield a function that makes a class in a module which is there only until the file is written."""
    made: list[str] = []

    def make(place: str, name: str = "Thing") -> type:
        cls = type(name, (nn.Module,), {"__module__": place, "__qualname__": name})
        for depth in range(1, place.count(".") + 2):
            part = ".".join(place.split(".")[:depth])
            if part not in sys.modules:
                made.append(part)
                sys.modules[part] = types.ModuleType(part)
        setattr(sys.modules[place], name, cls)
        return cls

    yield make
    for part in made:
        sys.modules.pop(part, None)


def forget(place: str) -> None:
    for name in [name for name in sys.modules if name == place.split(".")[0] or name.startswith("gone_package")]:
        if "gone" in name:
            del sys.modules[name]
    sys.modules.pop(place, None)


@pytest.mark.parametrize(("protocol", "zipped"), FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_a_missing_class_is_named_in_every_form_of_file(place, protocol, zipped, gone, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(
        {"note": "text", "model": nn.Sequential(nn.Linear(2, 2), gone(place)())},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    forget(place)
    with pytest.raises(ModelError, match="Thing") as caught:
        check_classes(path)
    assert "install the package" not in str(caught.value) and "pip" not in str(caught.value)
    assert ("load it with the version that it was saved with" in str(caught.value)) == place.startswith("rtdetr_act.")
    with pytest.raises(ModelError, match="Thing"):
        load_model(str(path))


@pytest.mark.parametrize(("protocol", "zipped"), FORMS)
def test_what_can_be_imported_is_no_reason_to_refuse(protocol, zipped, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    patch_model(network, "arelu")
    content = {"model": network, "note": "cno_such_package\nThing\n", "half": network[0].weight.half()}
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    check_classes(tmp_path / "x.pt")


def test_reading_takes_no_longer_than_the_file_is_long(tmp_path: Path) -> None:
    # The letter c begins the name of a class: a file of many took hours to tell apart. pytest-timeout ends that.
    torch.save({"args": "c" * 10_000_000, "lines": "cc\n" * 1_000_000}, tmp_path / "c.pt")
    check_classes(tmp_path / "c.pt")


def test_a_file_that_unpacks_to_many_times_its_size_is_not_loaded(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb/data.pkl", "w", force_zip64=True) as file,
    ):
        for _ in range(101):
            file.write(bytes(1 << 20))
    with pytest.raises(ModelError, match="unpacks from"):
        load_model(str(tmp_path / "bomb.pt"))


@pytest.mark.parametrize("number", [b"r\x00\x00\x00\x08", b"r\xff\xff\xff\xff", b"p999999999\n"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_all_memory_is_not_loaded(number: bytes, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x02}" + number + b".")
    if zipped:
        pickled = path.read_bytes()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", pickled)
    with pytest.raises(ModelError, match="asks for room"):
        load_model(str(path))


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80", b"\x80\x04.", b"PK\x03\x04", b"\x80\x02cmissing\n", b"c\n\n."]
)
def test_what_is_not_a_checkpoint_is_left_to_the_loading(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    check_classes(tmp_path / "x.pt")
    with pytest.raises(ModelError, match="not an Ultralytics checkpoint"):
        load_model(str(tmp_path / "x.pt"))


def test_a_class_that_the_reading_missed_is_not_installed_either(tmp_path: Path) -> None:
    # Reading stops at the list in the place of a key, loading at the module before it.
    pickled = b"\x80\x02}cgone_package\nThing\nR]]s."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}]]s" + pickled[2:])
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path / "x.pt"))
    assert "AutoInstall" not in str(caught.value)


def test_nothing_is_installed_because_of_a_file() -> None:
    from ultralytics.nn import tasks

    from rtdetr_act.integrations.ultralytics.hooks import tasks as tasks_hooks

    token = tasks_hooks._loading.set(True)
    try:
        with pytest.raises(ModelError, match="no_such_package"):
            tasks.check_requirements("no_such_package")
    finally:
        tasks_hooks._loading.reset(token)


SAFE = """
import sys
{before}
from ultralytics import YOLO
model = YOLO(sys.argv[1])
print(sum(type(m).__name__ == "AReLU" for m in model.model.modules()), "AReLU")
"""


@pytest.mark.integration
def test_restricted_loading_takes_our_checkpoints_or_names_us(tmp_path: Path) -> None:
    from ultralytics import YOLO
    from ultralytics.nn import tasks

    if not hasattr(tasks, "_SafeLoad"):
        pytest.skip("this Ultralytics has no restricted loading")
    model = YOLO(str(tiny.write_yaml(tmp_path / "yolo.yaml", tiny.yolo())))
    count = len(patch_model(model, "arelu"))
    torch.save({"model": model.model}, tmp_path / "x.pt")
    for before, words in (("import rtdetr_act", f"{count} AReLU"), ("", "rtdetr_act.activations.arelu")):
        result = tiny.run_python(SAFE.format(before=before), tmp_path, "x.pt", ULTRALYTICS_SAFE_LOAD="1")
        assert words in result.stdout + result.stderr, result.stderr


def test_a_class_refused_by_restricted_loading_is_named(tmp_path: Path) -> None:
    from ultralytics.nn import tasks

    if not hasattr(tasks, "_SafeLoad"):
        pytest.skip("this Ultralytics has no restricted loading")
    torch.save({"model": torch.device, "x": types.SimpleNamespace()}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"types.SimpleNamespace.*ULTRALYTICS_SAFE_LOAD does not allow"):
        tasks.torch_safe_load(tmp_path / "x.pt", safe_only=True)


def test_a_model_patched_before_the_first_release_is_refused(tmp_path: Path) -> None:
    from ultralytics import YOLO

    model = YOLO(str(tiny.write_yaml(tmp_path / "yolo.yaml", tiny.yolo())))
    patch_model(model, "mish")
    for module in model.model.modules():
        if hasattr(module, "_rtdetr_act"):
            module._rtdetr_act = {"activation": "mish", "original": [None]}
    torch.save({"model": model.model}, tmp_path / "old.pt")
    with pytest.raises(ModelError, match=r"before 0\.1\.0"):
        find_sites(load_model(str(tmp_path / "old.pt")))
