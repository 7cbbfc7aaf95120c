"""Text for LaTeX: names escaped so that pdflatex prints them as they are."""

from __future__ import annotations

import textwrap
import unicodedata
from itertools import zip_longest

_LINE = 100  # characters
_SPECIAL = {
    **{char: rf"\{char}" for char in "&%$#_{}"},
    **{char: f"${char}$" for char in "<>|"},  # other signs in the default font encoding
    **{char: f"{{{char}}}" for char in "[]*"},  # after the end of a row, they would be its options
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\textasciigrave{}",
    '"': r"{\char`\"}",
    "\u00a0": "~",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "−": "$-$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "→": r"$\rightarrow$",
    "←": r"$\leftarrow$",
    "²": "$^2$",
    "³": "$^3$",
    "°": r"$^\circ$",
    "µ": r"$\mu$",
    "–": "{--}",
    "—": "{---}",
    "…": r"\dots{}",
    "‘": "`",
    "’": "'",
    "“": "{``}",
    "”": "{''}",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "ı": r"\i{}",
}
_ACCENTS = {
    **{"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": "."},
    **{"\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c"},
}
# Those that have a command: the others look like Latin letters.
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu "
    "nu xi pi rho sigma tau upsilon phi chi psi omega"
)
_GREEK_CAPITALS = "gamma delta theta lambda xi sigma pi phi psi omega"


def escape_latex(text: str) -> str:
    r"""Return text as ASCII that pdflatex prints as it is, in a table cell, a caption or a paragraph.

    Accents, Greek letters and common signs are LaTeX's own. Other characters outside of ASCII are given by their number
    in Unicode, since pdflatex has no letters for them without further packages.

    >>> print(escape_latex("dyrelu_b@backbone, 50 % ± 1 → α"))
    dyrelu\_b@backbone, 50 \% $\pm$ 1 $\rightarrow$ $\alpha$
    """
    composed = unicodedata.normalize("NFC", text)
    # Two hyphens, and two quotation marks, would become one sign.
    return "".join(
        _escape_character(char) + ("{}" if char == following and char in "-'" else "")
        for char, following in zip_longest(composed, composed[1:], fillvalue="")
    )


def allow_breaks(name: str) -> str:
    """Return an escaped name that may be broken after an underscore, an at sign, an equals sign and a parenthesis."""
    for sign in (r"\_", "@", "=", "("):
        name = name.replace(sign, rf"{sign}\allowbreak{{}}")
    return name


def wrap_latex(text: str) -> list[str]:
    """Return a paragraph as lines of a file."""
    return textwrap.wrap(text, _LINE, break_long_words=False, break_on_hyphens=False)


def _escape_character(char: str) -> str:
    """Return one character as LaTeX."""
    if char in _SPECIAL:
        return _SPECIAL[char]
    if char.isascii() and char.isprintable():
        return char
    if char.isspace():
        return " "
    return _escape_greek(char) or _escape_accent(char) or f"{{[}}U+{ord(char):04X}{{]}}"


def _escape_greek(char: str) -> str:
    """Return a Greek letter that LaTeX has a command for, or ""."""
    kind, _, name = unicodedata.name(char, "").removeprefix("GREEK ").partition(" LETTER ")
    letter = {"LAMDA": "lambda"}.get(name, name.lower())
    if kind == "SMALL" and letter in _GREEK.split():
        return rf"$\{letter}$"
    if kind == "CAPITAL" and letter in _GREEK_CAPITALS.split():
        return rf"$\{letter.capitalize()}$"
    return ""


def _escape_accent(char: str) -> str:
    """Return a Latin letter with an accent, or ""."""
    parts = unicodedata.normalize("NFD", char)
    if len(parts) != 2 or not (parts[0].isascii() and parts[0].isalpha()) or parts[1] not in _ACCENTS:
        return ""
    letter = rf"\{parts[0]}" if parts[0] in "ij" else parts[0]
    return rf"\{_ACCENTS[parts[1]]}{{{letter}}}"
