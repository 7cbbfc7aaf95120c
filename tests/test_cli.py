"""The command line as a user meets it: real processes for exit codes and weight, in-process runs for the rest."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
import typer
from torch import nn
from typer.testing import CliRunner
from ultralytics import YOLO

from rtdetr_act import patch_model
from rtdetr_act.activations.registry import register
from rtdetr_act.cli.main import app, summarized_warnings
from rtdetr_act.errors import InputError, RtdetrActError, TrainingError
from rtdetr_act.integrations.ultralytics.arguments import parse_arguments
from rtdetr_act.integrations.ultralytics.failures import translate_errors
from rtdetr_act.integrations.ultralytics.runs import run_training, slug

TINY = ["epochs=1", "imgsz=64", "batch=4", "amp=False", "plots=False", "workers=0", "optimizer=AdamW"]


class Overflow(nn.Module):
    """An activation that leaves no number finite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("inf")


def run(*arguments: str) -> str:
    """Run a command in this process; errors come out as they are raised."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def shell(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own."""
    command = [sys.executable, "-c", "from rtdetr_act.cli.main import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
HEAVY = "torch ultralytics numpy matplotlib polars plotly scipy".split()


@pytest.mark.integration
def test_help_imports_neither_torch_nor_ultralytics(tmp_path: Path) -> None:
    code = (
        "import sys; from rtdetr_act.cli.main import main\n"
        f"for command in {[[], *([name] for name in COMMANDS)]}:\n"
        "    sys.argv = ['rtdetr-act', *command, '--help']\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        f"    print('imported', *command, [name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    imported = [line for line in result.stdout.splitlines() if line.startswith("imported")]
    assert imported == ["imported []", *(f"imported {name} []" for name in COMMANDS)]
    assert result.stdout.count("Usage") == len(imported)


@pytest.mark.integration
def test_train_runs_several_variants_into_one_table(
    data, rows_yaml, stock_yaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    acts = ["stock", "arelu", "mish@backbone"]
    flags = [word for act in acts for word in ("--act", act)]
    output = run("train", *flags, "--model", str(rows_yaml), "--data", str(data.detect), *TINY)
    for title in ("activation", "sites", "parameters", "GFLOPs", "(640)", "mAP50", "mAP50-95", "s/epoch"):
        assert title in output
    folders = [
        Path(line.split(": ", 1)[1]) for line in output.splitlines() if re.match(r"^(stock|arelu|mish@\w+): /", line)
    ]
    assert [folder.name for folder in folders] == ["rows-stock", "rows-arelu", "rows-mish-backbone"]
    assert all(tmp_path / "runs" / "detect" == folder.parent for folder in folders)
    assert ".partial" not in output, "a log names no temporary file"
    kinds = []
    for folder in folders:
        model = torch.load(folder / "weights" / "best.pt", weights_only=False)["model"]
        kinds.append({type(module).__name__ for module in model.modules()} & {"AReLU", "Mish", "PReLU"})
        assert (folder / "results.csv").is_file() and (folder / "args.yaml").is_file()
    # The YAML names arelu, and prelu and gelu in two rows: stock drops them all, a plan goes on top of them.
    assert kinds == [set(), {"AReLU"}, {"AReLU", "Mish"}]
    best = str(folders[1] / "weights" / "best.pt")
    assert "mAP50" in run("val", best, "--data", str(data.detect), "imgsz=64", "plots=False")
    shown = run("predict", best, f"source={data.image}", "imgsz=64")
    folder = Path(re.search(r"^files: ([^{\n]+)$", shown, re.MULTILINE)[1].strip())
    assert folder.is_dir() and folder.parent == tmp_path / "runs" / "detect", "not in a runs_dir of another project"
    exported = run("export", best, "format=torchscript", "imgsz=64")
    assert Path(re.search(r"^file: ([^{\n]+)$", exported, re.MULTILINE)[1].strip()).is_file()
    with pytest.raises(InputError, match="finished"):
        run("resume", best)


def test_warnings_of_other_packages_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with summarized_warnings():
            for line in (1, 2):
                warnings.warn_explicit("gone tomorrow", FutureWarning, torch.__file__, line)
            warnings.warn_explicit("look here", UserWarning, importlib.import_module("rtdetr_act").__file__, 1)
    own, others = capsys.readouterr().err.splitlines()
    assert own == "warning: look here"
    assert others == "warning: hidden warnings of other packages: torch 2; PYTHONWARNINGS=default shows them"


def test_sites_shows_before_and_after(stock_yaml) -> None:
    output = run("sites", str(stock_yaml), "--act", "arelu@backbone")
    assert "before" in output and "after" in output and "sites swapped" in output
    assert "after" not in run("sites", str(stock_yaml))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_draws_what_it_names(suffix: str, tmp_path: Path) -> None:
    target = tmp_path / f"curves.{suffix}"
    run("plot", "arelu", "silu", "dyrelu_b", "-o", str(target))
    head = target.read_bytes()[:400]
    assert head.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in head or b"<?xml" in head


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "--act", "areluu"], 2, "did you mean 'arelu'?"),
        (["train", "--act", "arelu", "epoch=3"], 2, "did you mean 'epochs'?"),
        (["train", "--act", "arelu", "epochs=many"], 2, "epochs"),
        (["train", "--act", "arelu", "task=detect"], 2, "set by this command"),
        (["train", "--act", "arelu", "--model", "rtdetr-m.yaml"], 2, "there is no model 'rtdetr-m.yaml'"),
        (["train", "--act", "arelu", "--data", "coco9.yaml"], 2, "no data set 'coco9.yaml'; did you mean"),
        (["train", "--act", "frelu", "--scope", "all"], 2, "tokens"),
        (["train", "--act", "arelu@77"], 2, "77"),
        (["train", "--act", "arelu", "--pretrained", "none.pt"], 2, "no file 'none.pt'"),
        (["train", "--model", "broken.yaml"], 2, "not a valid YAML"),
        (["train", "--model", "data.yaml"], 2, "backbone"),
        (["train", "--model", "six.yaml"], 2, "6 items"),
        (["train", "--model", "code.yaml"], 2, "no activation 'open'"),
        (["val", "nothing.pt"], 2, "no file 'nothing.pt'"),
        (["val", "text.pt"], 2, "not an Ultralytics checkpoint"),
        (["predict", "text.pt"], 2, "not an Ultralytics checkpoint"),
        (["resume", "model.onnx"], 2, "not a checkpoint"),
        (["plot", "arelu", "-o", "x.gif"], 2, ".svg"),
        (["plot", "arelu", "-o", "nowhere/x.png"], 2, "no folder"),
        (["sites", "model.onnx"], 2, "exported"),
        (["sites", "rtdetr-n.yaml", "act=arelu, silu"], 2, "sites shows one plan, not 2"),
        (["sites", "rtdetr-n.yaml", "from=silu"], 2, "from= says what an activation replaces"),
        (["sites", "rtdetr-n.yaml", "act=mish", "from=slu"], 2, "did you mean 'silu'?"),
        (["train", "--act", "arelu", "imgsz=-1"], 2, "imgsz must be a size in pixels"),
        (["train", "--act", "arelu", "imgsz=[]"], 2, "imgsz must be a size in pixels"),
        (["train", "--act", "arelu", "batch=0"], 2, "batch must be a number of images"),
        (["train", "--act", "arelu", "batch=-2"], 2, "batch must be a number of images"),
        (["train", "--act", "arelu", "workers=-1"], 2, "workers must be an integer"),
        (["train", "--act", "arelu", "epochs=0"], 2, "epochs"),
        (["train", "--act", "arelu", "epochs={[]:1}"], 2, "epochs"),
        (["train", "--act", "arelu", "epochs=" + "9" * 5000], 2, "epochs"),
        (["train", "--act", "arelu", "lr0=nan"], 2, "lr0"),
        (["train", "--act", "arelu", "lr0=-1"], 2, "lr0"),
        (["train", "--act", "arelu", "seed=-1"], 2, "seed"),
        (["train", "--act", "arelu", "optimizer=Adum"], 2, "no optimizer 'Adum'; did you mean 'Adam'?"),
        # Found when the data set has been drawn, which takes seconds.
        pytest.param(["train", "--act", "arelu", "device=77"], 2, "device", marks=pytest.mark.integration),
        (["train", "--act", "arelu", "name=" + "x" * 300], 2, "200 characters"),
        (["train", "--act", "arelu", "--model", "x" * 300 + ".yaml"], 2, "name of a file"),
        (["train", "--act", "arelu", "--data", "x" * 300 + ".yaml"], 2, "name of a file"),
        (["train", "--act", "x" * 3000], 2, "2,000 characters"),
        (["train", "--act", "a\x1b[31mb"], 2, r"a\x1b[31mb"),
        (["train", "--data", "data.yaml"], 2, "data.yaml"),
        (["val", "x" * 300 + ".pt"], 2, "name of a file"),
        (["val", "model.pt"], 2, "name one with data="),
        (["val", "model.pt", "imgsz=0"], 2, "imgsz"),
        (["export", "model.pt", "format=onnx", "--int8"], 2, "name one with data="),
        (["export", "model.pt", "opset=999"], 2, "opset"),
        (["export", "model.pt", "format=oonx"], 2, "oonx"),
        (["predict", "model.pt", "source=99"], 2, "99"),
        (["predict", "model.pt", "source=nowhere.jpg"], 2, "no source"),
        (["predict", "model.pt", "source=data.yaml"], 2, "data.yaml"),
        (["resume", "model.pt"], 2, "finished training"),
        (["sites", "rtdetr-n.yaml", "--scope", "foo"], 2, "'conv' or 'all'"),
        (["learned", "model.pt", "--data", "nope.yaml"], 2, "no data set 'nope.yaml'"),
        (["fold", "model.pt", "-o", "x.onnx"], 2, ".pt"),
    ],
)
def test_a_mistake_is_one_sentence_a_code_and_nothing_left_behind(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "broken.yaml").write_text("backbone: [")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [a]\n")
    row = "[-1, 1, Conv, [8, 3, 2], arelu, 1]"
    (tmp_path / "six.yaml").write_text(f"nc: 1\nbackbone:\n  - {row}\nhead:\n  - [[0], 1, Detect, [nc]]\n")
    (tmp_path / "code.yaml").write_text(
        "nc: 1\nactivation: open('ran', 'w')\n"
        "backbone:\n  - [-1, 1, Conv, [8, 3, 2]]\nhead:\n  - [[0], 1, Detect, [nc]]\n"
    )
    monkeypatch.chdir(tmp_path)
    if "format=onnx" in arguments:
        for package in ("onnx", "onnxslim", "onnxruntime"):
            pytest.importorskip(package)
    if "model.pt" in arguments:
        save_checkpoint(tmp_path / "model.pt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RtdetrActError, match=re.escape(words)) as caught:
        CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600 and caught.value.exit_code == code
    assert sorted(tmp_path.rglob("*")) == before


def save_checkpoint(path: Path) -> None:
    """Write a finished checkpoint whose data set is gone."""
    from ultralytics import YOLO

    model = YOLO(str(tiny.write_yaml(path.with_name("tiny.yaml"), tiny.yolo())))
    patch_model(model, "arelu")
    arguments = {"task": "detect", "data": str(path.parent / "gone" / "data.yaml"), "imgsz": 64}
    torch.save({"model": model.model, "ema": None, "train_args": arguments, "epoch": -1, "optimizer": None}, path)


@pytest.mark.integration
def test_a_bug_in_a_training_stays_a_traceback(data, stock_yaml, tmp_path: Path, monkeypatch) -> None:
    def broken(trainer: object) -> None:
        assert not trainer  # as an optimizer does: without a word

    from ultralytics import RTDETR

    model = RTDETR(str(stock_yaml))
    model.add_callback("on_train_batch_start", broken)
    with pytest.raises(AssertionError):
        run_training(model, **tiny.train_args(data.detect, tmp_path))


@pytest.mark.kill
def test_a_training_that_finds_a_full_disk_says_how_to_go_on(data, stock_yaml, tmp_path: Path) -> None:
    import errno

    from ultralytics import RTDETR

    def fill(trainer: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    for event, words in (("on_train_start", "no epoch was finished"), ("on_model_save", "rtdetr-act resume .*last.pt")):
        model = RTDETR(str(stock_yaml))
        model.add_callback(event, fill)
        with pytest.raises(InputError, match=f"No space left.*{words}"):
            run_training(model, **{**tiny.train_args(data.detect, tmp_path / event), "exist_ok": False})
        assert (tmp_path / event).exists() == (event == "on_model_save"), "a run without a checkpoint leaves nothing"
    # A folder that is used again holds the checkpoint of the run before, with which nothing goes on.
    last = next(tmp_path.rglob("last.pt"))
    os.utime(last, (1, 1))
    model = RTDETR(str(stock_yaml))
    model.add_callback("on_train_start", fill)
    with pytest.raises(InputError, match="no epoch was finished"):
        run_training(model, **tiny.train_args(data.detect, tmp_path / "on_model_save"))
    assert last.exists()


@pytest.mark.parametrize(
    ("word", "words"),
    [("device=77", "Invalid CUDA"), ("", "empty.yaml")],
)
def test_what_ultralytics_refuses_is_one_sentence_too(
    word: str, words: str, data, stock_yaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("train: nowhere\nval: nowhere\nnames: [a]\n")
    source = str(data.detect) if word else "empty.yaml"
    arguments = [pair for pair in TINY if pair.split("=")[0] != word.split("=")[0]] + [word] * bool(word)
    with pytest.raises(InputError, match=words) as caught:
        run("train", "--act", "arelu", "--model", str(stock_yaml), "--data", source, *arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("project", ["there", "there/below", "new", "new/below"])
def test_what_fails_removes_no_folder_that_was_there_before(
    project: str, data, stock_yaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics import RTDETR

    for place in ("there", "elsewhere"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    # A validator makes its folder, and then looks for the device.
    arguments = {"data": str(data.detect), "device": 77, "project": str(tmp_path / project)}
    with pytest.raises(InputError, match="Invalid CUDA"), translate_errors(**arguments):
        RTDETR(str(stock_yaml)).val(**arguments)
    assert {path.name for path in tmp_path.rglob("*")} == {"there", "elsewhere"}


@pytest.mark.integration
def test_a_mistake_in_a_real_shell(tmp_path: Path) -> None:
    result = shell("train", "--act", "areluu", cwd=tmp_path)
    warning, error = result.stderr.splitlines()
    assert result.returncode == 2 and warning.startswith("warning: without model= and data= ")
    assert error.startswith("error: ") and "Traceback" not in result.stderr + result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
@pytest.mark.usefixtures("own_zoo")
def test_a_non_finite_loss_ends_the_run(data, stock_yaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    register("test_overflow", Overflow)
    flags = ["--act", "test_overflow@0", "--model", str(stock_yaml), "--data", str(data.detect)]
    with pytest.raises(TrainingError, match="loss became nan"):
        run("train", *flags, *TINY)
    assert not list(tmp_path.rglob("*.pt"))


def test_arguments_are_literals_and_nothing_else() -> None:
    given = parse_arguments(["epochs=3", "lr0=1e-3", "cos_lr=true", "device=cpu", "freeze=[0, 1]", "name=a=b"])
    assert given == {"epochs": 3, "lr0": 1e-3, "cos_lr": True, "device": "cpu", "freeze": [0, 1], "name": "a=b"}
    assert parse_arguments(["name=__import__('os').getcwd()"])["name"] == "__import__('os').getcwd()"


def test_slugs_are_folder_names() -> None:
    assert (
        slug("dyrelu_b@backbone, leaky_relu(negative_slope=0.1)@0-9")
        == "dyrelu_b-backbone-leaky_relu-negative_slope-0.1-0-9"
    )


@pytest.mark.integration
@pytest.mark.usefixtures("own_zoo")
def test_a_checkpoint_with_an_activation_that_is_gone_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "with" / "strange_activations.py"
    package.parent.mkdir()
    package.write_text("from torch import nn\nclass Strange(nn.ReLU):\n    pass\n")
    monkeypatch.syspath_prepend(package.parent)
    register("strange", importlib.import_module("strange_activations").Strange)
    model = YOLO(str(tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo())))
    patch_model(model, "strange")
    torch.save({"model": model.model}, tmp_path / "strange.pt")
    del sys.modules["strange_activations"]
    result = shell("val", "strange.pt", "--data", "coco8.yaml", cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "strange_activations.Strange" in result.stderr and "is not installed here" in result.stderr
    assert "pip" not in result.stdout + result.stderr, "Ultralytics would try to install a package of that name"


@pytest.mark.kill
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_says_how_to_go_on_and_that_works(data, stock_yaml, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from rtdetr_act.cli.main import main; main()",
        "train",
        "--act",
        "stock",
        "--act",
        "arelu",
    ]
    words = ["--model", str(stock_yaml), "--data", str(data.detect), *TINY, "epochs=8", "val=False"]
    with (tmp_path / "out.txt").open("w") as out, (tmp_path / "err.txt").open("w") as err:
        process = subprocess.Popen([*command, *words], cwd=tmp_path, stdout=out, stderr=err)
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("last.pt")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    message = (tmp_path / "err.txt").read_text().splitlines()[-1]
    last = re.fullmatch(r"error: interrupted; go on with: rtdetr-act resume (.+last\.pt)", message)
    assert last and Path(last[1]).is_file(), message
    assert [folder.name for folder in (tmp_path / "runs" / "detect").iterdir()] == ["stock-stock"], "no next variant"
    assert "mAP50" in run("resume", last[1])
