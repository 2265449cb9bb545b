"""`ASKModule`: a LightningModule around the user's, which trains it with the ASK loss."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.hooks import DataHooks, ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from ask_lightning.callbacks.refresh import KnowledgeRefreshCallback
from ask_lightning.encoding.compatibility import check_model, check_trainer
from ask_lightning.encoding.outputs import as_embeddings
from ask_lightning.losses.reliability_ot import Ids, ReliabilityOTLoss

Encoder = str | Callable[[pl.LightningModule, Any], Tensor]
Step = Literal["auto", "capture", "encode"]

# Where a checkpoint keeps what belongs to ASK and not to the user's model.
CHECKPOINT_KEY = "ask_lightning"

# Hooks that the wrapper has itself, because it adds to what the model's own does.
_OWN_HOOKS = {"setup"}
_STEPS_AND_OPTIMIZERS = {
    "validation_step",
    "test_step",
    "predict_step",
    "configure_callbacks",
    "configure_optimizers",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "backward",
}


def _hook_names() -> set[str]:
    bases = (ModelHooks, DataHooks)
    named = {name for base in bases for name, value in vars(base).items() if inspect.isfunction(value)}
    return {name for name in named | _STEPS_AND_OPTIMIZERS if not name.startswith("_")} - _OWN_HOOKS


def _shared(name: str) -> Any:
    """An attribute of every LightningModule that wrapper and model have in common: the model's."""

    def read(self: ASKModule) -> Any:
        return getattr(self.model, name)

    def write(self: ASKModule, value: Any) -> None:
        # LightningModule's constructor writes defaults before there is a model.
        if (model := _model_of(self)) is not None:
            setattr(model, name, value)

    return property(read, write)


def _model_of(wrapper: nn.Module) -> pl.LightningModule | None:
    # Through __dict__, because it is asked for while the wrapper is being built or unpickled.
    return wrapper.__dict__.get("_modules", {}).get("model")  # type: ignore[no-any-return]


