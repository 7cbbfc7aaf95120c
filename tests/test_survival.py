"""The promise of the package: a swap survives every path on which Ultralytics rebuilds, saves or loads a model.

Real runs of tiny models, and a look into what they saved. `tiny.count` finds activations by their class, not by what
the package says about itself.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from conftest import Data, Resumed, Run, train_and_watch
from torch import nn
from ultralytics import RTDETR, YOLO
from ultralytics.engine import trainer as engine_trainer
from ultralytics.engine.tuner import Tuner
from ultralytics.nn import tasks
from ultralytics.utils import dist

from rtdetr_act import default_act, patch_model, unpatch_model
from rtdetr_act.activations.acon import AconC
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.activations.prelu import PReLU
from rtdetr_act.errors import ModelError
from rtdetr_act.integrations.ultralytics import hooks
from rtdetr_act.integrations.ultralytics.configs import configs_folder
from rtdetr_act.integrations.ultralytics.hooks.replacing import replaced
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.plan import Plan

needs_in_memory_workers = pytest.mark.skipif(
    'state["model"]' not in inspect.getsource(inspect.unwrap(dist.generate_ddp_file)),
    reason="this Ultralytics gives DDP workers the model file only",
)
needs_multi_trainer = pytest.mark.skipif(
    not hasattr(engine_trainer, "MultiTrainer"), reason="this Ultralytics trains on one data set at a time"
)
needs_tuning_in_memory = pytest.mark.skipif(
    "model" not in inspect.signature(Tuner.__init__).parameters, reason="this Ultralytics tunes the model file only"
)
needs_safe_load = pytest.mark.skipif(
    not hasattr(tasks, "_SafeLoad"), reason="this Ultralytics has no ULTRALYTICS_SAFE_LOAD"
)


def assert_arelu_trained(model: nn.Module, sites: int, start: nn.Module | None = None) -> None:
    """Every AReLU is there, holds parameters of its own, and has left the values it started from."""
    assert tiny.count(model, AReLU) == sites
    stayed = []
    for name, module in model.named_modules():
        if isinstance(module, AReLU):
            before = start.get_submodule(name) if start else AReLU()
            pairs = ((module.alpha, before.alpha), (module.beta, before.beta))
            stayed += [name for now, then in pairs if now.item() == pytest.approx(then.item(), abs=1e-3)]
    assert stayed == []
    assert len({module.beta.item() for module in model.modules() if isinstance(module, AReLU)}) > sites // 2


def assert_plan(model: nn.Module, rules: list[dict]) -> None:
    """model.yaml holds these rules in the form on which Ultralytics alone stops, and rows that it can read."""
    assert Plan.from_yaml(model.yaml["activation"]).to_yaml()["rules"] == rules
    assert model.yaml["activation"].startswith("rtdetr_act.")
    assert {len(row) for row in model.yaml["backbone"] + model.yaml["head"]} == {4}


def assert_same(one: dict, other: dict) -> None:
    """Two state dicts are equal, key by key and bit by bit."""
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


# --- training -------------------------------------------------------------------------------------------------------


def test_stock_model_is_what_the_counts_say(stock_run: Run) -> None:
    model = tiny.load(stock_run.pt)
    relu = [m for _, m in model.named_modules(remove_duplicate=False) if type(m) is nn.ReLU]
    silu = [m for _, m in model.named_modules(remove_duplicate=False) if type(m) is nn.SiLU]
    # The four tokens sites with a ReLU are those of the decoder.
    assert (len(relu), len(silu)) == (tiny.CONV_SITES - tiny.SILU_SITES + tiny.TOKEN_SITES - 1, tiny.SILU_SITES)


def test_train_from_yaml_with_fifth_items(rows_run: Run) -> None:
    model = tiny.load(rows_run.pt)
    assert_arelu_trained(model, tiny.CONV_SITES - 4)  # the HGBlock of row 3 has four
    assert tiny.count(model.model[3], PReLU) == tiny.count(model, PReLU) == 4
    for name, module in model.model[3].named_modules():
        if isinstance(module, PReLU):
            assert not torch.allclose(module.weight, torch.tensor(0.25), atol=1e-3), name
    assert tiny.count(model.model[14], nn.GELU) == tiny.TOKEN_SITES - 1
    assert_plan(
        model,
        [
            {"activation": "arelu"},
            {"activation": "prelu", "layers": "3", "scope": "all"},
            {"activation": "gelu", "layers": "14", "scope": "all"},
        ],
    )


def test_train_after_patch_model_on_a_yaml_model(patched_run: Run) -> None:
    model = tiny.load(patched_run.pt)
    assert_arelu_trained(model, tiny.CONV_SITES)
    assert tiny.count(model, nn.SiLU) == 0
    assert_plan(model, [{"activation": "arelu"}])
    assert_arelu_trained(patched_run.model.float(), tiny.CONV_SITES)  # train() left the trained one in the object


def test_train_yolo_after_patch_model(mish_run: Run) -> None:
    model = tiny.load(mish_run.pt)
    assert (tiny.count(model, nn.Mish), tiny.count(model, nn.SiLU)) == (77, 0)
    assert_plan(model, [{"activation": "mish"}])


@pytest.mark.integration
def test_train_with_hidden_functional_sites(data: Data, tmp_path: Path) -> None:
    rows = [[-1, 1, "ResNetLayer", [3, 8, 1, True, 1]]]
    rows += [[-1, 1, "ResNetLayer", [c1, c2, 2, False, 2]] for c1, c2 in ((8, 4), (16, 4), (16, 8))]
    rows += [[-1, 1, "Conv", [16, 3, 2]]]
    head = [[[2, 3, 4], 1, "RTDETRDecoder", ["nc", 32, 20, 2, 2, 1, 64]]]
    model = RTDETR(str(tiny.write_yaml(tmp_path / "m.yaml", {"nc": 2, "backbone": rows, "head": head})))
    report = patch_model(model, "arelu", layers="0-3")
    # The stem's Conv, and in each of three layers of two blocks: two Conv with an activation and one F.relu.
    assert len(report) == 1 + 3 * 2 * 3
    trained = tiny.load(tiny.train(model, data.detect, tmp_path))
    assert_arelu_trained(trained, len(report))
    assert [m for m in trained.modules() if type(m).__name__ == "ResNetBlock" and type(m.act) is not AReLU] == []


def test_train_from_a_saved_patched_checkpoint(data: Data, patched_run: Run, tmp_path: Path) -> None:
    saved = tiny.load(patched_run.pt)
    model = RTDETR(str(patched_run.pt))
    start: dict = {}
    model.add_callback(
        "on_train_start", lambda t: start.update({k: v.clone() for k, v in t.model.state_dict().items()})
    )
    trained = tiny.load(tiny.train(model, data.detect, tmp_path))
    assert_same(start, saved.state_dict())  # activations included: they go on from what they had learned
    assert_arelu_trained(trained, tiny.CONV_SITES, saved)
    assert_plan(trained, [{"activation": "arelu"}])


def test_train_after_patching_a_stock_checkpoint(data: Data, stock_run: Run, tmp_path: Path) -> None:
    model = RTDETR(str(stock_run.pt))
    patch_model(model, "arelu@backbone, mish@neck")
    run = train_and_watch(model, data.detect, tmp_path)
    trained = tiny.load(run.pt)
    assert_same(run.start, tiny.outside(tiny.load(stock_run.pt)))
    assert_arelu_trained(trained, 21)
    assert tiny.count(trained, nn.Mish) == 4
    assert_plan(
        trained, [{"activation": "arelu", "sections": ["backbone"]}, {"activation": "mish", "sections": ["neck"]}]
    )


@pytest.mark.integration
def test_train_after_two_swaps_of_which_the_second_looks_at_the_first(
    data: Data, stock_yaml: Path, tmp_path: Path
) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, "mish@1+3, hardswish from=silu")
    patch_model(model, "arelu from=mish, prelu", replaces="hardswish")
    plan = {
        "rules": [{"activation": "arelu", "from": ["mish"]}, {"activation": "prelu", "from": ["hardswish"]}],
        "base": {"rules": [{"activation": "mish", "layers": "1+3"}, {"activation": "hardswish", "from": ["silu"]}]},
    }
    assert Plan.from_yaml(model.model.yaml["activation"]).to_yaml() == plan
    trained = tiny.load(tiny.train(model, data.detect, tmp_path))
    again = tiny.load(
        tiny.train(RTDETR(str(tmp_path / "run" / "weights" / "last.pt")), data.detect, tmp_path / "again")
    )
    rebuilt = tasks.RTDETRDetectionModel(copy.deepcopy(again.yaml), verbose=False)
    for network in (trained, again, rebuilt):
        assert Plan.from_yaml(network.yaml["activation"]).to_yaml() == plan
        assert tiny.count(network.model[1], AReLU) == tiny.count(network.model[3], AReLU) == 4
        assert tiny.count(network.model[10], PReLU) + tiny.count(network.model[13], PReLU) == tiny.SILU_SITES
        kinds = Counter(type(module) for _, module in network.named_modules(remove_duplicate=False))
        assert (kinds[nn.Mish], kinds[nn.Hardswish], kinds[nn.SiLU]) == (0, 0, 0)
        assert (kinds[AReLU], kinds[PReLU]) == (8, tiny.SILU_SITES)
        assert kinds[nn.ReLU] == tiny.CONV_SITES - 8 - tiny.SILU_SITES + tiny.TOKEN_SITES - 1
    assert_arelu_trained(trained, 8)
    assert_arelu_trained(again, 8, trained)
    rebuilt.load_state_dict(again.state_dict())


@pytest.mark.integration
def test_resume_without_a_checkpoint_trains_the_patched_network(data: Data, stock_yaml: Path, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, "arelu")
    trained = tiny.load(tiny.train(model, data.detect, tmp_path, resume=True))  # Ultralytics warns and starts anew
    assert_arelu_trained(trained, tiny.CONV_SITES)


@pytest.mark.skipif(
    "isinstance(pretrained, (str, Path))" not in inspect.getsource(inspect.unwrap(RTDETR.train)),
    reason="this Ultralytics takes no pretrained= for a model built from a YAML",
)
def test_patched_yaml_model_takes_the_pretrained_weights_of_a_settings_file(
    data: Data, stock_yaml: Path, stock_run: Run, tmp_path: Path
) -> None:
    settings = tiny.write_yaml(tmp_path / "settings.yaml", {"pretrained": str(stock_run.pt)})
    model = RTDETR(str(stock_yaml))
    patch_model(model, "arelu")
    run = train_and_watch(model, data.detect, tmp_path, cfg=str(settings))
    assert tiny.count(tiny.load(run.pt), AReLU) == tiny.CONV_SITES
    assert_same(run.start, tiny.outside(tiny.load(stock_run.pt)))


@pytest.mark.integration
def test_patch_again_before_training(data: Data, rows_yaml: Path, tmp_path: Path) -> None:
    model = RTDETR(str(rows_yaml))
    patch_model(model, "mish", scope="all")
    trained = tiny.load(tiny.train(model, data.detect, tmp_path))
    assert tiny.count(trained, nn.Mish) == tiny.CONV_SITES + tiny.TOKEN_SITES
    assert tiny.count(trained, AReLU) == tiny.count(trained, PReLU) == 0
    assert_plan(trained, [{"activation": "mish", "scope": "all"}])


@pytest.mark.integration
def test_default_act_models_train_patched(data: Data, stock_yaml: Path, tmp_path: Path) -> None:
    with default_act("arelu"):
        model = RTDETR(str(stock_yaml))
    trained = tiny.load(tiny.train(model, data.detect, tmp_path))
    assert_arelu_trained(trained, tiny.SILU_SITES)  # the other convolutions of RT-DETR name their own ReLU
    assert tiny.count(trained, nn.SiLU) == 0


@pytest.mark.integration
@pytest.mark.parametrize("task", list(tiny.YOLO_HEADS))
def test_task_is_guessed_and_trained_with_a_fifth_item_in_the_last_row(data: Data, task: str, tmp_path: Path) -> None:
    head = len(tiny.YOLO_BACKBONE)
    file = tiny.write_yaml(tmp_path / "odd-name.yaml", tiny.with_rows(tiny.yolo(task), {head: "arelu"}))
    model = YOLO(str(file))
    assert (model.task, tasks.guess_model_task(model.model)) == (task, task)
    sites = tiny.count(model.model, AReLU)
    assert sites > 0
    run = train_and_watch(model, data.of(task), tmp_path, optimizer="SGD", lr0=0.5)
    trained = tiny.load(run.pt)
    assert tiny.count(trained, AReLU) == tiny.count(trained.model[head], AReLU) == sites
    assert any(m.beta.item() != 2.0 for m in trained.modules() if isinstance(m, AReLU))
    assert YOLO(str(run.pt)).task == task


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_patched_runs_start_from_the_weights_of_the_stock_run(stock_run: Run, rows_run: Run, patched_run: Run) -> None:
    assert_same(rows_run.start, stock_run.start)
    assert_same(patched_run.start, stock_run.start)


@pytest.mark.parametrize("activation", ["arelu", "aconc", "dyrelu_c"])
def test_building_leaves_the_random_state_of_the_stock_build(activation: str) -> None:
    def build(model_yaml: dict) -> tuple[dict, torch.Tensor]:
        torch.manual_seed(5)
        model = tasks.RTDETRDetectionModel(copy.deepcopy(model_yaml), verbose=False)
        return tiny.outside(model), torch.get_rng_state()

    stock, state = build(tiny.RTDETR)
    patched, patched_state = build({**tiny.RTDETR, "activation": activation})
    inside = [key for key in stock if key not in patched]
    assert inside == []
    assert_same({key: patched[key] for key in stock}, stock)
    assert torch.equal(state, patched_state)


# --- copies and averages --------------------------------------------------------------------------------------------


def test_ema_averages_activations_of_its_own() -> None:
    from ultralytics.utils.torch_utils import ModelEMA

    model = tasks.RTDETRDetectionModel({**tiny.RTDETR, "activation": "arelu"}, verbose=False)
    ema = ModelEMA(model, decay=0.75, tau=1e-9)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AReLU):
                module.beta += 1
    ema.update(model)
    averages = [module.beta.item() for module in ema.ema.modules() if isinstance(module, AReLU)]
    assert averages == pytest.approx([0.75 * 2 + 0.25 * 3] * tiny.CONV_SITES)
    assert ema.ema.yaml == model.yaml


def test_deepcopy_has_activations_of_its_own_and_can_be_unpatched() -> None:
    model = tasks.RTDETRDetectionModel({**tiny.RTDETR, "activation": "arelu"}, verbose=False).eval()
    twin = copy.deepcopy(model)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(x)[0], twin(x)[0])
    with torch.no_grad():
        twin.model[0].stem1.act.beta += 1
    assert model.model[0].stem1.act.beta.item() == 2.0
    assert unpatch_model(twin) == tiny.CONV_SITES
    assert (tiny.count(twin, AReLU), tiny.count(model, AReLU)) == (0, tiny.CONV_SITES)


# --- resuming -------------------------------------------------------------------------------------------------------


def test_resume_after_a_kill(resumed: Resumed) -> None:
    assert (resumed.checkpoint["epoch"], resumed.start_epoch) == (0, 1)
    rows = (resumed.folder / "run" / "results.csv").read_text().splitlines()[1:]
    assert [int(float(row.split(",")[0])) for row in rows] == [1, 2, 3]
    model = tiny.load(resumed.folder / "run" / "weights" / "last.pt")
    assert tiny.count(model, AReLU) == tiny.CONV_SITES
    assert model.yaml["activation"] == "rtdetr_act.Plan({'rules': [{'activation': 'arelu'}], 'act_lr': 10.0})"
    before = resumed.checkpoint["ema"].float()
    went_on = [n for n, m in model.named_modules() if isinstance(m, AReLU) and m.alpha != before.get_submodule(n).alpha]
    assert len(went_on) > tiny.CONV_SITES // 2  # fp16 rounds the small steps of 8.3's long warm-up


def test_resumed_optimizer_has_the_groups_of_the_killed_one(resumed: Resumed) -> None:
    groups = [[group["count"], group["weight_decay"], group["initial_lr"]] for group in resumed.groups]
    assert groups == resumed.killed["groups"]
    assert resumed.groups[-1]["count"] == 2 * tiny.CONV_SITES


# --- undoing --------------------------------------------------------------------------------------------------------


def test_unpatched_yaml_model_trains_stock(data: Data, rows_yaml: Path, stock_run: Run, tmp_path: Path) -> None:
    model = RTDETR(str(rows_yaml))
    assert unpatch_model(model) == tiny.CONV_SITES + tiny.TOKEN_SITES - 1
    run = train_and_watch(model, data.detect, tmp_path)
    trained = tiny.load(run.pt)
    assert tiny.count(trained, AReLU) == tiny.count(trained, PReLU) == 0
    assert trained.yaml.get("activation") is None
    assert_same(run.start, stock_run.start)
    assert_same(trained.state_dict(), tiny.load(stock_run.pt).state_dict())  # the stock run, bit by bit


def test_unpatched_checkpoint_trains_stock(data: Data, patched_run: Run, tmp_path: Path) -> None:
    model = RTDETR(str(patched_run.pt))
    assert unpatch_model(model) == tiny.CONV_SITES
    run = train_and_watch(model, data.detect, tmp_path)
    trained = tiny.load(run.pt)
    assert tiny.count(trained, AReLU) == 0
    assert trained.yaml.get("activation") is None
    assert_same(run.start, tiny.outside(tiny.load(patched_run.pt)))


def test_remove_and_install_restore_and_hook_again() -> None:
    def hooked() -> list[tuple]:  # in an order of their own: that of the imports may differ
        return sorted(replaced, key=lambda entry: (entry[0].__name__, entry[1]))

    originals = hooked()
    assert (tasks, "parse_model") in [(owner, name) for owner, name, _ in originals]
    patched = {**tiny.RTDETR, "activation": "arelu"}
    try:
        hooks.remove()
        assert [getattr(owner, name) is original for owner, name, original in originals] == [True] * len(originals)
        assert tasks.parse_model.__module__ == "ultralytics.nn.tasks" and not hasattr(tasks.parse_model, "__wrapped__")
        with pytest.raises(NameError):  # Ultralytics evaluates the name
            tasks.RTDETRDetectionModel(copy.deepcopy(patched), verbose=False)
    finally:
        hooks.install()
    hooks.install()
    assert hooked() == originals
    assert not hasattr(tasks.parse_model.__wrapped__, "__wrapped__")  # hooked once
    model = tasks.RTDETRDetectionModel(copy.deepcopy(patched), verbose=False)
    assert tiny.count(model, AReLU) == tiny.CONV_SITES


# --- loading --------------------------------------------------------------------------------------------------------


def test_load_tells_what_was_transferred_outside_the_activations(stock_run: Run, rows_yaml: Path) -> None:
    stock = tiny.load(stock_run.pt)
    model = RTDETR(str(rows_yaml))
    with tiny.logged() as lines:
        model.load(str(stock_run.pt))
    total = len(stock.state_dict())
    assert [line for line in lines if f"{total} of {total} items outside the activations transferred" in line]
    assert_same(tiny.outside(model.model), stock.state_dict())


_WITHOUT_PLUGIN = """
import json, sys, traceback
import torch
from ultralytics import RTDETR, YOLO
from ultralytics.nn import tasks
from pathlib import Path

