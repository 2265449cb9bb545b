"""Synthetic soundscapes with captions: an audio–text retrieval task that needs no download."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ask_lightning.data.audio.features import log_mel
from ask_lightning.data.audio.options import Features
from ask_lightning.data.splits import SPLITS, Split
from ask_lightning.data.synthetic.synthesis import EVENT_PROBABILITIES, EVENT_TYPES, Waveform, render_event
from ask_lightning.utilities.arguments import check_choice, check_count, check_range

# Each scene draws its layout, its noise and its captions from three streams of their own, so that more
# captions or a longer clip leave the rest of the scene as it was.
_LAYOUT, _NOISE, _CAPTIONS = range(3)

# Octaves by which pitch and rate of an event may differ from its type's: enough for close types to overlap.
_VARIATION_OCTAVES = 0.4

_ALONE = ("{0}", "{0} alone", "the sound of {0}", "only {0} can be heard")
_THEN = ("{0}, then {1}", "{0} followed by {1}", "first {0} and afterwards {1}", "{0} gives way to {1}")
_THEN_THEN = (
    "{0}, then {1}, then {2}",
    "{0} followed by {1} and {2}",
    "first {0}, next {1} and finally {2}",
    "{0} gives way to {1} before {2}",
)
_WHILE = ("{0} while {1} goes on", "{0} with {1} in the background", "{0} over {1}", "{0} in front of {1}")
_THEN_WHILE = (
    "{0}, then {1} while {2} goes on",
    "{0} followed by {1} with {2} in the background",
    "{0} and afterwards {1}, all over {2}",
    "first {0} and later {1} in front of {2}",
)
# Number of foreground and of background events, probability, and caption templates.
_LAYOUTS: tuple[tuple[int, int, float, tuple[str, ...]], ...] = (
    (1, 0, 0.10, _ALONE),
    (2, 0, 0.25, _THEN),
    (1, 1, 0.25, _WHILE),
    (3, 0, 0.20, _THEN_THEN),
    (2, 1, 0.20, _THEN_WHILE),
)

MAX_CAPTIONS = 5
"""Largest number of captions of a clip."""

_BLOCK = 64
# Of the noise of a typical scene.
_AMBIENCE = 0.04
# Events of different types in the largest layout.
_MAX_EVENTS = 3


@dataclass(frozen=True)
class Event:
    """One event of a scene.

    Attributes:
        name: Name of its type, a key of `EVENT_TYPES`.
        start: Time at which it starts, as a share of the clip in [0, 1).
        duration: Length, as a share of the clip in (0, 1].
        pitch: Factor on the type's frequencies.
        speed: Factor on the type's rate.
        loudness: Root mean square of its waveform.
    """

    name: str
    start: float
    duration: float
    pitch: float
    speed: float
    loudness: float


@dataclass(frozen=True)
class Scene:
    """The events and the noise of one clip.

    Attributes:
        foreground: One to three events in the order of time.
        background: At most one event, softer than the others, that sounds throughout the clip.
        ambience: Root mean square of the noise of place and recorder.

    Examples:
        >>> scene = draw_scene(seed=0, split="train", index=0)
        >>> len(scene.foreground) in (1, 2, 3)
        True
    """

    foreground: tuple[Event, ...]
    background: tuple[Event, ...]
    ambience: float

    @property
    def events(self) -> tuple[str, ...]:
        """Names of the events, in the order in which captions mention them."""
        return tuple(event.name for event in self.foreground + self.background)


def draw_scene(
    *,
    seed: int,
    split: Split,
    index: int,
    event_probabilities: Mapping[str, float] | None = None,
    noise: float = 1.0,
) -> Scene:
    """Draw a scene. It depends on nothing but the arguments.

    Args:
        seed: Seed of the scenes, at least 0.
        split: `"train"`, `"val"` or `"test"`.
        index: Index of the clip in its split.
        event_probabilities: Probability of each event type by its name, a key of `EVENT_TYPES`. None:
            `EVENT_PROBABILITIES`.
        noise: Factor on the loudness of the noise, at least 0.

    Returns:
        One to three events of different types, drawn by their probabilities.

    Examples:
        >>> draw_scene(seed=0, split="val", index=3) == draw_scene(seed=0, split="val", index=3)
        True
    """
    random = _random_stream(seed, split, index, _LAYOUT)
    probabilities = EVENT_PROBABILITIES if event_probabilities is None else event_probabilities
    num_foreground, num_background, _, _ = _LAYOUTS[
        random.choice(len(_LAYOUTS), p=[share for _, _, share, _ in _LAYOUTS])
    ]
    names = random.choice(
        list(probabilities),
        size=num_foreground + num_background,
        replace=False,
        p=list(probabilities.values()),
    )
    slot = 1 / num_foreground
    foreground = []
    for position in range(num_foreground):
        duration = slot * random.uniform(0.75, 0.95)
        start = position * slot + random.uniform(0, slot - duration)
        foreground.append(_draw_event(str(names[position]), start, duration, random, loudness=0.05))
    background = [_draw_event(str(name), 0.0, 1.0, random, loudness=0.025) for name in names[num_foreground:]]
    ambience = _AMBIENCE * 2 ** random.uniform(-2, 2)
    return Scene(tuple(foreground), tuple(background), ambience=noise * ambience)


def render_scene(
    scene: Scene, num_samples: int, *, sample_rate: int, random: np.random.Generator
) -> Waveform:
    """Render a scene.

    Args:
        scene: Scene to render.
        num_samples: Length of the clip in samples.
        sample_rate: Rate of the waveform in Hz.
        random: Random generator of the noise.

    Returns:
        `(num_samples,)` float32 in [-1, 1].

    Examples:
        >>> scene = draw_scene(seed=0, split="train", index=0)
        >>> render_scene(scene, 8000, sample_rate=16000, random=np.random.default_rng(0)).dtype
        dtype('float32')
    """
    waveform = np.float32(scene.ambience) * random.standard_normal(num_samples, dtype=np.float32)
    for event in scene.foreground + scene.background:
        first = int(event.start * num_samples)
        length = min(int(event.duration * num_samples), num_samples - first)
        waveform[first : first + length] += np.float32(event.loudness) * render_event(
            EVENT_TYPES[event.name],
            length,
            pitch=event.pitch,
            speed=event.speed,
            sample_rate=sample_rate,
            random=random,
        )
    clipped: Waveform = np.clip(waveform, -1, 1)
    return clipped


def describe_scene(scene: Scene, random: np.random.Generator, count: int = 1) -> list[str]:
    """Describe a scene, each time in other words.

    Args:
        scene: Scene to describe.
        random: Random generator that chooses the words.
        count: Number of captions, 1 to 5.

    Returns:
        Different captions. Events in turn are named in the order of time, the background last.

    Examples:
        >>> scene = draw_scene(seed=0, split="train", index=0)
        >>> len(set(describe_scene(scene, np.random.default_rng(0), count=5)))
        5
    """
    templates = next(
        sentences
        for num_foreground, num_background, _, sentences in _LAYOUTS
        if (num_foreground, num_background) == (len(scene.foreground), len(scene.background))
    )
    captions: list[str] = []
    while len(captions) < count:
        phrases = [str(random.choice(EVENT_TYPES[name].phrases)) for name in scene.events]
        caption = str(random.choice(templates)).format(*phrases)
        if caption not in captions:
            captions.append(caption)
    return captions


class Soundscapes(Dataset[dict[str, Any]]):
    """Synthetic clips of one to three events, with captions.

    Events are drawn from 70 types whose frequencies follow Zipf's law, so that a few are everywhere and
    most are rare. Several types are close in sound, clips share events, and captions differ in words and
    in the order of events: a small model neither fails at the task nor solves it.

    Clip `i` depends on `seed`, `split` and `i` alone. All clips are rendered at construction, some
    hundred a second on one core.

    Args:
        num_clips: Number of clips, at least 1.
        split: `"train"`, `"val"` or `"test"`; they share no scene.
        seed: Seed of the scenes, at least 0.
        seconds: Length of every clip, at least 0.5.
        captions_per_clip: Number of captions of each clip, 1 to 5. Each pair of clip and caption is an item.
        features: None: items hold `"waveform"` and `"num_samples"`. `"log_mel"`: items hold `"log_mel"`
            instead, a spectrogram that is computed once.
        num_mels: Number of mel bins of the spectrogram.
        sample_rate: Rate of the waveforms in Hz, at least 16000, which the highest events need.
        event_probabilities: Probability of each event type by its name, a key of `EVENT_TYPES`; they sum to
            one, and at least three are above 0. None: `EVENT_PROBABILITIES`.
        noise: Factor on the loudness of the noise of place and recorder, at least 0.

    Attributes:
        scenes: The scene of each clip.
        events: The names of each clip's event types.
        captions: The captions of each clip.

    Raises:
        ValueError: An argument is outside its range.
        ImportError: `features` is given and torchaudio is missing.

    Examples:
        >>> clips = Soundscapes(num_clips=2, split="val", captions_per_clip=5)
        >>> len(clips)
        10
        >>> clips[7]["clip_id"], clips[7]["waveform"].shape
        (1, torch.Size([40000]))
    """

    def __init__(
        self,
        num_clips: int = 1500,
        *,
        split: Split = "train",
        seed: int = 0,
        seconds: float = 2.5,
        captions_per_clip: int = 1,
        features: Features | None = None,
        num_mels: int = 64,
        sample_rate: int = 16000,
        event_probabilities: Mapping[str, float] | None = None,
        noise: float = 1.0,
    ) -> None:
        check_count("num_clips", num_clips)
        check_choice("split", split, SPLITS)
        check_count("seed", seed, 0)
        check_range("seconds", seconds, 0.5)
        check_count("captions_per_clip", captions_per_clip)
        check_range("captions_per_clip", captions_per_clip, 1, MAX_CAPTIONS)
        check_choice("features", features, (None, *get_args(Features)))
        check_count("num_mels", num_mels)
        check_count("sample_rate", sample_rate, 16000)
        self.captions_per_clip = captions_per_clip
        check_domain(event_probabilities, noise)
        self.scenes = [
            draw_scene(
                seed=seed, split=split, index=index, event_probabilities=event_probabilities, noise=noise
            )
            for index in range(num_clips)
        ]
        self.captions = [
            describe_scene(scene, _random_stream(seed, split, index, _CAPTIONS), captions_per_clip)
            for index, scene in enumerate(self.scenes)
        ]

        self._features = features
        self._num_samples = round(seconds * sample_rate)
        rendered: list[Tensor] = []
        # In blocks: one clip at a time is slow for torch, and all waveforms at once take much memory.
        for start in range(0, num_clips, _BLOCK):
            waveforms = [
                render_scene(
                    self.scenes[index],
                    self._num_samples,
                    sample_rate=sample_rate,
                    random=_random_stream(seed, split, index, _NOISE),
                )
                for index in range(start, min(start + _BLOCK, num_clips))
            ]
            block = torch.from_numpy(np.stack(waveforms))  # (block, T)
            rendered.append(
                block if features is None else log_mel(block, sample_rate=sample_rate, num_mels=num_mels)
            )
        self._sounds = torch.cat(rendered)  # (clips, T) or (clips, F, num_mels)

    @property
    def events(self) -> list[tuple[str, ...]]:
        """The names of each clip's event types."""
        return [scene.events for scene in self.scenes]

    def __len__(self) -> int:
        return len(self.scenes) * self.captions_per_clip

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is outside the {len(self)} items of this dataset.")
        clip, caption = divmod(index, self.captions_per_clip)
        text = {"caption": self.captions[clip][caption], "clip_id": clip, "caption_id": index}
        if self._features is not None:
            return {"log_mel": self._sounds[clip], **text}
        return {"waveform": self._sounds[clip], "num_samples": self._num_samples, **text}


