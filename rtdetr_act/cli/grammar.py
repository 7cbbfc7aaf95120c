"""The grammar that all commands share: every option and every Ultralytics argument is `key=value` or `--key value`.

A bare word is the model, unless the command takes another kind of word. Words are translated into Click's options
before Click parses them, so that a command is an ordinary Typer function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from typer.core import TyperCommand

from rtdetr_act.cli.app import app
from rtdetr_act.cli.completion import WORDS, complete_word
from rtdetr_act.errors import InputError, quote, suggest
from rtdetr_act.spec import split_at_commas

_PAIR = re.compile(r"([A-Za-z_][\w-]*)=(.*)", re.DOTALL)
_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
# The parameters that take Ultralytics' arguments: these alone, or bare words too.
PAIRS, WORDS_AND_PAIRS = "pairs", "words"
# The parameter that takes a script and every word after it, which are the script's own and are not translated.
SCRIPT = "script"


def command(*examples: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of the application, with examples that end its `--help`.

    Args:
        *examples: Command lines without `rtdetr-act`.
        name: Name of the command. Default: None, that of the function.
    """
    return app.command(name, cls=Command, epilog="\n".join(examples))


_option_names: ContextVar[tuple[str, ...]] = ContextVar("option_names", default=())  # of the command that runs


def parse_pairs(pairs: list[str] | None, reserved: Iterable[str] = ()) -> dict[str, Any]:
    """Parse the words of a command that are Ultralytics' arguments, as `parse_arguments` does.

    For a key that is unknown, the options of the command are suggested too.
    """
    from rtdetr_act.integrations.ultralytics.arguments import parse_arguments

    return parse_arguments(pairs or [], reserved, suggestions=_option_names.get())


class Command(TyperCommand):
    """Command whose options are given as `key=value` too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Translate the words, then parse them."""
        if ctx.resilient_parsing:  # completion, which needs no values
            ctx.meta[WORDS] = list(args)
            return super().parse_args(ctx, [])
        translation = _Translation(self, ctx)
        _option_names.set(translation.names)
        return super().parse_args(ctx, translation.translate(args))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help: one line per option where there is room, and examples."""
        params: list[Any] = self.params
        options = [param for param in params if _is_option(param)]
        words = [param.metavar for param in params if not _is_option(param)]
        if not words:
            words = ["[MODEL]"] * any(param.name == "model" for param in options) + ["[key=value]…"]
        formatter.write_usage(ctx.command_path, " ".join(words))
        self.format_help_text(ctx, formatter)
        if options:
            with formatter.section("Options, as key=value or --key value"):
                formatter.write_dl([(_name(param), param.help or "") for param in options])
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.split("\n"):
                    formatter.write(f"  {ctx.command_path} {line}\n")

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete a word of a command that takes none but `key=value` and the model."""
        options = super().shell_complete(ctx, incomplete)
        if options or incomplete.startswith("-"):
            return options
        item = type(super().shell_complete(ctx, "--")[0])  # Click's class, or that of Typer's own copy of Click
        return [item(word) for word in complete_word(ctx, incomplete)]


def _name(option: Any) -> str:
    """Return the name of an option as its help shows it, such as `output, -o` or `int8`."""
    long = _key(max(option.opts, key=len))
    short = [each for each in option.opts if not each.startswith("--")]
    return ", ".join([long, *short])


def _key(option: str) -> str:
    """Return the key of an option such as `--act-lr`: `act_lr`."""
    return option.lstrip("-").replace("-", "_")