arguments = json.loads(Path(sys.argv[1]).read_text())
said = {}

def use(name, cls, file):
    model = cls(file)
    x = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        said[name] = {"output": model.model.float().eval()(x)[0].flatten()[:200].tolist()}
    said[name]["boxes"] = len(model.predict(arguments["image"], imgsz=64, conf=1e-6, device="cpu", verbose=False)[0])
    val = dict(data=arguments["data"], imgsz=64, batch=4, workers=0, device="cpu", plots=False, verbose=False)
    said[name]["fitness"] = float(model.val(**val, project=arguments["project"], name=name).fitness)
    kinds = [type(module).__name__ for module in model.model.modules()]
    said[name]["kinds"] = {kind: kinds.count(kind) for kind in ("AReLU", "Mish", "SiLU", "ReLU")}
    said[name]["plugin"] = "rtdetr_act" in sys.modules

def refuse(name, action):
    try:
        action()
        said[name] = None
    except Exception as error:
        said[name] = type(error).__name__ + ": " + str(error)
    said[name + " plugin"] = "rtdetr_act" in sys.modules

assert "rtdetr_act" not in sys.modules
use("mish", YOLO, arguments["mish"])
refuse("train a checkpoint", lambda: YOLO(arguments["mish"]).train(**arguments["train"]))
refuse("rebuild", lambda: type(YOLO(arguments["mish"]).model)(YOLO(arguments["mish"]).model.yaml, verbose=False))
refuse("rows", lambda: RTDETR(arguments["rows"]))
refuse("one row", lambda: RTDETR(arguments["one row"]))
refuse("name", lambda: RTDETR(arguments["name"]))
refuse("train our name", lambda: RTDETR(arguments["our name"]).train(**arguments["train"]))
refuse("shipped", lambda: YOLO(arguments["shipped"]))
refuse("shipped mixed", lambda: RTDETR(arguments["shipped mixed"]))
said["exported"] = YOLO(arguments["mish"]).export(format="torchscript", imgsz=64, device="cpu")
said["export plugin"] = "rtdetr_act" in sys.modules
use("arelu", RTDETR, arguments["arelu"])
Path(sys.argv[2]).write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def without_plugin(
    data: Data, mish_run: Run, patched_run: Run, rows_yaml: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict:
    """Say what a fresh process that never imports rtdetr_act does with patched checkpoints and YAML files."""
    folder = tmp_path_factory.mktemp("without_plugin")
    arguments = {
        "image": str(data.image),
        "data": str(data.detect),
        "project": str(folder),
        "mish": str(mish_run.pt),
        "arelu": str(patched_run.pt),
        "rows": str(rows_yaml),
        "one row": str(tiny.write_yaml(folder / "one.yaml", tiny.with_rows(tiny.RTDETR, {3: "mish"}))),
        "name": str(tiny.write_yaml(folder / "name.yaml", {**tiny.RTDETR, "activation": "mish"})),
        "our name": str(tiny.write_yaml(folder / "our.yaml", {**tiny.RTDETR, "activation": "rtdetr_act.mish"})),
        "shipped": str(configs_folder() / "yolo11-arelu.yaml"),
        "shipped mixed": str(configs_folder() / "rtdetr-n-mixed.yaml"),
        "train": tiny.train_args(data.detect, folder),
    }
    (folder / "args.json").write_text(json.dumps(arguments))
    done = tiny.run_python(_WITHOUT_PLUGIN, folder, folder / "args.json", folder / "said.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "said.json").read_text())


@pytest.mark.parametrize(("name", "kind", "sites"), [("mish", "Mish", 77), ("arelu", "AReLU", tiny.CONV_SITES)])
def test_val_and_predict_without_the_plugin(
    without_plugin: dict, name: str, kind: str, sites: int, mish_run: Run, patched_run: Run
) -> None:
    said = without_plugin[name]
    assert said["kinds"][kind] == sites
    assert said["boxes"] > 0
    assert said["plugin"] is (name == "arelu")  # unpickling our class imports us; torch's needs nobody
    model = tiny.load({"mish": mish_run, "arelu": patched_run}[name].pt).eval()
    x = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)[0].flatten()[:200]
    assert torch.allclose(torch.tensor(said["output"]), expected, atol=1e-3)


@pytest.mark.parametrize("action", ["train a checkpoint", "rebuild", "rows", "one row", "name"])
def test_rebuilding_without_the_plugin_fails(without_plugin: dict, action: str) -> None:
    assert without_plugin[f"{action} plugin"] is False
    assert without_plugin[action] is not None, "trained another network"


@pytest.mark.parametrize("action", ["train a checkpoint", "rebuild", "train our name", "shipped", "shipped mixed"])
def test_what_we_write_names_the_plugin_that_is_missing(without_plugin: dict, action: str) -> None:
    assert without_plugin[f"{action} plugin"] is False
    assert without_plugin[action] == "NameError: name 'rtdetr_act' is not defined"


def test_export_without_the_plugin(without_plugin: dict, mish_run: Run) -> None:
    assert without_plugin["export plugin"] is False
    model = tiny.load(mish_run.pt).eval()
    x = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        found = torch.jit.load(without_plugin["exported"])(x)
        found = found[0] if isinstance(found, tuple) else found
        assert torch.allclose(found, model(x)[0], atol=1e-2)  # BatchNorm is folded, and boxes are in pixels


_SAFE_LOAD = """
import json, sys
from pathlib import Path
if sys.argv[3] == "with":
    import rtdetr_act
from ultralytics import RTDETR, YOLO
from ultralytics.nn import tasks

arguments = json.loads(Path(sys.argv[1]).read_text())
assert tasks.SAFE_LOAD
said = {}

def attempt(name, action):
    try:
        said[name] = action()
    except Exception as error:
        said[name] = type(error).__name__ + ": " + str(error)

def kinds(model):
    names = [type(module).__name__ for module in model.modules()]
    return {name: names.count(name) for name in ("AReLU", "Mish", "SiLU", "PReLU")}

def train(cls, file):
    model = cls(file)
    model.train(**arguments["train"])
    return kinds(model.model)

attempt("load arelu", lambda: kinds(RTDETR(arguments["arelu"]).model))
attempt("load mish", lambda: kinds(YOLO(arguments["mish"]).model))
attempt("train mish", lambda: train(YOLO, arguments["mish"]))
attempt("build rows", lambda: kinds(RTDETR(arguments["rows"]).model))
attempt("build name", lambda: kinds(RTDETR(arguments["name"]).model))
attempt("train arelu", lambda: train(RTDETR, arguments["arelu"]))
Path(sys.argv[2]).write_text(json.dumps(said))
"""


@pytest.fixture(scope="module", params=["with", "without"])
def safe_load(
    request: pytest.FixtureRequest,
    data: Data,
    mish_run: Run,
    patched_run: Run,
    rows_yaml: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, dict]:
    """Say what a fresh process under ULTRALYTICS_SAFE_LOAD does, with and without an import of rtdetr_act."""
    folder = tmp_path_factory.mktemp("safe_load")
    arguments = {
        "mish": str(mish_run.pt),
        "arelu": str(patched_run.pt),
        "rows": str(rows_yaml),
        "name": str(tiny.write_yaml(folder / "name.yaml", {**tiny.RTDETR, "activation": "arelu"})),
        "train": tiny.train_args(data.detect, folder),
    }
    (folder / "args.json").write_text(json.dumps(arguments))
    files = (folder / "args.json", folder / "said.json", request.param)
    done = tiny.run_python(_SAFE_LOAD, folder, *files, ULTRALYTICS_SAFE_LOAD="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return request.param, json.loads((folder / "said.json").read_text())


@needs_safe_load
def test_safe_load(safe_load: tuple[str, dict]) -> None:
    plugin, said = safe_load
    mish = {"AReLU": 0, "Mish": 77, "SiLU": 0, "PReLU": 0}
    arelu = {"AReLU": tiny.CONV_SITES, "Mish": 0, "SiLU": 0, "PReLU": 0}
    rows = {"AReLU": tiny.CONV_SITES - 4, "Mish": 0, "SiLU": 0, "PReLU": 4}
    if plugin == "with":
        assert said == {
            "load arelu": arelu,
            "load mish": mish,
            "train mish": mish,
            "build rows": rows,
            "build name": arelu,
            "train arelu": arelu,
        }
    else:  # refused, every one; a checkpoint of torch's classes alone is still there to be used as it is
        assert said.pop("load mish") == mish
        assert [name for name, result in said.items() if not isinstance(result, str)] == []
        assert "outside the supported Ultralytics checkpoint format" in said["load arelu"]
        assert "unsupported activation 'rtdetr_act.mish'" in said["train mish"]


# --- other processes ------------------------------------------------------------------------------------------------


def assert_workers_agree(folder: Path) -> nn.Module:
    """Both workers of a DDP run hold the same parameters; return the network of the first."""
    one, two = (tiny.load(folder / "run" / f"rank{rank}.pt") for rank in (0, 1))
    assert_same(dict(one.named_parameters()), dict(two.named_parameters()))
    return one


@pytest.mark.integration
@pytest.mark.skipif(not needs_in_memory_workers.args[0], reason="workers get every model in memory: the next test")
def test_ddp_workers_train_a_yaml_model(data: Data, rows_yaml: Path, tmp_path: Path) -> None:
    from cpu_ddp import CpuDdpTrainer

    model = RTDETR(str(rows_yaml))
    model.train(trainer=CpuDdpTrainer, **tiny.train_args(data.detect, tmp_path))
    for trained in (assert_workers_agree(tmp_path), tiny.load(tmp_path / "run" / "weights" / "last.pt")):
        assert_arelu_trained(trained, tiny.CONV_SITES - 4)
        assert tiny.count(trained, PReLU) == 4
        assert tiny.count(trained.model[14], nn.GELU) == tiny.TOKEN_SITES - 1
    rows = (tmp_path / "run" / "activations.csv").read_text(encoding="utf-8").splitlines()
    # Before and after the one epoch, by one of the workers: two parameters of AReLU, one of PReLU.
    assert len(rows) == len(set(rows)) == 1 + 2 * (2 * (tiny.CONV_SITES - 4) + 4)


@pytest.mark.integration
@needs_in_memory_workers
def test_ddp_workers_train_a_model_patched_and_refitted_in_memory(data: Data, stock_yaml: Path, tmp_path: Path) -> None:
    from cpu_ddp import CpuDdpTrainer

    model = RTDETR(str(stock_yaml))
    patch_model(model, "mish@backbone")
    patch_model(model, "prelu from=mish, relu@neck", act_lr=0.5, init="match", memory="low")
    start = model.model.model[0].stem1.act.weight.clone()
    model.train(trainer=CpuDdpTrainer, **tiny.train_args(data.detect, tmp_path))
    # Only gradients pass between the workers once training has begun, and the first one alone does the fit of the
    # ReLUs that stand for SiLUs.
    for trained in (assert_workers_agree(tmp_path), tiny.load(tmp_path / "run" / "weights" / "last.pt")):
        assert tiny.count(trained, PReLU) == tiny.CONV_SITES - tiny.SILU_SITES
        assert tiny.count(trained, nn.SiLU) == 0
        assert not torch.allclose(trained.model[0].stem1.act.weight, start, atol=1e-3)
        rules = [{"activation": "prelu", "from": ["mish"]}, {"activation": "relu", "sections": ["neck"]}]
        assert_plan(trained, [{**rule, "init": "match"} for rule in rules])
        assert read_plan(trained).base == Plan.parse("mish@backbone")
        assert read_plan(trained).fitted and read_plan(trained).memory == "low"
    checkpoint = torch.load(tmp_path / "run" / "weights" / "last.pt", map_location="cpu", weights_only=False)
    groups = checkpoint["optimizer"]["param_groups"]  # built in a worker, by our hook there
    assert [len(group["params"]) for group in groups[3:]] == [tiny.CONV_SITES - tiny.SILU_SITES]
    rows = (tmp_path / "run" / "activations.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(set(rows)) == 1 + 2 * (tiny.CONV_SITES - tiny.SILU_SITES), "by one of the workers"


@pytest.mark.skipif(not needs_in_memory_workers.args[0], reason="this Ultralytics can train them")
def test_ddp_refuses_a_model_patched_in_memory(data: Data, stock_yaml: Path, tmp_path: Path) -> None:
    from cpu_ddp import CpuDdpTrainer

    model = RTDETR(str(stock_yaml))
    patch_model(model, "prelu")
    with pytest.raises(ModelError, match="model YAML"):
        model.train(trainer=CpuDdpTrainer, **tiny.train_args(data.detect, tmp_path))


@pytest.mark.integration
@needs_multi_trainer
def test_training_on_several_data_sets(data: Data, stock_yaml: Path, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, "prelu")
    starts: list[dict] = []  # Ultralytics stays in this process when there are callbacks
    model.add_callback("on_train_start", lambda trainer: starts.append(copy.deepcopy(trainer.model.state_dict())))
    weights = copy.deepcopy(model.model.state_dict())
    results = model.train(**{**tiny.train_args(data.detect, tmp_path), "data": [str(data.detect), str(data.other)]})
    assert sorted(results) == ["detect", "other"] and None not in results.values()
    for run, start in zip(model.trainer.trainers, starts, strict=True):
        trained = tiny.load(run.last)
        assert tiny.count(trained, PReLU) == tiny.CONV_SITES
        assert not torch.allclose(trained.model[0].stem1.act.weight, torch.tensor(0.25), atol=1e-3)
        assert_same(start, weights)  # "the same base weights seed each run"
    assert_same(model.model.state_dict(), weights)


@pytest.mark.integration
@needs_tuning_in_memory
def test_tune_trains_the_patched_network(data: Data, stock_yaml: Path, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, "prelu")
    model.tune(iterations=1, space={"momentum": (0.9, 0.95)}, **tiny.train_args(data.detect, tmp_path))
    checkpoints = sorted(tmp_path.rglob("weights/last.pt"))
    assert checkpoints
    for file in checkpoints:
        trained = tiny.load(file)
        assert tiny.count(trained, PReLU) == tiny.CONV_SITES
        assert not torch.allclose(trained.model[0].stem1.act.weight, torch.tensor(0.25), atol=1e-3)


@pytest.mark.skipif(not needs_tuning_in_memory.args[0], reason="this Ultralytics can tune them")
def test_tune_refuses_a_model_patched_in_memory(data: Data, stock_yaml: Path, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, "prelu")
    with pytest.raises(ModelError, match="tun"):
        model.tune(iterations=1, **tiny.train_args(data.detect, tmp_path))


def test_random_activations_differ_between_sites() -> None:
    model = tasks.RTDETRDetectionModel({**tiny.RTDETR, "activation": "aconc"}, verbose=False)
    assert tiny.count(model, AconC) == tiny.CONV_SITES
    starts = {module.p1[0].item() for module in model.modules() if isinstance(module, AconC)}
    assert len(starts) == tiny.CONV_SITES
