"""Lines of a log as systemd's journal takes them: sd-daemon(3), the level in front of each."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

_STANDARD_ERROR = 2
_LEVELS = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7


def goes_to_journal(environment: Mapping[str, str], descriptor: int = _STANDARD_ERROR) -> bool:
    """Whether `descriptor` is what the service manager connected with the journal, and not put elsewhere since."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}"


class JournalFormatter(logging.Formatter):
    """The message alone, for the journal has a clock of its own; a level before each of its lines."""

    def format(self, record: logging.LogRecord) -> str:
        level = next((level for lowest, level in _LEVELS if record.levelno >= lowest), _DEBUG)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).split("\n"))
