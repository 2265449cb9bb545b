"""Which methods of a model encode audio and text."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from ask_lightning.encoding.outputs import as_encoded
from ask_lightning.interaction import Embeddings, Interaction, pooled

Encoder = str | Callable[[Any, Any], Embeddings]

ENCODER_PAIRS = (
    ("encode_audio", "encode_text"),
    ("forward_audio", "forward_text"),
    ("get_audio_embedding", "get_text_embedding"),
    ("get_audio_features", "get_text_features"),
)
"""Names of the audio and the text method, in the order in which pairs are tried."""

_SIDES = ("audio", "text")


def find_encoders(
    model: object, audio: Encoder | None = None, text: Encoder | None = None, *, caller: str = "ASKModule"
) -> tuple[Encoder, Encoder]:
    """Complete and check the encoders of a model.

    If none is given, the result is the first of `ENCODER_PAIRS` of which the model has both methods; methods
    of different pairs are never combined. If one is given and belongs to a pair, the other is its partner. If
    one is given that belongs to no pair, the other is the first name for its side that the model has.

    Args:
        model: The model that has the methods.
        audio: Method name, or callable `(model, batch)`, that encodes audio. None: it is found as above.
        text: Method name, or callable `(model, batch)`, that encodes text. None: it is found as above.
        caller: Class whose arguments `audio` and `text` are, for error messages.

    Returns:
        The audio and the text encoder.

    Raises:
        ValueError: A given name is not that of a method or is a usual name of the other side, both are the
            same, or no method was found.

    Examples:
        >>> class Model:
        ...     def forward_audio(self, batch): ...
        ...     def forward_text(self, batch): ...
        >>> find_encoders(Model())
        ('forward_audio', 'forward_text')
    """
    for argument, encoder in zip(_SIDES, (audio, text), strict=True):
        if isinstance(encoder, str) and not _has_method(model, encoder):
            raise ValueError(
                f"Argument `{argument}` of {caller} has to name a method of {type(model).__name__} that "
                f"takes a batch, but it has no method {encoder!r}. {_instead_of(model, argument, encoder)}"
            )
    if audio is not None and audio == text:
        raise ValueError(
            f"Arguments `audio` and `text` of {caller} have to be two encoders, but got "
            f"{encoder_name(audio)!r} for both. Name one for each side."
        )
    for side, encoder in enumerate((audio, text)):
        if encoder in [pair[1 - side] for pair in ENCODER_PAIRS]:
            raise ValueError(
                f"Argument `{_SIDES[side]}` of {caller} has to name the method that encodes {_SIDES[side]}, "
                f"but got {encoder_name(encoder)!r}, by its name that of {_SIDES[1 - side]}. Name another "
                "one, or pass a callable if it does."
            )
    if audio is not None and text is not None:
        return audio, text
    if audio is not None:
        return audio, _find_partner(model, audio, 1, caller)
    if text is not None:
        return _find_partner(model, text, 0, caller), text
    for pair in ENCODER_PAIRS:
        if all(_has_method(model, name) for name in pair):
            return pair
    raise ValueError(_no_encoders_message(model, caller))


def call_encoder(model: object, encoder: Encoder, batch: Any) -> Any:
    """Encode a batch.

    Args:
        model: The model that has the method, or that the callable gets.
        encoder: Method name, or callable `(model, batch)`.
        batch: The batch to encode.

    Returns:
        What the encoder returns.
    """
    return getattr(model, encoder)(batch) if isinstance(encoder, str) else encoder(model, batch)


def encode_batch(model: object, audio: Encoder, text: Encoder, batch: Any) -> tuple[Embeddings, Embeddings]:
    """Encode both sides of a batch, with tokens where an encoder returns them.

    Args:
        model: The model that has the methods, or that the callables get.
        audio: Encoder of the audio.
        text: Encoder of the text.
        batch: The batch to encode.

    Returns:
        Audio and text embeddings, `(B, d)` or `TokenEmbeddings`.

    Raises:
        TypeError: An encoder returns no embeddings.
    """
    encoded = [
        as_encoded(call_encoder(model, encoder, batch), encoder_name(encoder)) for encoder in (audio, text)
    ]
    return encoded[0], encoded[1]


def embed_batch(model: object, audio: Encoder, text: Encoder, batch: Any) -> tuple[Tensor, Tensor]:
    """Encode both sides of a batch to pooled embeddings.

    Args:
        model: The model that has the methods, or that the callables get.
        audio: Encoder of the audio.
        text: Encoder of the text.
        batch: The batch to encode.

    Returns:
        Audio and text embeddings, `(B, d)` each.

    Raises:
        TypeError: An encoder returns no embeddings.
    """
    encoded = encode_batch(model, audio, text, batch)
    return pooled(encoded[0]), pooled(encoded[1])


def find_pair_encoder(module: object) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """Find how a module embeds the pairs of a batch.

    Args:
        module: A module with a method `embed_pairs`, as `ASKModule` has, or with methods that `find_encoders`
            finds.

    Returns:
        Function from a batch to audio and text embeddings, `(B, d)` each.

    Raises:
        ValueError: The module has neither.
    """
    if callable(embed_pairs := getattr(module, "embed_pairs", None)):
        return lambda batch: embed_pairs(batch)[:2]
    encoders = find_encoders(module)
    return lambda batch: embed_batch(module, *encoders, batch)


def find_token_encoder(module: object) -> Callable[[Any], tuple[Embeddings, Embeddings]]:
    """Find how a module embeds the pairs of a batch, with frames and words where its encoders return them.

    Args:
        module: A module with a method `encode_pairs`, as `ASKModule` has, or with methods that
            `find_encoders` finds.

    Returns:
        Function from a batch to audio and text embeddings, `(B, d)` or `TokenEmbeddings`.

    Raises:
        ValueError: The module has neither.
    """
    if callable(encode_pairs := getattr(module, "encode_pairs", None)):
        return encode_pairs  # type: ignore[no-any-return]
    encoders = find_encoders(module)
    return lambda batch: encode_batch(module, *encoders, batch)


def find_interaction(module: object) -> Interaction | None:
    """The interaction that a module compares clips and captions by, its attribute `interaction`.

    Args:
        module: The module, or an `ASKModule` around it.

    Returns:
        The interaction, or None where pooled embeddings are compared.
    """
    interaction = getattr(module, "interaction", None)
    return interaction if isinstance(interaction, Interaction) else None


def encoder_name(encoder: Encoder) -> str:
    """The name of an encoder, for messages.

    Args:
        encoder: Method name, or callable.
    """
    return encoder if isinstance(encoder, str) else getattr(encoder, "__name__", repr(encoder))


def _has_method(model: object, name: str) -> bool:
    return callable(getattr(model, name, None))


def _instead_of(model: object, argument: str, name: str) -> str:
    """What to write in place of a name that is not that of a method."""
    if "." in name:
        call = f"{argument}=lambda model, batch: model.{name}(batch)"
        return f"A method of a part is called by a callable: {call}."
    near = [one for one in get_close_matches(name, dir(model), cutoff=0.8) if _has_method(model, one)]
    return f"Did you mean {near[0]!r}?" if near else "Name another one."


def _find_partner(model: object, given: Encoder, side: int, caller: str) -> str:
    """The encoder of side 0 (audio) or 1 (text) that goes with the one that is given for the other side."""
    partners = [pair[side] for pair in ENCODER_PAIRS if pair[1 - side] == given]
    candidates = partners or [pair[side] for pair in ENCODER_PAIRS]
    for name in candidates:
        if _has_method(model, name):
            return name
    raise ValueError(
        f"Argument `{_SIDES[side]}` of {caller} has to be given beside {_SIDES[1 - side]}="
        f"{encoder_name(given)!r}, because {type(model).__name__} has no method "
        f"{' or '.join(f'`{name}`' for name in candidates)}."
    )


def _no_encoders_message(model: object, caller: str) -> str:
    """The error message for a model in which no pair of methods was found."""
    pairs = ", ".join(f"`{audio}`/`{text}`" for audio, text in ENCODER_PAIRS)
    found = [f"`{name}`" for pair in ENCODER_PAIRS for name in pair if _has_method(model, name)]
    of_parts = (
        ' Those of a part of the model are called by ASKModule(..., step="encode", audio=lambda model, '
        "batch: model.part.encode_audio(batch), text=lambda model, batch: model.part.encode_text(batch))."
        if caller == "ASKModule"
        else ""
    )
    unpaired = f" It has {' and '.join(found)}, which are not of one pair." if found else ""
    return (
        f"{caller} found no methods of {type(model).__name__} that encode audio and text: it looked for the "
        f'pairs {pairs}.{unpaired} Name the methods: {caller}(..., audio="...", text="...").{of_parts}'
    )
