"""Encoding a source by a copy of the encoders, in a thread, while training goes on.

The thread takes part in no exchange between ranks, and touches no random stream of this process: worker
processes read the source, and whether the encoders draw random numbers is tried with the first batches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from ask_lightning.encoding.encode import EncodedBatches, embed_source_batch
from ask_lightning.encoding.isolation import preserved_random_state
from ask_lightning.encoding.row_limit import RowLimit
from ask_lightning.encoding.run_state import random_streams
from ask_lightning.encoding.source_loader import open_batches
from ask_lightning.encoding.target import find_target
from ask_lightning.encoding.training_copy import TrainingCopy
from ask_lightning.interaction import pooled

# What can go wrong with a batch goes wrong with the first, and a number beside the batch that is another one
# for each batch is seen at the second.
_TRIED_BATCHES = 2


class BackgroundEncoder:
    """Encodes the batches of loaders by a copy of the module, in a thread of its own.

    Making one starts the worker processes and encodes the first batches in the calling thread, so that most
    of what can fail fails there. On a CUDA device the thread has a stream of its own.

    Args:
        encoders: The copy.
        loaders: Loaders of this rank's items, one after the other, from `source_loader`.
        limits: Number of rows to read of each loader at most.

    Attributes:
        seconds: How long encoding has taken so far.

    Raises:
        RuntimeError: A loader iterates in this process, the encoders draw random numbers, or the copy uses
            parameters of the original.
        ValueError: Embeddings are not two equal `(B, d)`.
    """

    def __init__(
        self, encoders: TrainingCopy, loaders: Sequence[Iterable[Any]], limits: Sequence[RowLimit]
    ) -> None:
        self._encoders = encoders
        self._embed = find_target(encoders.module).embed
        self._sources = list(zip(loaders, limits, (EncodedBatches() for _ in loaders), strict=True))
        self._is_stopped = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._device = encoders.module.device
        self._stream: torch.cuda.Stream | None = None
        self.seconds = 0.0
        for loader in loaders:
            _read_in_workers(loader)
        started = time.perf_counter()
        with ExitStack() as stack, preserved_random_state():
            # Here, because a fork in the thread would be one in the middle of a training step.
            self._batches = [stack.enter_context(open_batches(loader)) for loader in loaders]
            self._try_first_batches()
            self._workers = stack.pop_all()
        self.seconds = time.perf_counter() - started

    @torch.no_grad()
    def _try_first_batches(self) -> None:
        """Encode the first batches, and refuse encoders that a thread cannot use beside training."""
        batch = None
        for batch in islice(self._batches[0], _TRIED_BATCHES):
            self._encode(0, batch)
            if self._sources[0][1].is_reached:
                break
        if batch is None:
            return
        before = random_streams()
        with torch.enable_grad():  # which the copy's own parameters do not ask for
            embedded = embed_source_batch(self._encoders.trainer, self._encoders.module, batch, self._embed)
        if any(pooled(side).requires_grad for side in embedded[:2]):
            raise RuntimeError(
                "A copy of the encoders computes with parameters of the original, which training changes: an "
                "attribute of the model, such as `self.encode_audio = torch.compile(self.encode_audio)`, "
                "refers to the model itself. Compile submodules by their method `compile()`, write methods, "
                "or leave `in_background` out."
            )
        if random_streams() != before:
            raise RuntimeError(
                "The encoders draw random numbers in evaluation mode, from the streams that training draws "
                "from at the same time. Let them draw in training mode only, or from a torch.Generator of "
                "their own, or leave `in_background` out."
            )

    def start(self) -> None:
        """Let the thread encode the rest."""
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # A daemon: a process that ends for whatever reason does not wait for it.
        self._thread = threading.Thread(target=self._run, name="knowledge-refresh", daemon=True)
        self._thread.start()

    def raise_failure(self) -> None:
        """Raise the error in which the thread has ended, if it has, with the thread's traceback."""
        if self._failure is not None:
            raise self._failure

    def wait(self) -> list[EncodedBatches]:
        """Wait until everything is encoded.

        Returns:
            The embeddings of each loader.

        Raises:
            BaseException: The error in which the thread has ended.
        """
        assert self._thread is not None
        self._thread.join()
        self.raise_failure()
        if self._stream is not None:
            for _, _, encoded in self._sources:
                for tensor in (*encoded.audio, *encoded.text):
                    tensor.record_stream(torch.cuda.current_stream(self._device))
        return [encoded for _, _, encoded in self._sources]

    def stop(self) -> None:
        """End the thread, after the batch that it is at, and the worker processes; may be called twice."""
        self._is_stopped.set()
        if self._thread is not None:
            self._thread.join()
        self._workers.close()

    def _run(self) -> None:
        """Encode what is left; the thread's function."""
        started = time.perf_counter()
        # Where the outermost autocast of any thread ends, the casts that all threads keep are forgotten. Here
        # none is the outermost one.
        torch.autocast_increment_nesting()
        try:
            with self._workers, torch.no_grad(), self._on_own_stream():
                for number, batches in enumerate(self._batches):
                    self._encode_rest(number, batches)
        except BaseException as error:  # given to the main thread
            self._failure = error
        finally:
            self.seconds += time.perf_counter() - started

    def _encode_rest(self, number: int, batches: Iterator[Any]) -> None:
        """Encode the batches that are left of a loader, until it ends, enough is read, or this is stopped."""
        limit = self._sources[number][1]
        while not (limit.is_reached or self._is_stopped.is_set()):
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._encode(number, batch)

    def _encode(self, number: int, batch: Any) -> None:
        """Encode a batch of a loader."""
        loader, limit, encoded = self._sources[number]
        embedded = embed_source_batch(self._encoders.trainer, self._encoders.module, batch, self._embed)
        encoded.add(embedded, loader, limit)

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """On a CUDA device, work on the thread's stream, and at the end wait until all of it is done."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()


def _read_in_workers(loader: Iterable[Any]) -> None:
    """Have a new loader read its dataset in another process, whose random streams are its own."""
    if type(loader) is not DataLoader:  # what `source_loader` has not made
        kind = type(getattr(loader, "dataset", loader)).__name__
        raise RuntimeError(
            f"The knowledge source {kind} is read in this process, where it may draw from the random streams "
            "of training at the same time. Pass a Dataset or a DataLoader, which worker processes read, or "
            "leave `in_background` out."
        )
    if loader.num_workers == 0:
        loader.num_workers, loader.prefetch_factor = 1, 2
