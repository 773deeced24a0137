"""Progress in a terminal: what the stages say, one plain line each, without Dagster's events and the libraries' own bars."""

from __future__ import annotations

import logging
import sys
import warnings

import dagster as dg

SKIPPED = "Dependencies for step"  # Dagster says so of every step below a failed one


class _Plain(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        meta = getattr(record, "dagster_meta", {})
        message = meta.get("orig_message", record.getMessage())
        if meta.get("dagster_event") is not None or message.startswith(SKIPPED):
            return
        sys.stdout.write(f"[{meta.get('step_key') or 'run'}] {message}\n")
        sys.stdout.flush()


@dg.logger(None, description="One plain line per message of a stage.")
def terminal_logger(context: dg.InitLoggerContext) -> logging.Logger:
    logger = logging.Logger("onereward", level=logging.INFO)
    logger.addHandler(_Plain())
    return logger


def quieten() -> None:
    """Keep the libraries' loading bars and advice out of the terminal; their errors stay."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # names every torchvision operator that is not there
    warnings.filterwarnings("ignore", category=FutureWarning)
