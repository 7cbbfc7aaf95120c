"""One grammar for all commands: every option in both spellings, help that fits a screen, and completion."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rtdetr_act.cli.completion import complete_act, complete_data, complete_model, complete_target
from rtdetr_act.cli.grammar import split_list
from rtdetr_act.cli.main import app
from rtdetr_act.cli.options import add_output, split_variants
from rtdetr_act.deploy.targets import TARGETS
from rtdetr_act.errors import RtdetrActError

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = [
    (name, option) for name, command in COMMANDS.items() for option in command.params if hasattr(option, "is_flag")
]


def parse(words: list[str]) -> dict[str, Any]:
    """Return what a command is called with."""
    name, *rest = words
    return COMMANDS[name].make_context(name, rest).params


def key_of(option: Any) -> str:
    return max(option.opts, key=len).lstrip("-").replace("-", "_")


@pytest.mark.parametrize(
    ("name", "option"), OPTIONS, ids=lambda value: value if isinstance(value, str) else key_of(value)
)
def test_an_option_is_the_same_in_every_spelling(name: str, option: Any) -> None:
    flag, value = max(option.opts, key=len), "7"  # a text and a number
    if option.is_flag:
        spellings = [[flag], [f"{flag}=True"], [f"{key_of(option)}=True"], [f"{key_of(option)}=1"]]
        spellings_off = [[f"{flag}=False"], [f"{key_of(option)}=false"], *([[each] for each in option.secondary_opts])]
        assert all(parse([name, *words])[option.name] is False for words in spellings_off)
        assert all(parse([name, *words])[option.name] is True for words in spellings)
        return
    spellings = [[f"{flag}={value}"], [f"{key_of(option)}={value}"], [f"{flag.lstrip('-')}={value}"]]
    spellings += [[each, value] for each in option.opts]
    first, *others = (parse([name, *words])[option.name] for words in spellings)
    assert first not in (None, option.default) and all(each == first for each in others)


@pytest.mark.parametrize(
    "name",
    [name for name, option in OPTIONS if key_of(option) == "model"],
)
def test_the_model_is_the_first_word_of_every_command(name: str) -> None:
    params = [parse([name, *words]) for words in (["a.pt"], ["model=a.pt"], ["--model", "a.pt"], ["--model=a.pt"])]
    if name == "study":  # whose first word may be a study file, which its content tells
        assert params[0]["words"] == ["a.pt"] and params[1]["model"] == ["a.pt"]
        params.pop(0)
    assert all(each == params[0] for each in params) and "a.pt" in str(params[0]["model"])


def test_arguments_of_ultralytics_have_both_spellings_too() -> None:
    words = ["train", "act=arelu", "model=a.pt", "epochs=3", "exist_ok=True", "lr0=-1"]
    same = ["train", "--epochs", "3", "--exist-ok=True", "--lr0", "-1", "--model", "a.pt", "--act", "arelu"]
    assert parse(words) == parse(same)
    assert parse(words)["pairs"] == ["epochs=3", "exist_ok=True", "lr0=-1"]


def test_lists_are_several_values() -> None:
    assert (
        parse(["bench", "a.pt", "b.pt"])["model"] == parse(["bench", "model=[a.pt, b.pt]"])["model"] == ["a.pt", "b.pt"]
    )
    assert split_list("['leaky_relu(0.1, True)', silu]") == ["leaky_relu(0.1, True)", "silu"]
    assert split_list("[]") == []


@pytest.mark.parametrize(
    ("values", "variants"),
    [
        (["arelu"], ["arelu"]),
        (["stock,arelu , mish"], ["stock", "arelu", "mish"]),
        (["leaky_relu(0.1, False),silu init=match"], ["leaky_relu(0.1, False)", "silu init=match"]),
        (["dyrelu_b@backbone, silu@neck"], ["dyrelu_b@backbone, silu@neck"]),
        (["arelu, silu@22-27", "mish"], ["arelu, silu@22-27", "mish"]),
        (["stock,arelu@backbone"], ["stock", "arelu@backbone"]),
        (["arelu, dynamic_conv"], ["arelu, dynamic_conv"]),
        ([""], [""]),
        (["arelu,"], ["arelu,"]),
    ],
)
def test_commas_separate_variants_where_a_plan_could_not_mean_both(values: list[str], variants: list[str]) -> None:
    assert split_variants(values) == variants


def test_from_becomes_part_of_each_plan() -> None:
    plans = split_variants(["stock,arelu", "mish@neck"], "silu, relu")
    assert plans == ["stock", "arelu from=silu+relu", "mish@neck from=silu+relu"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "a.yaml", "b.yaml"], "train takes one model, not 'a.yaml' and 'b.yaml'"),
        (["train", "model=a.yaml", "--model", "b.yaml"], "train takes one model, not 'a.yaml' and 'b.yaml'"),
        (["train", "act=relu", "acts=silu", "a.yaml"], "no argument 'acts'; did you mean 'act'?"),
        (["train", "--act"], "--act needs a value: write --act VALUE or act=VALUE"),
        (["train", "--act", "--data", "x"], "--act needs a value"),
        (["train", "-z"], "train has no option '-z'"),
        (["export", "a.pt", "int8=maybe"], "int8 is True or False, not 'maybe'"),
        (["sites", "a.yaml", "imgsz=64"], "sites has no option 'imgsz': it takes model, act,"),
        (["sites", "--acts", "mish"], "sites has no option '--acts'; did you mean 'act'?"),
        (["acts", "what"], "acts takes no word such as 'what'"),
        (["diagnose", "a.yaml", "images=many"], "invalid value for '--images'"),
        (["detect", "train"], "leave 'detect' out"),
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (
            ["train", "arelu", "data=shapes"],
            "'arelu' is not a model file: give a .yaml or a .pt; did you mean act=arelu?",
        ),
        (["train", "act=relu", "pretrained=yes"], "pretrained is a .pt checkpoint, True or False, not 'yes'"),
        (["plot"], "plot needs activations or a checkpoint"),
        (["plot", "silu", "best.pt"], "plot draws activations, or one checkpoint alone: rtdetr-act plot best.pt"),
        (["plot", "silu", "xlim=6,-6"], "xlim is two numbers, the lower one first, such as -6,6, not '6,-6'"),
        (["plot", "silu", "--ylim", "-1"], "ylim is two numbers, the lower one first, such as -6,6, not '-1'"),
        (["plot", "silu", "dpi=0"], "dpi is an integer from 1 to 1200"),
        (["plot", "silu", "-o", "x.png", "name=y"], "output= is project= and name= in one"),
        (["train", "act=relu", "-o", "x", "name=y"], "output= is project= and name= in one"),
        *(
            ([name], f"{name} needs ")
            for name in ("val", "predict", "export", "fold", "resume", "learned", "maps", "sites", "report")
        ),
    ],
)
def test_wrong_words_are_answered_in_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RtdetrActError) as caught:
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert sentence in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_its_examples_are_commands(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"})
    lines = result.output.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    examples = [shlex.split(line) for line in lines[lines.index("Examples:") + 1 :] if line.strip()]
    assert len(examples) == 2
    for program, command, *words in examples:
        assert (program, command) == ("rtdetr-act", name)
        parse([command, *(words[: words.index(">")] if ">" in words else words)])
    shown = {line.split()[0].rstrip(",") for line in lines[: lines.index("Examples:")] if line.startswith("  ")}
    assert {key_of(option) for command, option in OPTIONS if command == name} <= shown


def test_results_go_to_a_new_folder_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in ([], [], ["name=mine"], ["project=papers"], ["-o", "here.svg"]):
        CliRunner().invoke(app, ["plot", "silu", *words], catch_exceptions=False)
    first, second, third, fourth = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("curves.png"))
    assert str(first.parent.parent) == "papers" and third.parent.name == "plot"
    assert second.parent.name == "mine" and fourth.parent.name.strip("-2") == "plot"
    assert (tmp_path / "here.svg").is_file()
    with pytest.raises(RtdetrActError):
        CliRunner().invoke(app, ["plot", "silu", "sliu"], catch_exceptions=False)
    assert len(list((tmp_path / "runs").iterdir())) == 3, "what fails leaves no folder"


def test_output_is_project_and_name_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments: dict[str, Any] = {"epochs": 1}
    add_output(arguments, Path("papers/first"))
    assert arguments == {"epochs": 1, "project": str(tmp_path / "papers"), "name": "first"}
    add_output(arguments, None)
    assert arguments["name"] == "first"


def test_completion_offers_activations_models_and_data() -> None:
    assert complete_act("dyr") == ["dyrelu_a", "dyrelu_b", "dyrelu_c"]
    assert complete_act("stock,are") == ["stock,arelu"]
    assert complete_act("dyrelu_b@backbone, sil") == ["dyrelu_b@backbone, silu"]
    assert {"rtdetr-l.yaml", "rtdetr-l-arelu.yaml"} <= set(complete_model("rtdetr-l"))
    assert complete_data("coco8.") == ["coco8.yaml"] and "shapes" in complete_data("")
    assert complete_target("") == sorted(TARGETS)


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("bash") is None or os.name == "nt", reason="needs Bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train act=dyr", ["dyrelu_a", "dyrelu_b", "dyrelu_c"]),
        ("train --act dyr", ["dyrelu_a", "dyrelu_b", "dyrelu_c"]),
        ("train rtdetr-l-are", ["rtdetr-l-arelu.yaml"]),
        ("train data=coco8.", ["coco8.yaml"]),
        ("acts for=rk", ["rknn"]),
        ("plot arelu mis", ["mish"]),
        ("sites rtdetr-l-mixe", ["rtdetr-l-mixed.yaml"]),
        ("tra", ["train"]),
    ],
)
def test_bash_completes(line: str, expected: list[str], tmp_path: Path) -> None:
    program = tmp_path / "rtdetr-act"
    program.write_text(f"#!{sys.executable}\nfrom rtdetr_act.cli.main import main\nmain()\n")
    program.chmod(0o755)
    # As Bash calls it: words are split at "=", since that is one of COMP_WORDBREAKS.
    words = shlex.split(f"rtdetr-act {line}".replace("=", " = "))
    script = f"""
    eval "$(rtdetr-act --show-completion bash)"
    COMP_WORDS=({" ".join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}
    _rtdetr_act_completion rtdetr-act; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == expected, result.stderr
