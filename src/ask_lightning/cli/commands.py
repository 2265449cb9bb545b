"""From a command line to LightningCLI: the composed config first, then the flags, which win."""

import json
import os
import warnings
from collections.abc import Sequence

from ask_lightning.cli.flags import Invocation
from ask_lightning.cli.training import RetrievalCLI
from ask_lightning.data.clips import Clip


def run_command(command: str, arguments: Sequence[str]) -> RetrievalCLI:
    """Run a command of LightningCLI.

    Args:
        command: `"fit"`, `"validate"`, `"test"`, `"predict"` or `"encode"`.
        arguments: What follows it.

    Returns:
        Model, data and trainer after the command.

    Raises:
        UsageError: The command line cannot be used.
    """
    return run_invocation(command, Invocation.parse(arguments))


def run_invocation(command: str, invocation: Invocation, held_out: Sequence[Clip] = ()) -> RetrievalCLI:
    """Run a command whose flags have been read.

    Args:
        command: See `run_command`.
        invocation: The flags.
        held_out: See `RetrievalCLI`.

    Returns:
        See `run_command`.
    """
    _hush()
    config = invocation.compose().config
    if command == "fit" and not {"--help", "-h"} & set(invocation.rest):
        invocation.check_run_is_new(config)
    given = [command]
    if config:
        given += ["--config", json.dumps(config)]
    if invocation.checkpoint is not None:
        given += ["--ckpt_path", invocation.checkpoint]
    return RetrievalCLI([*given, *invocation.rest], held_out)


def _hush() -> None:
    """Leave out what is no news to users."""
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated.*")
    # What Lightning calls of jsonargparse is not for users to change.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