def check_domain(event_probabilities: Mapping[str, float] | None, noise: float) -> None:
    """Refuse what no scenes can be drawn by.

    Args:
        event_probabilities: Probability of each event type by its name. None: the usual ones.
        noise: Factor on the loudness of the noise.

    Raises:
        ValueError: A name is unknown, the probabilities do not sum to one or leave fewer than three types,
            or the factor is negative.
    """
    check_range("noise", noise, 0)
    if event_probabilities is None:
        return
    unknown = sorted(set(event_probabilities) - set(EVENT_TYPES))
    if unknown:
        raise ValueError(
            f"Argument `event_probabilities` has to name types of `EVENT_TYPES`, but got {unknown}."
        )
    values = list(event_probabilities.values())
    if min(values, default=0) < 0 or not math.isclose(sum(values), 1, rel_tol=1e-6):
        raise ValueError(
            "Argument `event_probabilities` has to hold numbers of at least 0 that sum to 1, but they sum to "
            f"{sum(values):g}. Divide them by their sum."
        )
    possible = sum(value > 0 for value in values)
    if possible < _MAX_EVENTS:
        raise ValueError(
            f"Argument `event_probabilities` has to make at least {_MAX_EVENTS} types possible, as many as a "
            f"scene may have, but got {possible}."
        )


def _draw_event(
    name: str, start: float, duration: float, random: np.random.Generator, *, loudness: float
) -> Event:
    """Draw pitch, speed and loudness of an event around those of its type."""
    return Event(
        name=name,
        start=start,
        duration=duration,
        pitch=2 ** random.uniform(-_VARIATION_OCTAVES, _VARIATION_OCTAVES),
        speed=2 ** random.uniform(-_VARIATION_OCTAVES, _VARIATION_OCTAVES),
        loudness=loudness * 2 ** random.uniform(-1, 1),
    )


def _random_stream(seed: int, split: Split, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index, purpose]))