class _Translation:
    """Translation of the words of one command line into the options and arguments of its command."""

    def __init__(self, command: Any, ctx: Any) -> None:
        self.command = command.name
        params = command.get_params(ctx)
        self.options = {_key(opt): param for param in params if _is_option(param) for opt in param.opts}
        self.flags = {opt: param for param in params if _is_option(param) and param.is_flag
                      for opt in (*param.opts, *param.secondary_opts)}  # fmt: skip
        self.arguments = {param.name: param for param in params if not _is_option(param)}
        self.positional = next((name for name in self.arguments if name != PAIRS), None)
        self.takes_pairs = bool({PAIRS, WORDS_AND_PAIRS} & self.arguments.keys())
        self.takes_script = SCRIPT in self.arguments
        own = [param for param in dict.fromkeys(self.options.values()) if param.name != "help"]
        self.names = tuple(_key(max(param.opts, key=len)) for param in own)
        self.given: dict[str, str] = {}

    def translate(self, words: Sequence[str]) -> list[str]:
        """Return the command line that Click parses.

        Raises:
            InputError: An option is unknown, is given twice, or has no value or a wrong one.
        """
        found: list[str] = []
        rest = iter(words)
        for word in rest:
            if word == "--" and self.takes_script:
                return [*found, "--", *rest]
            if word == "--":
                found += [part for each in rest for part in self._translate_bare(each)]
            elif word in self.flags:
                found.append(word)
            elif word.startswith("--"):
                found += self._translate_option(word, rest)
            elif word.startswith("-") and len(word) > 1:
                if _key(word[:2]) not in self.options:
                    raise InputError(f"{self.command} has no option {quote(word)}{self._offer(word)}")
                found += self._translate_pair(_key(word[:2]), word[2:] or self._take_value(word, rest))
            elif match := _PAIR.fullmatch(word):
                found += self._translate_pair(_key(match[1]), match[2])
            elif self.takes_script:
                return [*found, "--", word, *rest]
            else:
                found += self._translate_bare(word)
        return found

    def _translate_option(self, word: str, rest: Iterator[str]) -> Iterator[str]:
        option, equals, value = word.partition("=")
        key = _key(option)
        if not (key in self.options or key in self.arguments or self.takes_pairs):
            raise InputError(f"{self.command} has no option {quote(option)}{self._offer(key)}")
        yield from self._translate_pair(key, value if equals else self._take_value(option, rest))

    def _take_value(self, option: str, rest: Iterator[str]) -> str:
        value = next(rest, None)
        if value is None or (value.startswith("--") and len(value) > 2):
            raise InputError(f"{option} needs a value: write {option} VALUE or {_key(option)}=VALUE")
        return value

    def _translate_pair(self, key: str, value: str) -> Iterator[str]:
        """Yield the words of Click for a key and its value."""
        param = self.options.get(key)
        if param is None and self.takes_pairs:
            yield f"{key}={value}"
        elif param is None and key in self.arguments:
            yield value
        elif param is None:
            raise InputError(f"{self.command} has no option {quote(key)}{self._offer(key)}")
        elif param.is_flag:
            if (truth := _TRUTH.get(value.lower())) is None:
                raise InputError(f"{key} is True or False, not {quote(value)}")
            if truth:
                yield param.opts[0]
            elif param.secondary_opts:
                yield param.secondary_opts[0]
        else:
            values = split_list(value) if param.multiple else [value]
            self._check_once(key, param, value)
            yield from (f"{max(param.opts, key=len)}={each}" for each in values)

    def _translate_bare(self, word: str) -> Iterator[str]:
        if self.positional is not None:
            yield word
        elif "model" in self.options:
            yield from self._translate_pair("model", word)
        else:
            raise InputError(f"{self.command} takes no word such as {quote(word)}{self._offer(word)}")

    def _check_once(self, key: str, param: Any, value: str) -> None:
        if not param.multiple and self.given.setdefault(param.name, value) != value:
            raise InputError(f"{self.command} takes one {key}, not {quote(self.given[param.name])} and {quote(value)}")

    def _offer(self, key: str) -> str:
        """Return what the command takes, with a suggestion if a key is close to one of its own."""
        return suggest(key, self.names) or f": it takes {', '.join(self.names) or 'none'}"


def _is_option(param: Any) -> bool:
    return bool(param.param_type_name == "option")


def split_list(text: str) -> list[str]:
    """Split a list such as `[a.yaml, b.yaml]`; any other text is a list of one.

    >>> split_list("[stock, 'leaky_relu(0.1)']"), split_list("arelu@backbone, silu")
    (['stock', 'leaky_relu(0.1)'], ['arelu@backbone, silu'])
    """
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    return [part.strip().strip("'\"") for part in split_at_commas(text[1:-1]) if part.strip()]