class ASKModule(pl.LightningModule):
    """Trains any audio–text retrieval model with ASK, without an edit to the model.

    The model's hooks, logs, optimisers, schedules, hyper-parameters and loops are its own; only the loss
    of its training step is another. Attributes that the wrapper does not have are read from and written
    to the model, so callbacks that were written for it go on working. Checkpoints have the model's keys
    and load in its class without this library.

    Requirements:
        `KnowledgeRefreshCallback` among the trainer's callbacks, or a base of your own in
        `loss.knowledge`.

    Args:
        model: The retrieval model; `.model` afterwards, untouched.
        loss: The loss; default `ReliabilityOTLoss()` with the paper's settings.
        audio: Name of the model's method that takes a batch and returns audio embeddings `(B, d)`, or a
            callable `(model, batch)`. A `transformers` output with a `pooler_output` is taken as that.
        text: The same for text embeddings.
        ids: Key of the batch (a mapping) under which clip ids are, or a callable `(model, batch)`. Needed
            by `exclude_self` and `positives="ids"`.
        step: `"capture"` runs the model's own `training_step`, takes the embeddings that its audio and
            text methods returned inside it, and replaces the loss that it returned: its schedules, logs
            and side effects stay. `"encode"` calls only the two methods. `"auto"`: capture if the model
            has a `training_step`, else encode.
        criterion: Name of the attribute that the model's `training_step` calls as
            `self.criterion(audio, text)`; it is replaced while the step runs, for a step that adds other
            losses to the contrastive one.

    Raises:
        TypeError: `model` is no `lightning.pytorch` module, `loss` no `ReliabilityOTLoss`.
        ValueError: A method, attribute or id that an option needs is missing.

    Examples:
        >>> class Retriever(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.audio, self.text = nn.Linear(8, 4), nn.Linear(6, 4)
        ...     def encode_audio(self, batch):
        ...         return self.audio(batch["audio"])
        ...     def encode_text(self, batch):
        ...         return self.text(batch["text"])
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters(), lr=1e-3)
        >>> ASKModule(Retriever()).step
        'encode'
    """

    _current_fx_name = _shared("_current_fx_name")
    _hparams = _shared("_hparams")
    _hparams_initial = _shared("_hparams_initial")
    _log_hyperparams = _shared("_log_hyperparams")
    _example_input_array = _shared("_example_input_array")
    _automatic_optimization = _shared("_automatic_optimization")
    _strict_loading = _shared("_strict_loading")
    prepare_data_per_node = _shared("prepare_data_per_node")
    allow_zero_length_dataloader_with_multiple_devices = _shared(
        "allow_zero_length_dataloader_with_multiple_devices"
    )

    def __init__(
        self,
        model: pl.LightningModule,
        loss: ReliabilityOTLoss | None = None,
        *,
        audio: Encoder = "encode_audio",
        text: Encoder = "encode_text",
        ids: Encoder | None = None,
        step: Step = "auto",
        criterion: str | None = None,
    ) -> None:
        super().__init__()
        check_model(model)
        loss = ReliabilityOTLoss() if loss is None else loss
        _check_loss(loss, model, ids)
        _check_encoder("audio", audio, model)
        _check_encoder("text", text, model)
        self._audio, self._text, self._ids = audio, text, ids
        self._criterion = criterion
        self.step = _choose_step(step, criterion, audio, text, model)
        self.loss = loss
        # Last, because from here on attributes that the model has are set on the model.
        self.model = model
        self._bind_hooks()
        # A module that holds this one loads it through its submodules, not through `load_state_dict`.
        self.register_load_state_dict_pre_hook(_add_wrapper)  # type: ignore[no-untyped-call]

    def _bind_hooks(self) -> None:
        """Take over the hooks that the model overrides, and no others.

        Lightning calls hooks of its own module only and decides by what is overridden how it trains, so
        they are bound to this instance one by one.
        """
        for name in sorted(_hook_names()):
            if not is_overridden(name, self.model):
                continue
            hook = getattr(self.model, name)
            if _takes_arguments_of(hook, getattr(pl.LightningModule, name)):
                self.__dict__[name] = hook
            else:
                rank_zero_info(
                    f"{type(self.model).__name__}.{name}{inspect.signature(hook)} shares its name with a "
                    "Lightning hook, but cannot take the hook's arguments; it stays the model's own."
                )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Protocols such as `__deepcopy__` are looked up on instances; the model's would make a model.
            if (model := _model_of(self)) is None or _is_dunder(name):
                raise
            return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        model = _model_of(self)
        own = name in self.__dict__ or name in self.__dict__.get("_modules", ()) or hasattr(type(self), name)
        # What is new and public is a callback's message to the model.
        if model is None or own or (name.startswith("_") and not hasattr(model, name)):
            super().__setattr__(name, value)
        else:
            setattr(model, name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, which may leave weights out."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model.load_state_dict(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(*args, **kwargs)

    def training_step(self, batch: Any, *args: Any) -> Any:
        """One step of training: the model's, with the ASK loss in place of the contrastive one."""
        if self.step == "encode":
            audio, text, ids = self.embed_pairs(batch)
            return self.loss(audio, text, ids=ids)
        if not is_param_in_hook_signature(self.model.training_step, "batch_idx", min_args=2):
            args = ()
        if self.step == "criterion":
            return self._step_with_criterion(batch, *args)
        return self._step_with_capture(batch, *args)

    def _step_with_capture(self, batch: Any, *args: Any) -> Any:
        outputs: dict[str, list[Any]] = {str(self._audio): [], str(self._text): []}
        recorders = {name: _recording(getattr(self.model, name), record) for name, record in outputs.items()}
        with _shadowing(self.model, recorders):
            result = self.model.training_step(batch, *args)
        if result is None:  # Lightning's way to skip a batch
            return None
        for name, record in outputs.items():
            if len(record) != 1:
                raise RuntimeError(
                    f'step="capture" needs `{type(self.model).__name__}.training_step` to call '
                    f"`self.{name}` once, but it was called {len(record)} times. Use ASKModule(..., "
                    'step="encode"), which calls both methods itself and leaves `training_step` out.'
                )
        (audio,), (text,) = outputs.values()
        loss = self.loss(
            as_embeddings(audio, str(self._audio)),
            as_embeddings(text, str(self._text)),
            ids=self._ids_of(batch),
        )
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _step_with_criterion(self, batch: Any, *args: Any) -> Any:
        assert self._criterion is not None
        calls = 0

        def criterion(*embeddings: Tensor, **named: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if len(embeddings) != 2 or named:
                raise TypeError(
                    f"`self.{self._criterion}` was called with {len(embeddings)} positional and "
                    f"{sorted(named) or 'no'} named arguments, but ASKModule(..., criterion="
                    f'"{self._criterion}") can replace only a call with (audio, text). Use step="capture".'
                )
            return self.loss(*embeddings, ids=self._ids_of(batch))  # type: ignore[no-any-return]

        with _shadowing(self.model, {self._criterion: criterion}):
            result = self.model.training_step(batch, *args)
        if calls != 1 and result is not None:
            raise RuntimeError(
                f"ASKModule(..., criterion={self._criterion!r}) needs `{type(self.model).__name__}."
                f"training_step` to call `self.{self._criterion}(audio, text)` once, but it was called "
                f'{calls} times. Use step="capture" or step="encode" without `criterion`.'
            )
        return result

    def embed_pairs(self, batch: Any) -> tuple[Tensor, Tensor, Ids | None]:
        """Audio embeddings `(B, d)`, text embeddings `(B, d)` and clip ids of a batch."""
        audio, text = (
            as_embeddings(self._call(encoder, batch), _name(encoder)) for encoder in (self._audio, self._text)
        )
        return audio, text, self._ids_of(batch)

    def _call(self, encoder: Encoder, batch: Any) -> Any:
        if isinstance(encoder, str):
            return getattr(self.model, encoder)(batch)
        return encoder(self.model, batch)

    def _ids_of(self, batch: Any) -> Ids | None:
        if self._ids is None:
            return None
        if not isinstance(self._ids, str):
            return self._ids(self.model, batch)
        try:
            return batch[self._ids]  # type: ignore[no-any-return]
        except (KeyError, TypeError, IndexError) as error:
            keys = sorted(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(
                f"Argument `ids` has to be a key of the batch or a callable (model, batch), but got "
                f"{self._ids!r} and the batch is {keys}."
            ) from error

    def setup(self, stage: str) -> None:
        """Checks that ASK can train here, then the model's own setup."""
        if stage == "fit":
            check_trainer(self.trainer, self.model)
            refreshed = any(isinstance(item, KnowledgeRefreshCallback) for item in self.trainer.callbacks)  # type: ignore[attr-defined]
            if not refreshed and self.loss.knowledge is None:
                raise RuntimeError(
                    "ASKModule has no knowledge to learn from. Add the callback that builds and renews it: "
                    "Trainer(..., callbacks=[KnowledgeRefreshCallback(T=15)]), or set "
                    "`loss.knowledge` to a KnowledgeBase that shall stay as it is."
                )
        self.model.setup(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The model's own, then the loss's options under a key of their own."""
        self.model.on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY] = {"loss": self.loss.options}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The model's own; a warning where the loss resumes with other options."""
        stored = checkpoint.get(CHECKPOINT_KEY, {}).get("loss", {})
        changed = [
            f"{name} {value!r} → {self.loss.options[name]!r}"
            for name, value in stored.items()
            if name in self.loss.options and _lasting(value) != _lasting(self.loss.options[name])
        ]
        if changed:
            rank_zero_warn(f"The checkpoint was trained with other loss options: {', '.join(changed)}.")
        self.model.on_load_checkpoint(checkpoint)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        model: pl.LightningModule,
        loss: ReliabilityOTLoss | None = None,
        *,
        map_location: Any = None,
        strict: bool | None = None,
        weights_only: bool = True,
        **options: Any,
    ) -> ASKModule:
        """A wrapped model with the weights of a checkpoint.

        Args:
            checkpoint_path: A checkpoint of `Trainer`, with or without ASK.
            model: A fresh model of the class that was trained.
            loss: Default: one with the options in the checkpoint.
            map_location: As in `torch.load`.
            strict: Whether the weights' names have to match; default the model's `strict_loading`.
            weights_only: As in `torch.load`; `False` only for files that you trust.
            options: `audio`, `text`, `ids`, `step`, `criterion` as for `ASKModule`.

        Returns:
            The wrapped model. Knowledge is rebuilt when training resumes.

        Raises:
            ValueError: The loss had options that a file cannot hold and `loss` is not given.
        """
        checkpoint = torch.load(checkpoint_path, map_location=map_location, weights_only=weights_only)
        if loss is None and CHECKPOINT_KEY in checkpoint:
            loss = ReliabilityOTLoss.from_options(checkpoint[CHECKPOINT_KEY]["loss"])
        wrapped = cls(model, loss, **options)
        if is_overridden("configure_model", wrapped):
            wrapped.configure_model()
        wrapped.on_load_checkpoint(checkpoint)
        strict = wrapped.strict_loading if strict is None else strict
        wrapped.load_state_dict(checkpoint["state_dict"], strict=strict)
        return wrapped


def _name(encoder: Encoder) -> str:
    return encoder if isinstance(encoder, str) else getattr(encoder, "__name__", repr(encoder))


class _StandIn:
    """Called in place of a method or submodule of the model, and that one in everything else."""

    def __init__(self, original: Any, call: Callable[..., Any]) -> None:
        vars(self).update(_original=original, _call=call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)


def _lasting(option: Any) -> Any:
    """An option without the memory address that is part of a function's representation."""
    return re.sub(r" at 0x[0-9a-f]+", "", option) if isinstance(option, str) else option


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _recording(method: Callable[..., Any], record: list[Any]) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        record.append(output)
        return output

    return recorded


@contextmanager
def _shadowing(model: nn.Module, replacements: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Put functions in place of a model's methods or submodules for a while.

    Entries of the instance's `__dict__` are found before methods of its class and before registered
    submodules, so nothing of the model is overwritten.
    """
    before = {name: vars(model)[name] for name in replacements if name in vars(model)}
    vars(model).update({name: _StandIn(getattr(model, name), call) for name, call in replacements.items()})
    try:
        yield
    finally:
        for name in replacements:
            del vars(model)[name]
        vars(model).update(before)


def _takes_arguments_of(hook: Callable[..., Any], base: Callable[..., Any]) -> bool:
    """Whether a method can be called as Lightning calls the hook of that name."""
    expected = list(inspect.signature(base).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in expected):
        return True
    required = [parameter for parameter in expected if parameter.default is parameter.empty]
    signature = inspect.signature(hook)
    for count in {len(expected), len(required)}:
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        return True
    return False


def _choose_step(
    step: Step, criterion: str | None, audio: Encoder, text: Encoder, model: pl.LightningModule
) -> Literal["capture", "encode", "criterion"]:
    if step not in get_args(Step):
        raise ValueError(f"Argument `step` has to be one of {get_args(Step)}, but got {step!r}.")
    name, has_step = type(model).__name__, is_overridden("training_step", model)
    if criterion is not None:
        if step != "auto":
            raise ValueError(
                f"Arguments `step` and `criterion` exclude each other, but got {step!r} and {criterion!r}. "
                "Leave one out."
            )
        if not has_step or not callable(getattr(model, criterion, None)):
            raise ValueError(
                f"Argument `criterion` has to name something that {name}.training_step calls, but {name} has "
                f"no {'callable ' + repr(criterion) if has_step else 'training_step'}."
            )
        return "criterion"
    if step == "encode" or (step == "auto" and not has_step):
        return "encode"
    if not has_step:
        raise ValueError(f'step="capture" needs a training_step, but {name} has none. Use step="encode".')
    if not (isinstance(audio, str) and isinstance(text, str)):
        raise ValueError(
            'step="capture" records what methods of the model return inside its training_step, so `audio` '
            f"and `text` have to be method names, but got {_name(audio)} and {_name(text)}. "
            'Name methods, or use step="encode".'
        )
    if is_param_in_hook_signature(model.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{name}.training_step takes `dataloader_iter` and fetches batches itself, which cannot be "
            'captured. Use step="encode".'
        )
    return "capture"


def _check_encoder(argument: str, encoder: Encoder, model: pl.LightningModule) -> None:
    if callable(encoder) or callable(getattr(model, encoder, None)):
        return
    raise ValueError(
        f"Argument `{argument}` has to name a method of {type(model).__name__} that takes a batch, but it "
        f"has no method {encoder!r}. Name another one or pass a callable (model, batch)."
    )


def _check_loss(loss: ReliabilityOTLoss, model: pl.LightningModule, ids: object) -> None:
    if not isinstance(loss, ReliabilityOTLoss):
        raise TypeError(f"Argument `loss` has to be a ReliabilityOTLoss, but got {type(loss).__name__}.")
    if loss.needs_ids and ids is None:
        raise ValueError(
            'Argument `ids` has to be given, because the loss has `exclude_self=True` or `positives="ids"`: '
            "the batch's key of the clip ids, or a callable (model, batch)."
        )
    learned = {id(parameter) for parameter in model.parameters()}
    orphans = [name for name, parameter in loss.named_parameters() if id(parameter) not in learned]
    if isinstance(loss.temperature, nn.Parameter) and id(loss.temperature) not in learned:
        orphans.append("temperature")
    if orphans:
        raise ValueError(
            f"Argument `loss` has parameters that are not the model's ({', '.join(orphans)}): its optimiser "
            "would not train them and checkpoints would not hold them. Make them attributes of the model."
        )


def _add_wrapper(wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Name the weights as the submodules do, before they are handed down to them."""
    stored = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    # All at once: the model may have a submodule that is called `model` as well.
    state_dict.update({f"{prefix}model.{key[len(prefix) :]}": value for key, value in stored.items()})
    assert isinstance(wrapper, ASKModule)
    for key, value in wrapper.loss.state_dict().items():
        state_dict[f"{prefix}loss.{key}"] = value
