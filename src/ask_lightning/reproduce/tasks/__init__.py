"""Retrieval tasks that losses are compared on, one in each file."""

from ask_lightning.reproduce.tasks.captions import captions_task
from ask_lightning.reproduce.tasks.embeddings import embeddings_task
from ask_lightning.reproduce.tasks.folder import folder_task
from ask_lightning.reproduce.tasks.soundscapes import soundscapes_task
from ask_lightning.reproduce.tasks.task import Task

__all__ = ["Task", "captions_task", "embeddings_task", "folder_task", "soundscapes_task"]
