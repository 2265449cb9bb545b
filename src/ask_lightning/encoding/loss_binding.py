"""What a loss may hold of the model that is trained with it."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy

from ask_lightning.losses.base import RetrievalLoss


def check_loss(loss: RetrievalLoss, model: pl.LightningModule, ids: object) -> None:
    """Refuse a loss that a model cannot be trained with.

    Args:
        loss: Argument `loss` of `ASKModule`.
        model: Model to wrap.
        ids: Argument `ids` of `ASKModule`.

    Raises:
        TypeError: The loss is of another kind.
        ValueError: The loss needs ids and there are none, or it learns or reads what is not the model's.
    """
    if not isinstance(loss, RetrievalLoss):
        raise TypeError(
            f"Argument `loss` has to be a loss of ask_lightning.losses, but got {type(loss).__name__}."
        )
    if loss.needs_ids and ids is None:
        raise ValueError(
            f"Argument `ids` has to be given, because {type(loss).__name__} with these options compares "
            "clips: the batch's key of the clip ids, or a callable (model, batch)."
        )
    learned = {id(parameter) for parameter in model.parameters()}
    orphans = [name for name, parameter in loss.named_parameters() if id(parameter) not in learned]
    orphans += [name for name, value in loss.borrowed_parameters.items() if id(value) not in learned]
    for name in loss.closures:
        raise ValueError(
            f"Argument `{name}` of the loss has to be a callable (model) here, because one without "
            "arguments would go on to read this model's parameters in copies of the module: write `def "
            "tau(model): return 1 / model.logit_scale.exp()`, or name an attribute of the model."
        )
    if orphans:
        raise ValueError(
            f"Argument `loss` has parameters that are not the model's ({', '.join(orphans)}): its optimiser "
            "would not train them and checkpoints would not hold them. Make them attributes of the model."
        )


def check_borrowed_parameters(trainer: pl.Trainer, module: pl.LightningModule, loss: RetrievalLoss) -> None:
    """Refuse a loss that holds a parameter whose place another one has taken.

    FSDP2 and the materialisation of a model that was made on the meta device replace parameters; FSDP shows
    the values of its parameters under their names only.

    Args:
        trainer: Trainer at the start of training.
        module: Module that it trains.
        loss: Its loss.

    Raises:
        RuntimeError: A scalar of the loss is such a parameter.
    """
    learned = {id(parameter) for parameter in module.parameters()}
    for name, parameter in loss.borrowed_parameters.items():
        if id(parameter) not in learned or isinstance(trainer.strategy, FSDPStrategy):
            raise RuntimeError(
                f"Argument `{name}` of {type(loss).__name__} is a parameter that the model no longer has or "
                f"that {type(trainer.strategy).__name__} divides. Give the name under which the model has "
                f'it, {name}="...", or a function `def tau(model): ...` that reads it.'
            )
