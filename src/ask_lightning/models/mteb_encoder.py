"""A trained model as an encoder of MTEB, for its retrieval tasks of audio and text."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ask_lightning.data.caption_style import CaptionStyle, style_caption
from ask_lightning.encoding.encoders import call_encoder, encoder_name, find_encoders, find_interaction
from ask_lightning.encoding.outputs import as_embeddings
from ask_lightning.functional import unit_length
from ask_lightning.utilities.arguments import check_positive
from ask_lightning.utilities.optional_imports import import_optional


class MTEBEncoder:
    """What `mteb.evaluate` takes: a model that encodes the clips and the texts of a task.

    Each clip and text is encoded once and compared by cosine similarity. The metrics are those of the task,
    which for audio and text are hit rates; MTEB breaks ties by the order of its ids, so that embeddings that
    collapse may score better there than in `AudioTextRetrieval`.

    Args:
        model: A model of `ask_lightning.models`, or another LightningModule with methods that encode audio
            and text and a hyperparameter `sample_rate`. It is put into evaluation mode and stays on its
            device.
        name: Name under which results are kept, as `"organisation/model"`.
        revision: Version of the model, under which results are kept.
        caption_style: `"plain"` for texts in lower case and without punctuation, in the style of the training
            captions; `"raw"` for texts as they are.
        max_seconds: Longest part of a clip that is encoded, from its start, in seconds, above 0.

    Raises:
        ValueError: The model compares tokens by an interaction, which MTEB's similarity of embeddings cannot,
            has no sample rate, or an argument is outside its range.
        ImportError: mteb is missing.

    Examples:
        ```python
        import mteb
        from ask_lightning.models import MTEBEncoder, from_pretrained

        encoder = MTEBEncoder(from_pretrained("folder"), "me/sounds", caption_style="plain")
        mteb.evaluate(encoder, mteb.get_tasks(["ClothoT2ARetrieval.v2"]))
        ```

        >>> from ask_lightning.models import TinyRetriever
        >>> MTEBEncoder(TinyRetriever(interaction="frames"), "me/sounds")
        Traceback (most recent call last):
            ...
        ValueError: TinyRetriever compares tokens by an interaction, but MTEB compares embeddings. Test it \
by `ask-lightning test`.
    """

    def __init__(
        self,
        model: L.LightningModule,
        name: str,
        *,
        revision: str = "local",
        caption_style: CaptionStyle = "raw",
        max_seconds: float = 30.0,
    ) -> None:
        check_positive("max_seconds", max_seconds)
        if name.count("/") != 1:
            raise ValueError(f"Argument `name` has to be 'organisation/model', but got {name!r}.")
        if find_interaction(model) is not None:
            raise ValueError(
                f"{type(model).__name__} compares tokens by an interaction, but MTEB compares embeddings. "
                "Test it by `ask-lightning test`."
            )
        rate = dict(model.hparams).get("sample_rate")
        if rate is None:
            raise ValueError(
                f"{type(model).__name__} does not say at which rate it hears audio. Give it a hyperparameter "
                "`sample_rate`."
            )
        self.model = model.eval()
        self.caption_style: CaptionStyle = caption_style
        self._rate = int(rate)
        self._collate = import_optional("mteb.models.modality_collators").AudioCollator(
            target_sampling_rate=self._rate, max_samples=int(max_seconds * self._rate)
        )
        described = import_optional("mteb.models.model_meta")
        self.mteb_model_meta = described.ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,
                "modalities": ["audio", "text"],
                "framework": ["PyTorch"],
                "n_parameters": sum(weight.numel() for weight in model.parameters()),
                "similarity_fn_name": described.ScoringFunction.COSINE,
                "use_instructions": False,
            }
        )

    @torch.inference_mode()
    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **options: Any,
    ) -> Tensor:
        """Encode the clips or the texts of a task.

        Args:
            inputs: A DataLoader of MTEB whose rows hold either `"audio"` or `"text"`.
            task_metadata: Not used.
            hf_split: Not used.
            hf_subset: Not used.
            prompt_type: Not used: clips and texts are encoded in the same way as queries and as documents.
            **options: Not used; the loader has the batch size.

        Returns:
            `(N, d)` unit vectors on the CPU, in the order of the rows.

        Raises:
            ValueError: Rows hold both, or neither.
        """
        given = {"audio", "text"} & set(inputs.dataset.features)
        if len(given) != 1:
            raise ValueError(
                f"A row of an MTEB task has to hold either audio or text, but got {sorted(given) or 'none'}."
            )
        (side,) = given
        if side == "audio":
            inputs.collate_fn = self._collate
        encoder = find_encoders(self.model)[0 if side == "audio" else 1]
        encoded = []
        for rows in inputs:
            batch = self._clips(rows["audio"]) if side == "audio" else self._texts(rows["text"])
            found = as_embeddings(call_encoder(self.model, encoder, batch), encoder_name(encoder))  # (B, d)
            encoded.append(unit_length(found.float()).cpu())
        return torch.cat(encoded)

    def similarity(self, first: Any, second: Any) -> Tensor:
        """Cosine similarities of all pairs.

        Args:
            first: `(N, d)` embeddings.
            second: `(M, d)` embeddings.

        Returns:
            `(N, M)`.
        """
        return unit_length(torch.as_tensor(first)) @ unit_length(torch.as_tensor(second)).T

    def similarity_pairwise(self, first: Any, second: Any) -> Tensor:
        """Cosine similarities of rows with the same number.

        Args:
            first: `(N, d)` embeddings.
            second: `(N, d)` embeddings.

        Returns:
            `(N,)`.
        """
        return cosine_similarity(torch.as_tensor(first), torch.as_tensor(second))

    def _clips(self, clips: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of clips, padded at the end."""
        waveforms = [torch.as_tensor(clip["array"], dtype=torch.float32) for clip in clips]
        device = self.model.device
        return {
            "waveform": torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True).to(device),
            "num_samples": torch.tensor([len(waveform) for waveform in waveforms], device=device),
        }

    def _texts(self, texts: list[str]) -> dict[str, list[str]]:
        return {"caption": [style_caption(text, self.caption_style) for text in texts]}
