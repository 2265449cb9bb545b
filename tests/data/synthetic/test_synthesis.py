"""The types of events: phrases, probabilities, and what they sound like."""

from collections import Counter

import numpy as np
import pytest

from ask_lightning.data import EVENT_PROBABILITIES, EVENT_TYPES
from ask_lightning.data.synthetic.soundscapes import _VARIATION_OCTAVES, draw_scene
from ask_lightning.data.synthetic.synthesis import _PARTIALS, render_event


def test_there_are_many_types_and_no_two_share_a_phrase():
    assert len(EVENT_TYPES) >= 60
    phrases = [phrase for kind in EVENT_TYPES.values() for phrase in kind.phrases]
    assert len(set(phrases)) == len(phrases) == 3 * len(EVENT_TYPES)


def test_events_have_a_long_tail():
    scenes = [draw_scene(seed=0, split="train", index=index) for index in range(1500)]
    counts = Counter(name for scene in scenes for name in scene.events)
    assert set(counts) == set(EVENT_TYPES)
    assert sum(EVENT_PROBABILITIES.values()) == pytest.approx(1)
    assert max(EVENT_PROBABILITIES.values()) > 30 * min(EVENT_PROBABILITIES.values())
    by_frequency = sorted(counts.values(), reverse=True)
    assert sum(by_frequency[:10]) > 0.4 * sum(by_frequency)
    assert sum(by_frequency[-35:]) < 0.3 * sum(by_frequency)


@pytest.mark.parametrize("name", EVENT_TYPES)
def test_every_type_can_be_heard(name):
    random = np.random.default_rng(0)
    played = render_event(EVENT_TYPES[name], 8000, pitch=1.3, speed=0.8, sample_rate=16000, random=random)
    assert played.dtype == np.float32
    assert np.isfinite(played).all()
    assert 0.5 < np.sqrt(np.mean(played**2)) < 1.1
    assert played[0] == played[-1] == 0


def test_no_partial_is_above_half_the_lowest_sample_rate():
    for kind in EVENT_TYPES.values():
        highest = max(_PARTIALS.get(kind.timbre, {1: 1.0}))
        assert highest * max(kind.start_hz, kind.end_hz) * 2**_VARIATION_OCTAVES < 8000
