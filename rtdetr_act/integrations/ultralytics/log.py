"""Log messages through Ultralytics' logger."""

from __future__ import annotations


def log(text: str, *, warn: bool = False) -> None:
    """Log a message through Ultralytics' logger.

    Args:
        text: The message.
        warn: Log it as a warning. Default: False.
    """
    from ultralytics.utils import LOGGER, colorstr

    (LOGGER.warning if warn else LOGGER.info)(f"{colorstr('rtdetr-act:')} {text}")
