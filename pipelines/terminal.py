"""Progress in a terminal: what the stages say, one plain line each, without Dagster's own events."""

from __future__ import annotations

import logging
import sys

import dagster as dg


class _Plain(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        meta = getattr(record, "dagster_meta", {})
        if meta.get("dagster_event") is not None:
            return
        step = meta.get("step_key") or ""
        sys.stdout.write(f"[{step}] {meta.get('orig_message', record.getMessage())}\n")
        sys.stdout.flush()


@dg.logger(description="One plain line per message of a stage.")
def terminal_logger(context: dg.InitLoggerContext) -> logging.Logger:
    logger = logging.Logger("onereward", level=logging.INFO)
    logger.addHandler(_Plain())
    return logger
