"""Synthetic soundscapes: the same on every run, rare and common events, captions that tell the truth."""

import itertools
from dataclasses import replace

import pytest
import torch

from ask_lightning.data import EVENT_PROBABILITIES, EVENT_TYPES, SoundscapeData, Soundscapes, log_mel

SPLITS = ("train", "val", "test")


def fingerprint(clips: Soundscapes) -> list[bytes]:
    return [item["waveform"].numpy().tobytes() + item["caption"].encode() for item in clips]


def test_items_have_the_documented_layout():
    item = Soundscapes(2, seconds=1.5)[1]
    assert set(item) == {"waveform", "num_samples", "caption", "clip_id", "caption_id"}
    assert item["num_samples"] == 24000
    assert item["waveform"].shape == (24000,)
    assert item["waveform"].dtype == torch.float32
    assert item["waveform"].abs().max() <= 1
    assert isinstance(item["caption"], str)
    assert item["clip_id"] == 1


def test_two_datasets_of_one_seed_are_equal_and_of_two_seeds_are_not():
    assert fingerprint(Soundscapes(5, seconds=1)) == fingerprint(Soundscapes(5, seconds=1))
    assert fingerprint(Soundscapes(5, seconds=1)) != fingerprint(Soundscapes(5, seconds=1, seed=1))


def test_a_clip_does_not_depend_on_how_many_others_or_captions_there_are():
    few, many = Soundscapes(3, seconds=1), Soundscapes(6, seconds=1, captions_per_clip=5)
    assert torch.equal(few[2]["waveform"], many[2 * 5]["waveform"])
    assert few[2]["caption"] == many[2 * 5]["caption"]


def test_splits_share_no_scene_and_no_sound():
    parts = {split: Soundscapes(150, split=split, seconds=0.5) for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(parts[one].scenes) & set(parts[other].scenes)
    sounds = [item["waveform"].numpy().tobytes() for clips in parts.values() for item in clips]
    assert len(set(sounds)) == len(sounds)


def test_captions_name_all_events_in_their_order():
    clips = Soundscapes(200, seconds=0.5, captions_per_clip=5)
    for scene, captions in zip(clips.scenes, clips.captions, strict=True):
        starts = [event.start for event in scene.foreground]
        assert starts == sorted(starts)
        for caption in captions:
            places = [
                min(caption.find(phrase) for phrase in EVENT_TYPES[name].phrases if phrase in caption)
                for name in scene.events
            ]
            assert places == sorted(places)
            assert len(set(places)) == len(places)


def test_backgrounds_are_said_to_be_backgrounds():
    clips = Soundscapes(100, seconds=0.5)
    signs = ("background", "while", "over", "in front of")
    for scene, (caption,) in zip(clips.scenes, clips.captions, strict=True):
        assert bool(scene.background) == any(f" {sign} " in f"{caption} " for sign in signs)


def test_captions_of_a_clip_differ_and_an_event_has_several_phrasings():
    clips = Soundscapes(200, seconds=0.5, captions_per_clip=5)
    assert all(len(set(captions)) == 5 for captions in clips.captions)
    assert len(clips) == 1000
    assert [clips[index]["clip_id"] for index in (0, 4, 5, 999)] == [0, 0, 1, 199]
    words = " ".join(itertools.chain.from_iterable(clips.captions))
    most_common = max(EVENT_PROBABILITIES, key=EVENT_PROBABILITIES.__getitem__)
    assert all(phrase in words for phrase in EVENT_TYPES[most_common].phrases)


def test_log_mel_is_that_of_the_waveform():
    heard, seen = Soundscapes(2, seconds=1), Soundscapes(2, seconds=1, features="log_mel", num_mels=32)
    assert seen[1]["log_mel"].shape == (63, 32)
    torch.testing.assert_close(seen[1]["log_mel"], log_mel(heard[1]["waveform"], num_mels=32))


def test_iteration_ends():
    assert len(list(Soundscapes(3, seconds=0.5))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clips": 0}, "`num_clips` has to be an integer of at least 1, but got 0"),
        ({"split": "valid"}, "`split` has to be one of .*'val'.* but got 'valid'"),
        ({"seed": -1}, "`seed` has to be an integer of at least 0, but got -1"),
        ({"seconds": 0.1}, "`seconds` has to be at least 0.5, but got 0.1"),
        ({"captions_per_clip": 6}, r"`captions_per_clip` has to be in \[1, 5\], but got 6"),
        ({"sample_rate": 8000}, "`sample_rate` has to be an integer of at least 16000, but got 8000"),
    ],
)
def test_arguments_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        Soundscapes(**{"num_clips": 1, **options})


def test_another_domain_has_other_sounds_and_other_noise():
    rare = dict(zip(sorted(EVENT_PROBABILITIES), [0.5, 0.3, 0.2], strict=False))
    other = Soundscapes(100, seconds=0.5, event_probabilities=rare)
    assert {name for events in other.events for name in events} == set(rare)
    usual, noisy = Soundscapes(20, seconds=0.5), Soundscapes(20, seconds=0.5, noise=3)
    for scene, another in zip(usual.scenes, noisy.scenes, strict=True):
        assert another == replace(scene, ambience=3 * scene.ambience)
    assert usual.captions == noisy.captions
    spelled_out = Soundscapes(5, seconds=0.5, event_probabilities=EVENT_PROBABILITIES, noise=1)
    assert fingerprint(spelled_out) == fingerprint(Soundscapes(5, seconds=0.5))


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"event_probabilities": {"a quark": 1.0}}, r"`event_probabilities` .* got \['a quark'\]"),
        ({"event_probabilities": {"static": 0.5, "wind": 0.3, "barking": 0.1}}, r"sum to 0\.9\. Divide"),
        ({"event_probabilities": {}}, r"sum to 0\."),
        ({"event_probabilities": {"static": 0.5, "wind": 0.5}}, r"at least 3 types possible, .* got 2"),
        ({"noise": -1.0}, r"`noise` has to be at least 0, but got -1\.0"),
    ],
)
def test_what_is_no_domain(domain, message):
    for make in (lambda: Soundscapes(2, seconds=0.5, **domain), lambda: SoundscapeData(**domain)):
        with pytest.raises(ValueError, match=message):
            make()
