"""Text encoders of transformers with their tokenizers. Axes: `B` batch, `L` tokens, `d` width."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ask_lightning.models.tokens import make_tokenizer
from ask_lightning.models.weights import (
    config_entries,
    load_from_transformers,
    make_config,
    pretrained_model,
    remove_pooler,
)
from ask_lightning.utilities.arguments import check_fraction
from ask_lightning.utilities.optional_imports import import_optional

SONAR: dict[str, Any] = {
    "vocab_size": 256206,
    "max_position_embeddings": 1024,
    "d_model": 1024,
    "encoder_layers": 24,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 8192,
    "encoder_layerdrop": 0.0,
    "scale_embedding": True,
}
"""The published size of the text encoder of SONAR, as entries of `transformers.M2M100Config`."""

_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")

_REMEDY = (
    "Unset HF_HUB_OFFLINE, or fetch it where there is a network with `hf download NAME --local-dir FOLDER` "
    'and pass the folder. Random weights have to be asked for: `text_weights=None` and `tokenizer="hashed"`.'
)


class TextEncoder(nn.Module):
    """A text encoder of transformers with its tokenizer.

    Args:
        model: Model of transformers that returns `last_hidden_state`.
        tokenizer: Tokenizer that turns captions into token ids and a mask.
        pooling: `"first"`: the state of the first token, as for BERT. `"mean"`: the mean over the tokens.

    Examples:
        >>> encoder = TextEncoder.bert(
        ...     None, {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}, "hashed"
        ... )
        >>> encoder(["rain, then wind", "wind"]).shape
        torch.Size([2, 8])
    """

    def __init__(self, model: Any, tokenizer: nn.Module, pooling: Literal["first", "mean"]) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling

    @classmethod
    def bert(
        cls,
        weights: str | None,
        config: dict[str, Any] | None,
        tokenizer: str | None,
        *,
        dropout: float | None = None,
        max_tokens: int = 128,
    ) -> "TextEncoder":
        """BERT, or another encoder that `transformers.AutoModel` loads, pooled by its first token.

        Args:
            weights: Folder or hub name of the weights. None: random weights.
            config: Entries that override those of the pretrained configuration, or, if the weights are
                random, the defaults of the entry `"model_type"` (`"bert"` if it is missing).
            tokenizer: Argument `tokenizer` of `make_tokenizer`.
            dropout: Dropout rate of hidden states and attention, if the encoder has such entries. None: that
                of the configuration.
            max_tokens: Largest number of tokens of a caption. Longer captions are truncated.

        Raises:
            FileNotFoundError: The weights or the tokenizer were not found.
            ValueError: An entry is unknown, the weights are incomplete, or there is no tokenizer.
            ImportError: transformers is missing.
        """
        transformers = import_optional("transformers")
        entries = dict(config or {})
        if weights is None:
            base = transformers.AutoConfig.for_model(entries.pop("model_type", "bert"))
        else:
            base = load_from_transformers(
                transformers.AutoConfig, weights, argument="text_weights", remedy=_REMEDY
            )
            entries.pop("model_type", None)
        if dropout is not None:
            entries = {rate: dropout for rate in _DROPOUTS if hasattr(base, rate)} | entries
        settings = make_config(base, entries, argument="text_config")
        if weights is None:
            model = transformers.AutoModel.from_config(settings).train()
            remove_pooler(model)
        else:
            model = pretrained_model(
                transformers.AutoModel, weights, argument="text_weights", remedy=_REMEDY, config=settings
            )
        return cls(model, make_tokenizer(tokenizer, weights, settings, max_tokens=max_tokens), "first")

    @classmethod
    def sonar(
        cls,
        weights: str | None,
        config: dict[str, Any] | None,
        tokenizer: str | None,
        *,
        language: str = "eng_Latn",
        activation_dropout: float | None = None,
        max_tokens: int = 128,
    ) -> "TextEncoder":
        """The text encoder of SONAR, an `M2M100Encoder` of transformers, pooled by the mean over its tokens.

        Reference: Duquenne et al., "SONAR: Sentence-Level Multimodal and Language-Agnostic
        Representations", 2023 (arXiv 2308.11466).

        Args:
            weights: Folder or hub name of the weights. None: random weights.
            config: Entries of `M2M100Config` that override those of the pretrained configuration, or of
                `SONAR` if the weights are random.
            tokenizer: Argument `tokenizer` of `make_tokenizer`.
            language: Code of the captions' language.
            activation_dropout: Dropout rate behind the activation in the feed-forward layers, unless
                `config` has this entry, in [0, 1). None: that of the configuration.
            max_tokens: Largest number of tokens of a caption. Longer captions are truncated.

        Raises:
            FileNotFoundError: The weights or the tokenizer were not found.
            ValueError: An entry is unknown, the weights are incomplete, or there is no tokenizer.
            ImportError: transformers is missing.
        """
        configuration = import_optional("transformers").M2M100Config
        encoder = import_optional("transformers.models.m2m_100.modeling_m2m_100").M2M100Encoder
        entries = {name: value for name, value in (config or {}).items() if name != "model_type"}
        if activation_dropout is not None:
            check_fraction("activation_dropout", activation_dropout)
            entries = {"activation_dropout": activation_dropout} | entries
        if weights is None:
            settings = make_config(configuration(**SONAR), entries, argument="text_config")
            model = encoder(settings).train()
        else:
            base = load_from_transformers(configuration, weights, argument="text_weights", remedy=_REMEDY)
            settings = make_config(base, entries, argument="text_config")
            model = pretrained_model(
                encoder, weights, argument="text_weights", remedy=_REMEDY, config=settings
            )
        sonar_tokenizer = make_tokenizer(
            tokenizer, weights, settings, max_tokens=max_tokens, language=language
        )
        return cls(model, sonar_tokenizer, "mean")

    @property
    def width(self) -> int:
        """d, width of the output."""
        return int(self.model.config.hidden_size)

    @property
    def offline_arguments(self) -> dict[str, Any]:
        """Arguments of a model that build an encoder of this shape without files, to load weights into."""
        return {
            "text_weights": None,
            "text_config": config_entries(self.model.config, always=[*SONAR, *_DROPOUTS]),
            "tokenizer": self.tokenizer.kind,
        }

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Encode captions.

        Args:
            captions: `B` captions.

        Returns:
            `(B, d)`, not normalised. A caption does not depend on the others.
        """
        return self.with_tokens(captions)[0]

    def with_tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Encode captions, and each of their tokens, the special ones included.

        Args:
            captions: `B` captions.

        Returns:
            Features of captions `(B, d)`, those of their tokens `(B, L, d)`, and which of them are no
            padding, `(B, L)` boolean.
        """
        ids, mask = self.tokenizer(captions, self.model.device)  # (B, L) each
        states: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, L, d)
        return self._pool(states, mask), states, mask.bool()

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """Tokens `(B, L, d)` as captions `(B, d)`."""
        if self.pooling == "first":
            return states[:, 0]  # (B, d)
        inside = mask.unsqueeze(-1).to(states.dtype)  # (B, L, 1)
        mean: Tensor = (states * inside).sum(dim=1) / inside.sum(dim=1)  # (B, d)
        return mean
