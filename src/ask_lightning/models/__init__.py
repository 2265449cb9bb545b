"""Retrieval models to train with ASK, or without; torchaudio and transformers load when one is made."""

from ask_lightning.models.ced import CED, CEDSonar
from ask_lightning.models.clap import CLAPRetriever
from ask_lightning.models.exported import from_pretrained, save_pretrained
from ask_lightning.models.mteb_encoder import MTEBEncoder
from ask_lightning.models.resnet38 import ResNet38, ResNet38BERT
from ask_lightning.models.retriever import Retriever
from ask_lightning.models.stored_calibration import load_calibration
from ask_lightning.models.tiny import TinyRetriever

__all__ = [
    "CED",
    "CEDSonar",
    "CLAPRetriever",
    "MTEBEncoder",
    "ResNet38",
    "ResNet38BERT",
    "Retriever",
    "TinyRetriever",
    "from_pretrained",
    "load_calibration",
    "save_pretrained",
]
