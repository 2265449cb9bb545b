"""What Lightning says, without what tells the user of a command nothing."""

import logging
import warnings

# Lines of Lightning that tell the user of a command nothing.
_LITTER = (
    "💡 Tip",
    "GPU available",
    "TPU available",
    "HPU available",
    "Loading `train_dataloader`",
    "Seed set to",
)


def quiet_lightning() -> None:
    """Leave out tips, other lines that tell the user of a command nothing, and where warnings come from."""
    warnings.formatwarning = _format_warning
    for name in ("fabric", "pytorch"):
        for ending in ("rank_zero", "seed"):
            logging.getLogger(f"lightning.{name}.utilities.{ending}").addFilter(_is_no_litter)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as a line: who passes flags does not look into the code that warns."""
    return f"warning: {message}\n"


def _is_no_litter(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LITTER)
