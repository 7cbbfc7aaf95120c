"""Log messages through Ultralytics' logger."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def edited_log(edit: Callable[[str], str]) -> Iterator[None]:
    """Edit what Ultralytics logs inside the block, such as the names of temporary files.

    Args:
        edit: Returns the message to log in place of a message.
    """
    from ultralytics.utils import LOGGER

    def apply(record: logging.LogRecord) -> bool:
        record.msg, record.args = edit(record.getMessage()), None
        return True

    LOGGER.addFilter(apply)
    try:
        yield
    finally:
        LOGGER.removeFilter(apply)


@contextmanager
def log_level(level: int) -> Iterator[None]:
    """Set the level of Ultralytics' log inside the block, such as `logging.WARNING`, of which progress bars take note.

    Args:
        level: The level.
    """
    from ultralytics.utils import LOGGER

    before = LOGGER.level
    LOGGER.setLevel(level)
    try:
        yield
    finally:
        LOGGER.setLevel(before)


@contextmanager
def only_warnings(name: str) -> Iterator[None]:
    """Drop what another library's logger says below the level of a warning, inside the block."""

    def is_warning(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING

    logger = logging.getLogger(name)
    logger.addFilter(is_warning)  # a level would be set back when the library is imported
    try:
        yield
    finally:
        logger.removeFilter(is_warning)


def log(text: str, *, warn: bool = False) -> None:
    """Log a message through Ultralytics' logger.

    Args:
        text: The message.
        warn: Log it as a warning. Default: False.
    """
    from ultralytics.utils import LOGGER, colorstr

    (LOGGER.warning if warn else LOGGER.info)(f"{colorstr('rtdetr-act:')} {text}")
