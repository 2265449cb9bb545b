"""The three published models in small, with random weights and without files, and batches for them."""

import torch
from torch.utils.data import Dataset

from ask_lightning.models import CEDSonar, CLAPRetriever, ResNet38BERT

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rain", "wind", "a", "dog", "##s", "barking", ","]
BERT = {
    "vocab_size": 200,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
}
SONAR = {
    "vocab_size": 200,
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
}
CLAP = {
    "projection_dim": 8,
    "text_config": BERT | {"pad_token_id": 1},
    "audio_config": {
        "num_mel_bins": 16,
        "spec_size": 64,
        "window_size": 4,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
    },
}
FUSED = CLAP | {
    "audio_config": CLAP["audio_config"]
    | {"enable_fusion": True, "fusion_type": "aff_2d", "patch_embed_input_channels": 1}
}
CAPTIONS = ["rain", "a dog barking in the distance, then silence", "wind", "Rain and wind"]


def resnet38_bert(**options) -> ResNet38BERT:
    defaults = {
        "audio_weights": None,
        "text_weights": None,
        "text_config": BERT,
        "tokenizer": "hashed",
        "width": 8,
        "head_width": 12,
        "channels": (4, 4, 6, 6),
        "blocks": (1, 1, 1, 1),
        "audio_width": 10,
    }
    return ResNet38BERT(**(defaults | options))


def ced_sonar(**options) -> CEDSonar:
    defaults = {
        "audio_weights": None,
        "text_weights": None,
        "text_config": SONAR,
        "tokenizer": "hashed",
        "width": 8,
        "head_width": 12,
        "audio_width": 16,
        "audio_depth": 2,
        "audio_heads": 2,
    }
    return CEDSonar(**(defaults | options))


def clap(**options) -> CLAPRetriever:
    defaults = {"weights": None, "config": CLAP, "tokenizer": "hashed", "max_seconds": 1.0}
    return CLAPRetriever(**(defaults | options))


MODELS = {"resnet38_bert": resnet38_bert, "ced_sonar": ced_sonar, "clap": clap}


def noise(rows: int, seconds: float, rate: int, seed: int = 0) -> torch.Tensor:
    """Each row with a loudness of its own."""
    generator = torch.Generator().manual_seed(seed)
    waveform = torch.randn(rows, round(seconds * rate), generator=generator)
    return waveform * torch.logspace(-2, -0.5, rows).unsqueeze(1)


def batch_for(model, rows: int = 4, seconds: float = 1.0) -> dict:
    return {
        "waveform": noise(rows, seconds, model.resample.from_rate),
        "caption": CAPTIONS[:rows],
        "clip_id": torch.arange(rows),
    }


class Recordings(Dataset):
    """Pairs of noise and words."""

    def __init__(self, rate: int, size: int = 12) -> None:
        self.waveforms = noise(size, 0.5, rate)

    def __len__(self) -> int:
        return len(self.waveforms)

    def __getitem__(self, row: int) -> dict:
        return {"waveform": self.waveforms[row], "caption": f"sound number {row}", "clip_id": row}
