"""Scripts of YOLOv5 and YOLOv7 run with other activations: what is built, trained, saved and rebuilt."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import checkout as stand_in
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from typer.main import get_command

import rtdetr_act
from rtdetr_act import Trained, find_sites, plan_of, run_script, unpatch_model
from rtdetr_act.activations.dyrelu import DyReLUC
from rtdetr_act.analysis.memory import measure_step_memory
from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError, ModelError, SelectionError, SpecError, TrainingError
from rtdetr_act.integrations.yolov5.training import hook_loggers
from rtdetr_act.surgery.parameters import find_scalar_and_channel_parameters

BUILD = """
    import sys
    from models.yolo import Model
    model = Model(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def forget_modules() -> Iterator[None]:
    """A process runs one script, since its modules have the same names as those of the next one."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("models", "utils")]:
        del sys.modules[name]


@pytest.fixture(params=["yolov5", "yolov7"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return stand_in.write_checkout(tmp_path / request.param, evaluates=request.param == "yolov5")


@pytest.fixture
def yolov5(tmp_path: Path) -> Path:
    return stand_in.write_checkout(tmp_path / "yolov5", evaluates=True)


@pytest.fixture
def yolov7(tmp_path: Path) -> Path:
    return stand_in.write_checkout(tmp_path / "yolov7", evaluates=False)


def build(checkout: Path, cfg: Path, *act: str) -> Any:
    """Return the model that a script of a checkout builds from a YAML."""
    script = stand_in.write_script(checkout, "build.py", BUILD + "    sys.modules['models.yolo'].last = model\n")
    run_script(script, [str(cfg)], *act)
    return sys.modules["models.yolo"].last  # type: ignore[attr-defined]


def holds(model: nn.Module) -> list[str]:
    return [site.current for site in find_sites(model)]


def test_act_is_added_to_every_model(checkout: Path) -> None:
    model = build(checkout, stand_in.write_yaml(checkout / "model.yaml"), "arelu@backbone, mish@2")
    assert holds(model) == ["arelu", "arelu", "mish"]
    assert model.yaml["activation"] == "rtdetr_act.Plan('arelu@backbone, mish@2')"
    assert [layer.np for layer in model.model] == [sum(p.numel() for p in layer.parameters()) for layer in model.model]


def test_a_model_keeps_less_where_its_plan_says_so(checkout: Path) -> None:
    script = stand_in.write_script(checkout, "build.py", BUILD + "    sys.modules['models.yolo'].last = model\n")
    cfg = stand_in.write_yaml(checkout / "model.yaml")
    kept = []
    for activation, options in ((None, {}), (None, {"memory": "low"}), ("silu", {"memory": "low"})):
        _forget()
        run_script(script, [str(cfg)], activation, **options)
        model = sys.modules["models.yolo"].last  # type: ignore[attr-defined]
        assert plan_of(model).memory == options.get("memory")
        kept.append(measure_step_memory(lambda model=model: model(torch.rand(4, 3, 64, 64))).kept)  # type: ignore[misc]
    assert kept[1] < 0.7 * kept[0]
    assert kept[2] == kept[1]


def test_the_model_yaml_names_activations(checkout: Path) -> None:
    cfg = stand_in.write_yaml(checkout / "model.yaml", "mish", [None, "prelu"])
    assert holds(build(checkout, cfg)) == ["mish", "prelu", "mish"]


def test_act_comes_after_the_plan_of_the_yaml(checkout: Path) -> None:
    cfg = stand_in.write_yaml(checkout / "model.yaml", "mish", [None, "prelu"])
    model = build(checkout, cfg, "arelu from=mish")
    assert holds(model) == ["arelu", "prelu", "arelu"]
    _forget()
    script = stand_in.write_script(
        checkout, "again.py", f"import models.yolo as y\ny.last = y.Model({dict(model.yaml)!r})"
    )
    run_script(script)
    assert holds(sys.modules["models.yolo"].last) == ["arelu", "prelu", "arelu"]  # type: ignore[attr-defined]


def test_a_model_without_activations_is_as_it_was(checkout: Path) -> None:
    model = build(checkout, stand_in.write_yaml(checkout / "model.yaml"))
    assert holds(model) == ["SiLU" if checkout.name == "yolov5" else "LeakyReLU"] * stand_in.SITES
    assert model.yaml == {**stand_in.YAML, "ch": 3}


def test_a_stock_form_has_its_stock_meaning(yolov5: Path) -> None:
    model = build(yolov5, stand_in.write_yaml(yolov5 / "model.yaml", "nn.LeakyReLU(0.2)"))
    acts = [layer.act for layer in model.model[:3]]
    assert all(type(act) is nn.LeakyReLU and act.negative_slope == 0.2 for act in acts) and acts[0] is acts[1]
    assert model.yaml["activation"] == "nn.LeakyReLU(0.2)"
    assert isinstance(sys.modules["models.common"].Conv.default_act, nn.SiLU)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("activation", "error", "sentence"),
    [
        (
            "nn.ReLU6()",
            SpecError,
            "'activation: nn.ReLU6()' has no meaning in this repository: write ReLU6(), from the zoo",
        ),
        ("arleu", SpecError, "did you mean 'arelu'?"),
        ("__import__('os').getcwd()", SpecError, "getcwd"),
        ("arelu@9", SelectionError, "names layer 9, but the model's layers end at 2"),
        ("dynamic_conv", SpecError, "replaces convolutions: in YOLOv5 and YOLOv7, activations alone are swapped"),
    ],
)
def test_a_wrong_activation_is_a_sentence(yolov7: Path, activation: str, error: type[Exception], sentence: str) -> None:
    cfg = stand_in.write_yaml(yolov7 / "model.yaml", activation)
    with pytest.raises(error) as caught:
        build(yolov7, cfg)
    assert sentence in str(caught.value)


def test_a_wrong_act_stops_before_the_script(checkout: Path) -> None:
    script = stand_in.write_script(checkout, "first.py", "raise AssertionError")
    for act, sentence in (("arleu", "did you mean 'arelu'"), ("dynamic_conv", "activations alone are swapped")):
        with pytest.raises(SpecError, match=sentence):
            run_script(script, (), act)


@pytest.mark.parametrize(
    ("name", "files", "sentence"),
    [
        ("train.py", {}, "there is no script"),
        ("train.py", {"train.py": ""}, "is not a YOLOv5 or YOLOv7 script: neither its folder nor one above it has"),
        (
            "tools/train.py",
            {"tools/train.py": "import sys; sys.path.insert(0, sys.argv[1]); import models.yolo", "models/yolo.py": ""},
            "is not that of YOLOv5 or YOLOv7: it has no class 'Model', or no function 'parse_model(d, ch)'",
        ),
        (
            "train.py",
            {
                "train.py": "import models.yolo",
                "models/yolo.py": "class Model: ...\ndef parse_model(d, scale, ch): ...",
            },
            "no function 'parse_model(d, ch)'",
        ),
    ],
)
def test_other_scripts_are_refused(tmp_path: Path, name: str, files: dict[str, str], sentence: str) -> None:
    for file, code in files.items():
        stand_in.write_script(tmp_path, file, code)
    with pytest.raises((InputError, ModelError)) as caught:
        run_script(tmp_path / name, [str(tmp_path)], "arelu")
    assert sentence in str(caught.value)


def test_models_of_another_folder_are_refused(yolov5: Path, tmp_path: Path) -> None:
    other = stand_in.write_checkout(tmp_path / "other", evaluates=True)
    script = stand_in.write_script(
        yolov5, "mixed.py", f"import sys; sys.path.insert(0, {str(other)!r}); import models.yolo"
    )
    with pytest.raises(ModelError, match="another folder named 'models' comes first on the path"):
        run_script(script)


def test_act_must_be_used(checkout: Path) -> None:
    script = stand_in.write_script(checkout, "detect.py", "import models.yolo")
    with pytest.raises(ModelError, match=r"'arelu' was not used: detect.py built no model"):
        run_script(script, (), "arelu")
    _forget()
    assert run_script(script) is None


def test_one_process_runs_one_script(checkout: Path) -> None:
    script = stand_in.write_script(checkout, "detect.py", "import models.yolo")
    run_script(script)
    with pytest.raises(InputError, match="run the next one in a new process"):
        run_script(script)


def test_a_script_sees_what_python_gives_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
        import __main__, sys
        print([sys.argv, sys.path[0], __name__, __file__, __main__.__dict__ is globals(), __spec__, __package__])
        sys.exit(int(sys.argv[1]))
    """
    stand_in.write_script(checkout, "tools/look.py", code)
    monkeypatch.chdir(checkout)
    before = list(sys.path), sys.argv, sys.modules["__main__"]
    with pytest.raises(SystemExit) as caught:
        run_script("tools/look.py", ["3", "--flag", "a=b"])
    assert caught.value.code == 3 and before == (sys.path, sys.argv, sys.modules["__main__"])
    ours = capsys.readouterr().out
    path = os.path.realpath(checkout / "tools")
    expected = [["tools/look.py", "3", "--flag", "a=b"], path, "__main__", str(checkout / "tools/look.py"), True, None]
    assert ours == f"{[*expected, None]}\n"


def test_a_patched_checkpoint_is_not_rebuilt_without_the_plugin(checkout: Path) -> None:
    model = build(checkout, stand_in.write_yaml(checkout / "model.yaml"), "arelu")
    stored = dict(model.yaml)
    _forget()
    sys.path.insert(0, str(checkout))
    try:
        from models.yolo import Model  # type: ignore[import-not-found]

        with pytest.raises(NameError, match="name 'rtdetr_act' is not defined"):
            Model(stored)
        assert unpatch_model(model) == stand_in.SITES
        assert [type(site.module) for site in find_sites(Model(model.yaml))] == [
            type(site.module) for site in find_sites(model)
        ]
    finally:
        sys.path.remove(str(checkout))


def train(checkout: Path, *words: str, act: str | None = None, **options: Any) -> tuple[Trained | None, dict[str, Any]]:
    """Run the training of a checkout; return what was trained, and its last checkpoint."""
    last = str(checkout / "last.pt")
    before = LambdaLR.__init__
    trained = run_script(checkout / "train.py", [*words, "--last", last], act, **options)
    assert LambdaLR.__init__ is before, "torch is as it was"
    return trained, torch.load(last, weights_only=False)


def test_slopes_are_trained_without_decay(checkout: Path) -> None:
    cfg = stand_in.write_yaml(checkout / "model.yaml", "prelu", ["arelu"])
    trained, saved = train(checkout, "--cfg", str(cfg), "--epochs", "2")
    assert trained is not None and trained.activations == {"prelu": 2, "arelu": 1}
    assert (trained.sites, trained.steps, trained.parameters) == (3, 4, 4)
    assert [each.quantity for each in trained.movements if each.max_change > 0] == ["alpha", "beta", "weight"]
    groups = saved["optimizer"]["param_groups"]
    # BatchNorm's weights and the slopes, convolutions, biases: as many groups as without the plugin.
    assert [(len(group["params"]), group.get("weight_decay", 0)) for group in groups] == [(7, 0), (4, 0.05), (4, 0)]
    assert len(list(find_scalar_and_channel_parameters(saved["model"]))) == 4


def test_their_learning_rate_is_scaled(checkout: Path) -> None:
    cfg = stand_in.write_yaml(checkout / "model.yaml")
    _, saved = train(checkout, "--cfg", str(cfg), act="arelu", act_lr=0.1)
    *_, last = saved["optimizer"]["param_groups"]
    assert (len(last["params"]), last["weight_decay"]) == (6, 0) and last["lr"] == pytest.approx(0.01)
    assert last["initial_lr"] == pytest.approx(0.01)


def test_a_further_learning_rate_gets_no_column_in_the_table_of_results() -> None:
    class Loggers:
        keys = ("loss", "x/lr0")

        def on_fit_epoch_end(self, vals: list[float], epoch: int) -> str:
            return "{},{},{}".format(epoch, *vals) if len(vals) == 2 else "a row that fails"

    module = ModuleType("utils.loggers")
    module.Loggers = Loggers  # type: ignore[attr-defined]
    hook_loggers(module)
    assert Loggers().on_fit_epoch_end([0.5, 0.1, 0.01], 3) == "3,0.5,0.1"


def test_what_is_resumed_and_fine_tuned_is_the_same_network(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = stand_in.write_yaml(checkout / "model.yaml", "mish", ["arelu"])
    _, first = train(checkout, "--cfg", str(cfg))
    for words, steps in ((["--resume", "--epochs", "3"], 4), (["--epochs", "1"], 2)):
        _forget()
        capsys.readouterr()
        trained, saved = train(checkout, "--weights", str(checkout / "last.pt"), *words)
        count = len(first["model"].state_dict())
        assert f"Transferred {count}/{count} items" in capsys.readouterr().out
        assert trained is not None and trained.steps == steps
        assert holds(saved["model"]) == holds(first["model"]) == ["arelu", "mish", "mish"]
        assert saved["model"].yaml == first["model"].yaml
        sizes = [[len(group["params"]) for group in each["optimizer"]["param_groups"]] for each in (first, saved)]
        assert sizes[0] == sizes[1]


def test_a_temperature_falls_with_the_epochs(checkout: Path) -> None:
    cfg = stand_in.write_yaml(checkout / "model.yaml")
    _, saved = train(checkout, "--cfg", str(cfg), "--epochs", "2", act="dyrelu_c(tau_start=30.0, tau_epochs=2)")
    for model in (saved["model"], saved["ema"]):
        (tau, *_) = {m.temperature() for m in model.float().modules() if isinstance(m, DyReLUC)}
        assert float(tau) == 20, "that of the second epoch of two, on the way from 30 to 10"
    _forget()
    _, saved = train(checkout, "--weights", str(checkout / "last.pt"), "--resume", "--epochs", "3")
    assert saved["model"].yaml["activation"] == "rtdetr_act.dyrelu_c"


def test_an_optimizer_that_lacks_slopes_is_not_used(checkout: Path) -> None:
    cfg = stand_in.write_yaml(checkout / "model.yaml")
    with pytest.raises(TrainingError, match="6 activation parameters would not train"):
        train(checkout, "--cfg", str(cfg), "--schedule", "0", act="arelu")


def test_activations_without_parameters_are_reported_too(checkout: Path) -> None:
    trained, _ = train(checkout, "--cfg", str(stand_in.write_yaml(checkout / "model.yaml")), act="mish")
    assert str(trained) == "trained with mish at 3 sites, which have nothing to learn, 2 optimizer steps"


def run_exec(*words: str, cwd: Path, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(rtdetr_act.__file__).parents[1])}
    command = [sys.executable, *before, "-m", "rtdetr_act", "exec", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.integration
def test_the_command_trains_and_says_so(yolov7: Path) -> None:
    stand_in.write_yaml(yolov7 / "model.yaml")
    done = run_exec("act=arelu", "--act-lr", "0.5", "train.py", "--cfg", "model.yaml", "--epochs", "1", cwd=yolov7)
    assert (done.returncode, done.stdout) == (0, "epoch 0\n")
    lines = done.stderr.splitlines()
    assert lines[:3] == [
        "rtdetr-act: 3 activations swapped: arelu (6 parameters)",
        "rtdetr-act: 6 activation parameters in the optimizer, without weight decay, their learning rate times 0.5",
        "rtdetr-act: trained with arelu at 3 sites, 2 optimizer steps",
    ]
    assert lines[3].startswith("rtdetr-act: arelu: alpha 0.9 -> ") and len(lines) == 5


@pytest.mark.integration
@pytest.mark.skipif(os.name == "nt", reason="torch for Windows has no launcher without libuv in every release")
def test_workers_train_one_network(yolov7: Path) -> None:
    stand_in.write_yaml(yolov7 / "model.yaml")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["act=arelu", "train.py", "--cfg", "model.yaml", "--last", "lastRANK.pt"]
    done = run_exec(*words, cwd=yolov7, before=launcher)
    assert done.returncode == 0 and done.stderr.count("trained with arelu at 3 sites") == 1, "the first worker tells"
    sys.path.insert(0, str(yolov7))
    try:
        first, second = (torch.load(yolov7 / f"last{i}.pt", weights_only=False)["model"] for i in range(2))
    finally:
        sys.path.remove(str(yolov7))
    mine, theirs = ([slope.item() for slope in find_scalar_and_channel_parameters(model)] for model in (first, second))
    assert mine == theirs and max(abs(alpha - 0.9) for alpha in mine[::2]) > 0.01


@pytest.mark.integration
def test_the_errors_of_a_script_are_its_own(yolov5: Path) -> None:
    code = """
        import warnings
        warnings.warn("careful")
        def fail():
            raise OSError(28, "No space left on device")
        fail()
    """
    stand_in.write_script(yolov5, "fail.py", code)
    done = run_exec("--", "fail.py", "--help", cwd=yolov5)
    plain = subprocess.run([sys.executable, "fail.py"], cwd=yolov5, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (plain.returncode, plain.stderr)
    assert "UserWarning: careful" in done.stderr and "in fail" in done.stderr


def test_a_script_that_cannot_be_read_says_where(yolov5: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = stand_in.write_script(yolov5, "broken.py", "def broken(:")
    with pytest.raises(SystemExit) as caught:
        get_command(app).commands["exec"].main([str(script)], standalone_mode=False)  # type: ignore[attr-defined]
    shown = capsys.readouterr().err
    assert caught.value.code == 1 and "SyntaxError" in shown and "rtdetr_act" not in shown


@pytest.mark.kill
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_an_interrupted_training_is_resumed(yolov5: Path) -> None:
    stand_in.write_yaml(yolov5 / "model.yaml", "arelu")
    done = run_exec("train.py", "--cfg", "model.yaml", "--epochs", "3", "--interrupt", "0", cwd=yolov5)
    assert (done.returncode, done.stdout) == (130, "epoch 0\n")
    assert done.stderr.splitlines()[-1] == "error: train.py was interrupted"
    trained, saved = train(yolov5, "--weights", str(yolov5 / "last.pt"), "--resume", "--epochs", "3")
    assert trained is not None and (trained.steps, saved["epoch"]) == (4, 2)
