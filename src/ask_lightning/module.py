"""`ASKModule`: a LightningModule around the user's, which trains it with the ASK loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from ask_lightning.callbacks.known_clips import KnownClips
from ask_lightning.callbacks.loss_terms import log_loss_terms
from ask_lightning.callbacks.refresh import KnowledgeRefreshCallback
from ask_lightning.capture import (
    Step,
    choose_step,
    outside_graphs,
    step_arguments,
    step_with_capture,
    step_with_criterion,
)
from ask_lightning.checkpoint_file import read_checkpoint
from ask_lightning.checkpoint_options import (
    CHECKPOINT_KEY,
    class_path,
    completed,
    storable,
    stored_loss,
    without_address,
)
from ask_lightning.chunked_encoding import ChunkedEncoding
from ask_lightning.encoding.batch_parts import entry_of
from ask_lightning.encoding.compatibility import (
    check_model,
    check_optimization,
    check_sharding,
    check_trainer,
    warn_of_single_pair,
)
from ask_lightning.encoding.encoders import Encoder, encode_batch, encoder_name, find_encoders
from ask_lightning.encoding.gradient_check import GradientCheck
from ask_lightning.encoding.isolation import isolated_copy
from ask_lightning.encoding.loss_binding import check_borrowed_parameters, check_loss
from ask_lightning.encoding.names import NamedAsModel
from ask_lightning.encoding.sharding import average_whole_gradients, enter_by_methods, is_sharded
from ask_lightning.hooks import overridden_hooks
from ask_lightning.interaction import Embeddings, pooled
from ask_lightning.losses import ReliabilityOTLoss, RetrievalLoss
from ask_lightning.losses.base import Ids
from ask_lightning.step_comparison import StepComparison
from ask_lightning.step_encoders import StepEncoders


def _model_attribute(name: str) -> Any:
    """A property that reads and writes the attribute of this name of the model."""

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


class ASKModule(NamedAsModel):
    """Trains any audio–text retrieval model with ASK, without an edit to the model.

    The model keeps its hooks, logs, optimisers, schedules, hyper-parameters and loops; only the loss of its
    training step is replaced. Attributes that the wrapper does not have are read from and written to the
    model, and parameters, buffers and submodules have the model's names, so callbacks that were written for
    the model keep working. Checkpoints have the model's keys and load in its class without this library.

    The embeddings come from two methods of the model. Unless they are named, the wrapper takes the first of
    these pairs that the model has, and logs at the start of `fit` which one: `encode_audio`/`encode_text`,
    `forward_audio`/`forward_text`, `get_audio_embedding`/`get_text_embedding`,
    `get_audio_features`/`get_text_features`. Methods of different pairs are never combined. If only one of
    the two is named, the other is its partner in the pair, or, if the name belongs to no pair, the first of
    these names for its side that the model has.

    Requirements:
        For a loss that needs knowledge `KnowledgeRefreshCallback` among the trainer's callbacks, or a base of
        your own in `loss.knowledge`.

    Args:
        model: Retrieval model to train. It is available as `.model` and is not modified.
        loss: Loss to train with. None: `ReliabilityOTLoss()` with the paper's settings.
        audio: Name of the model's method that takes a batch and returns audio embeddings `(B, d)` (a tensor,
            or an output of `transformers` with a `pooler_output`) or `TokenEmbeddings`, or a callable
            `(model, batch)` that does. None: a method is found as described above.
        text: Name of the model's method that takes a batch and returns text embeddings of such a kind, or a
            callable `(model, batch)` that does. None: a method is found as described above.
        ids: Key of the clip ids in a batch that is a mapping, their position in one that is a tuple, or a
            callable `(model, batch)` that returns them. They are read when the step has run; row i is pair i
            of the embeddings. The options `exclude_self`, `positives="ids"` and
            `positives="same_clip"` of a loss need it.
        caption_ids: Key, position or callable of the caption ids, as for `ids`: integers or strings that
            differ within a clip, such as the captions themselves, and are the same in the knowledge source.
            Where clips have several captions they tell which stored pair a sample is, for
            `KnowledgeRefreshCallback(write_back=True)` and `T="auto"`. None: captions of a clip are not told
            apart.
        step: Way to take the embeddings. `"capture"` runs the model's own `training_step`, records the
            embeddings that its audio and text methods return inside it, and replaces the loss that it
            returns; schedules, logs and side effects of the step remain. `"encode"` calls only the two
            methods. `"criterion"` goes with the argument `criterion`. `"auto"` is `"criterion"` if that is
            given, else `"capture"` if the model has a `training_step`, else `"encode"`.
        criterion: Name of an attribute that the model's `training_step` calls with `(audio, text)`. It is
            replaced while the step runs, for steps that add other losses to the contrastive one.
        chunk_size: Largest number of pairs that the encoders get at once in a training step. A larger batch
            is encoded in chunks, twice, with the gradient of the whole batch and the memory of a chunk (Gao
            et al., arXiv 2101.06983). What the encoders take then needs a row for each pair; embeddings must
            not depend on other rows, as they do through batch norm in training mode. None: the whole batch
            is encoded at once.

    Raises:
        TypeError: `model` is not a `lightning.pytorch` module, or `loss` is not a `RetrievalLoss`.
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
        >>> ASKModule(Retriever()).ask_step
        'encode'
    """

    loss: RetrievalLoss

    _current_fx_name = _model_attribute("_current_fx_name")
    _hparams = _model_attribute("_hparams")
    _hparams_initial = _model_attribute("_hparams_initial")
    _log_hyperparams = _model_attribute("_log_hyperparams")
    _example_input_array = _model_attribute("_example_input_array")
    _automatic_optimization = _model_attribute("_automatic_optimization")
    _strict_loading = _model_attribute("_strict_loading")
    strict_loading = _model_attribute("strict_loading")  # which a model may have as a property of its own
    _device_mesh = _model_attribute("_device_mesh")
    prepare_data_per_node = _model_attribute("prepare_data_per_node")
    allow_zero_length_dataloader_with_multiple_devices = _model_attribute(
        "allow_zero_length_dataloader_with_multiple_devices"
    )

    def __init__(
        self,
        model: pl.LightningModule,
        loss: RetrievalLoss | None = None,
        *,
        audio: Encoder | None = None,
        text: Encoder | None = None,
        ids: str | int | Callable[[Any, Any], Ids] | None = None,
        caption_ids: str | int | Callable[[Any, Any], Ids] | None = None,
        step: Step = "auto",
        criterion: str | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_model(model)
        if isinstance(model, ASKModule):
            raise TypeError(
                "Argument `model` has to be a model without ASK, but got an ASKModule. Wrap its `.model`, or "
                "use it as it is."
            )
        loss = ReliabilityOTLoss() if loss is None else loss
        check_loss(loss, model, ids)
        if caption_ids is not None and ids is None:
            raise ValueError(
                "Argument `ids` has to be given with `caption_ids`, which tell the captions of a clip apart: "
                "the batch's key of the clip ids, or a callable (model, batch)."
            )
        loss.bind(model)
        self._found_encoders = audio is None or text is None
        self._audio, self._text = find_encoders(model, audio, text)
        self._ids, self._caption_ids = ids, caption_ids
        self._criterion = criterion
        self._logs_terms = False
        self._is_refreshed, self._gradient_check = False, GradientCheck()
        self._known_clips = KnownClips()
        self.ask_step = choose_step(step, criterion, self._audio, self._text, model)
        self._chunk_size = chunk_size
        self._chunks: ChunkedEncoding | None = None
        if chunk_size is not None:
            self._chunks = ChunkedEncoding(self._audio, self._text, chunk_size, self.ask_step)
        self.loss = loss
        # From here on attributes that the model has are set on the model.
        self.model = model
        self._encoders = StepEncoders(self._audio, self._text, self.ask_step)
        self._warned_of_single_pair = False
        self._encodes_elsewhere = False  # by calls of the two methods outside of the step
        self._compares_step = False
        self._comparison: StepComparison | None = None  # while the first step runs
        self._last_batch: int | None = None  # number of the batch whose loss was computed last
        self._forwarded_hooks: dict[str, Callable[..., Any]] = {}
        self._adopt_hooks()

    def _adopt_hooks(self, *, announce: bool = True) -> None:
        """Have the hooks that the model has now, without those that a subclass or the user put here."""
        hooks = {
            name: hook
            for name, hook in overridden_hooks(self.model, announce=announce).items()
            if getattr(type(self), name, None) is getattr(ASKModule, name, None)
        }
        if "configure_model" in hooks:
            hooks["configure_model"] = self._configure_model
        if "on_train_epoch_end" in hooks:
            hooks["on_train_epoch_end"] = self._on_train_epoch_end
        own = vars(self)
        earlier = [name for name, hook in self._forwarded_hooks.items() if own.get(name) == hook]
        for name in earlier:
            del own[name]
        self._forwarded_hooks = {name: hook for name, hook in hooks.items() if name not in own}
        # On the instance: Lightning decides by what a module overrides how it trains.
        own.update(self._forwarded_hooks)

    def _configure_model(self) -> None:
        """Call the model's own hook, which may divide the model among ranks."""
        self.model.configure_model()
        enter_by_methods(self.model, (self._audio, self._text))
        self._adopt_hooks(announce=False)

    def _attached(self) -> None:
        self._adopt_hooks(announce=False)  # the model may have got hooks since it was wrapped

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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's `forward`."""
        return self.model(*args, **kwargs)

    @outside_graphs  # what it calls of the model and of the loss is compiled
    def training_step(self, batch: Any, *args: Any) -> Any:
        """The model's training step, with the ASK loss in place of the contrastive one."""
        check_optimization(self.model)  # which a hook of the model may have changed since `fit` began
        self.loss.check_temperature(self.global_step)
        self._put_loss_into_mode(True)  # Lightning restores modes by name, after a validation
        step = self._compared_step if self._compares_step else self._step
        if self._chunks is None:
            return step(batch, *args)
        with self._chunks.of_step(self.model):
            return step(batch, *args)

    @property
    def _has_methods(self) -> bool:
        """Whether both encoders are methods of the model, which can be observed inside a step."""
        return isinstance(self._audio, str) and isinstance(self._text, str)

    @outside_graphs
    def _compared_step(self, batch: Any, *args: Any) -> Any:
        """The training step, compared with what a refresh or a copy of the model does with a batch."""
        self._compares_step = False
        names = (str(self._audio), str(self._text)) if self._has_methods else ("audio", "text")
        comparison = StepComparison(self.model, *names, batch, warns=self._encodes_elsewhere)
        if not self._has_methods:
            comparison.encode_by(self._audio, self._text, batch)
        self._comparison = comparison
        try:
            with comparison.observing() if self._has_methods else nullcontext():
                result = self._step(batch, *args)
        finally:
            self._comparison = None
        if not self._encoders.calls:
            comparison.compare_calls()
        return result

    def _step(self, batch: Any, *args: Any) -> Any:
        """The training step by encoders that may take the batch in chunks."""
        if self.ask_step == "encode":
            return self._loss_of(batch, *self._encode_for_step(batch, self.model))
        args = step_arguments(self.model, *args)
        objective = partial(self._loss_of, batch)
        if self.ask_step == "criterion":
            assert self._criterion is not None
            return step_with_criterion(self.model, self._criterion, objective, batch, *args)
        return step_with_capture(self.model, str(self._audio), str(self._text), objective, batch, *args)

    def _encode_for_step(self, batch: Any, model: nn.Module) -> tuple[Embeddings, Embeddings]:
        """Both sides of a training batch by the model or a copy of it, in the step `"encode"`."""
        if self._chunks is not None:
            return self._chunks.encode_batch(model, batch)
        return encode_batch(model, self._audio, self._text, batch)

    def _loss_of(self, batch: Any, audio: Embeddings, text: Embeddings) -> Tensor:
        """The loss of a training batch whose embeddings are known."""
        if self._comparison is not None and self._criterion is not None:
            self._comparison.compare_embeddings(self._criterion, audio, text)
        elif self._comparison is not None:
            self._comparison.compare_captured(audio, text)
        if pooled(audio).shape == pooled(text).shape and len(audio) < self.loss.min_pairs:
            return self._loss_of_single_pair(audio, text)
        ids = self._ids_of(batch)
        self._undo_repeated_batch()
        if self.loss.needs_keys:
            self._check_steps_are_counted()

            def encode(copy: nn.Module) -> tuple[Tensor, Tensor]:
                with isolated_copy(copy, self.trainer):
                    if self._chunks is None:
                        return self._embed(batch, copy)
                    if self.ask_step == "encode":
                        audio, text = self._encode_for_step(batch, copy)
                        return pooled(audio), pooled(text)
                    with self._chunks.of_methods(copy):
                        return self._embed(batch, copy)

            # After the model's own encoding, whose random numbers are those of a run without keys.
            self.loss.make_keys(self.model, encode, self.trainer.global_step)
        loss: Tensor = self.loss(audio, text, ids=ids)
        if not self._is_refreshed:
            self._known_clips.add(self.loss.last)
        if self._logs_terms:
            log_loss_terms(self.trainer, self, self.loss.last)
        return loss

    def _check_steps_are_counted(self) -> None:
        """Refuse a loss whose copy of the model follows the optimiser's steps where there is no trainer."""
        if self._trainer is None:
            raise RuntimeError(
                f"{type(self.loss).__name__} follows the optimiser's steps, which a Trainer counts, but this "
                "ASKModule has none. Train with a Trainer; or, as with Fabric, without the wrapper: call "
                "`loss.make_keys(model, encode, step)` with your own count of steps before the loss of each "
                "batch."
            )

    @outside_graphs  # the number of the batch is another one in each step
    def _undo_repeated_batch(self) -> None:
        """Let the loss forget the batch where an optimiser's closure computes the same once more."""
        number = None if self._trainer is None else self.trainer.fit_loop.total_batch_idx
        if number is not None and number == self._last_batch:
            self.loss.undo_batch()
        self._last_batch = number

    def _loss_of_single_pair(self, audio: Embeddings, text: Embeddings) -> Tensor:
        """Zero, as the contrast of a pair with itself alone is, with a gradient of zero to each parameter."""
        if not self._warned_of_single_pair:
            self._warned_of_single_pair = True
            rank_zero_warn(
                "A batch holds a single pair, which has nothing to be contrasted with: its loss is 0. Set "
                "`drop_last=True` on the training loader, or another batch size."
            )
        self.loss.last = {}
        return self.loss.zero(audio, text)

    def embed_pairs(self, batch: Any) -> tuple[Tensor, Tensor, Ids | None]:
        """Embed a batch.

        In a model whose training step passes parts of the batch to its encoders, the encoders get the same
        parts here, see `StepEncoders`.

        Args:
            batch: Batch as the model's encoders take it.

        Returns:
            Audio embeddings `(B, d)`, text embeddings `(B, d)`, and clip ids, or None without `ids`.

        Raises:
            TypeError: An encoder does not return a tensor, or takes something else than the batch or a part,
                or a number that is another one for the next batch.
            ValueError: The batch does not have the key of the clip ids.
        """
        return *self._embed(batch, self.model), self._ids_of(batch)

    @property
    def encode_caption_ids(self) -> Callable[[Any], Ids | None] | None:
        """The function from a batch to its caption ids; `None` without `caption_ids`."""
        if self._caption_ids is None:
            return None
        return partial(self._entry_of, self._caption_ids, "caption_ids")

    def encode_pairs(self, batch: Any) -> tuple[Embeddings, Embeddings]:
        """Embed a batch as `embed_pairs` does, with frames and words where the encoders return them.

        Args:
            batch: Batch as the model's encoders take it.

        Returns:
            Audio and text embeddings, `(B, d)` or `TokenEmbeddings`.

        Raises:
            TypeError: An encoder does not return embeddings, or takes what `embed_pairs` cannot give it.
        """
        return self._encode(batch, self.model)

    def _embed(self, batch: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Pooled audio and text embeddings of a batch by the model or a copy of it."""
        audio, text = self._encode(batch, model)
        return pooled(audio), pooled(text)

    def _encode(self, batch: Any, model: nn.Module) -> tuple[Embeddings, Embeddings]:
        """Audio and text embeddings of a batch by the model or a copy of it."""
        return self._encoders(batch, model, self.current_epoch)

    def _ids_of(self, batch: Any) -> Ids | None:
        return None if self._ids is None else self._entry_of(self._ids, "ids", batch)

    def _entry_of(
        self, place: str | int | Callable[[Any, Any], Ids], argument: str, batch: Any
    ) -> Ids | None:
        """The ids that a batch has in a place, which is the value of an argument of the wrapper."""
        if not isinstance(place, str | int):
            return place(self.model, batch)
        kinds = "a key of the batch or position in it, or a callable (model, batch)"
        return entry_of(batch, place, f"Argument `{argument}` has to be {kinds}")  # type: ignore[no-any-return]

    def setup(self, stage: str) -> None:
        """Check that ASK can train here, then call the model's own hook."""
        if stage == "fit":
            check_trainer(self.trainer, self.model)
            check_sharding(self.trainer, self.loss, self._chunk_size)
            if self._chunks is not None:
                self._chunks.check(self, self.trainer)
            self.loss.bind(self.model)  # it may have been given to another wrapper in the meantime
            refreshed = any(isinstance(item, KnowledgeRefreshCallback) for item in self.trainer.callbacks)  # type: ignore[attr-defined]
            if self.loss.needs_knowledge and not refreshed and self.loss.knowledge is None:
                raise RuntimeError(
                    "ASKModule has no knowledge to learn from. Add the callback that builds and renews it: "
                    "Trainer(..., callbacks=[KnowledgeRefreshCallback(T=15)]), or set "
                    "`loss.knowledge` to a KnowledgeBase that shall stay as it is."
                )
            if self.loss.needs_knowledge and not refreshed:
                rank_zero_info(
                    f"ASKModule trains with the knowledge in `loss.knowledge`, {self.loss.knowledge}, which "
                    "stays as it is: the trainer has no KnowledgeRefreshCallback."
                )
            if self._found_encoders:
                rank_zero_info(
                    f"ASKModule takes the embeddings from `{encoder_name(self._audio)}` and "
                    f"`{encoder_name(self._text)}` of {type(self.model).__name__}."
                )
            if self.ask_step == "capture":
                rank_zero_info(
                    f"{type(self.loss).__name__} takes the place of all that "
                    f"`{type(self.model).__name__}.training_step` returns as its loss. If it adds other "
                    "losses to the contrastive one, name that one, and the others stay: ASKModule(..., "
                    'criterion="...").'
                )
            # With a refresh callback it is the callback that logs the terms of the loss.
            self._logs_terms = not (refreshed or self.trainer.barebones)
            # As are checks of data and gradients.
            self._is_refreshed, self._gradient_check = refreshed, GradientCheck()
            self._gradient_check.is_needed = not refreshed
            if self.trainer.current_epoch == 0:
                # A new run, perhaps after another one with the same objects; a checkpoint is restored later.
                self.loss.reset()
        self.model.setup(stage)
        self._adopt_hooks(announce=False)

    def on_train_start(self) -> None:
        """Call the model's own hook, then let the loss take what it needs of the model."""
        self.model.on_train_start()
        self._last_batch = None
        check_borrowed_parameters(self.trainer, self.model, self.loss)
        self._gradient_check.start(self.trainer, self)
        self._encodes_elsewhere = self.loss.needs_keys or (self.loss.needs_knowledge and self._is_refreshed)
        # A criterion may get text before audio, which is wrong whatever the loss.
        compares = self.ask_step == "criterion" or (self._encodes_elsewhere and self.ask_step != "encode")
        # Callables cannot be observed in a step, so they encode its batch once more, as a refresh would.
        is_encoded_twice = self._encodes_elsewhere and not is_sharded(self.trainer)
        self._compares_step = compares and (self._has_methods or is_encoded_twice)
        if not self._is_refreshed:
            warn_of_single_pair(self.trainer)
        # In evaluation mode, in which a user may have left the module, the loss would ignore its state.
        self.loss.train()
        if self.loss.needs_keys:
            self.loss.start(self.model, self.trainer.global_step)

    def on_after_backward(self) -> None:
        """Call the model's own hook, then check once which parameters have no gradient."""
        self.model.on_after_backward()
        if not self._is_refreshed:
            average_whole_gradients(self.trainer, self)
        self._gradient_check.after_backward(self.trainer, self)

    def on_train_epoch_end(self) -> None:
        """Check that a teacher knows the clips, unless a refresh callback does."""
        if not self._is_refreshed:
            self._known_clips.check(self.loss)

    def _on_train_epoch_end(self) -> None:
        """The same behind the model's own hook."""
        self.model.on_train_epoch_end()
        ASKModule.on_train_epoch_end(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Call the model's own hook, then add options and state of the loss under a key of their own."""
        self.model.on_save_checkpoint(checkpoint)
        stored = {"loss": self.loss.options, "loss_class": class_path(self.loss), "options": self._options()}
        # Like the optimiser's, the state is only of use where training goes on.
        if "optimizer_states" in checkpoint and (state := self.loss.training_state()):
            stored["state"] = state
        checkpoint[CHECKPOINT_KEY] = stored

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Call the model's own hook; restore the state of the loss, and warn where it has other options."""
        stored = checkpoint.get(CHECKPOINT_KEY, {})
        changed = [
            f"{name} {value!r} → {self.loss.options[name]!r}"
            for name, value in stored.get("loss", {}).items()
            if name in self.loss.options
            and without_address(value) != without_address(self.loss.options[name])
        ]
        if changed:
            rank_zero_warn(f"The checkpoint was trained with other loss options: {', '.join(changed)}.")
        self._restore_loss(stored)
        self.model.on_load_checkpoint(checkpoint)

    def _options(self) -> dict[str, str | int | None]:
        """The constructor's arguments that say how the model is wrapped."""
        values = {
            "audio": self._audio,
            "text": self._text,
            "ids": self._ids,
            "caption_ids": self._caption_ids,
            "step": self.ask_step,
            "criterion": self._criterion,
            "chunk_size": self._chunk_size,
        }
        return storable(values)

    def _restore_loss(self, stored: Mapping[str, Any]) -> None:
        """Give the loss the state in a checkpoint, if it is that of such a loss; else it starts anew."""
        self.loss.reset()
        if "state" in stored and stored["loss_class"] == class_path(self.loss):
            self.loss.load_training_state(stored["state"])
        elif self.loss.training_state() and self._is_fitting:
            rank_zero_warn(
                f"The checkpoint holds no state of a {type(self.loss).__name__}, so the loss starts with "
                "none and differs at first from that of a run without a break."
            )

    @property
    def _is_fitting(self) -> bool:
        """Whether a trainer is training this module, rather than only loading or evaluating it."""
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        model: pl.LightningModule,
        loss: RetrievalLoss | None = None,
        *,
        map_location: Any = None,
        strict: bool | None = None,
        weights_only: bool = True,
        **options: Any,
    ) -> ASKModule:
        """Wrap a model and load the weights of a checkpoint into it.

        Args:
            checkpoint_path: Path or URL (`file://`, `s3://`, …) of a checkpoint of `Trainer`, trained with or
                without ASK; also the path of a directory that FSDP2, FSDP or DeepSpeed has written.
            model: New model of the class that was trained.
            loss: Loss to train on with. None: a loss with the options in the checkpoint.
            map_location: Argument `map_location` of `torch.load`.
            strict: Whether the names of the weights have to match. None: the model's `strict_loading`.
            weights_only: Argument `weights_only` of `torch.load`; pass `False` only for files that you trust.
            options: Arguments `audio`, `text`, `ids`, `caption_ids`, `step`, `criterion` and `chunk_size` of
                `ASKModule`. Those that are left out are the checkpoint's.

        Returns:
            The wrapped model. Knowledge is rebuilt when training resumes; a loss with a queue starts a new
            `fit` with an empty one.

        Raises:
            ValueError: The loss was of a class of the user's or had options that a file cannot hold, and
                `loss` is not given; or an argument of the wrapper was a callable and is not given.
        """
        checkpoint = read_checkpoint(checkpoint_path, map_location=map_location, weights_only=weights_only)
        if loss is None and CHECKPOINT_KEY in checkpoint:
            loss = stored_loss(checkpoint[CHECKPOINT_KEY])
        stored = checkpoint.get(CHECKPOINT_KEY, {}).get("options", {})
        wrapped = cls(model, loss, **completed(options, stored))
        if is_overridden("configure_model", wrapped):
            wrapped.configure_model()
        wrapped.on_load_checkpoint(checkpoint)
        strict = wrapped.strict_loading if strict is None else strict
        wrapped.load_state_dict(checkpoint["state_dict"], strict=strict)
        return wrapped


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
