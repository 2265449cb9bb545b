"""The events that synthetic soundscapes are made of: what they sound like and what they are called.

Every event is one recipe for the same small instrument: a carrier (a harmonic tone or a band of noise)
that may glide in pitch, under an envelope that may repeat. Close recipes are meant: a rising whistle and
a rising siren, a low hum and a low buzz are as easily confused here as in real recordings.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Timbre = Literal["pure", "hollow", "bright", "metallic", "band", "wide"]
Envelope = Literal["steady", "tremolo", "gate", "strike", "swell", "fade"]
Waveform = npt.NDArray[np.float32]
Curve = npt.NDArray[np.float64]

# Amplitudes of the partials of a tone. Noise carriers are described by their half width in octaves.
_PARTIALS: dict[str, dict[int, float]] = {
    "pure": {1: 1.0},
    "hollow": {1: 1.0, 3: 0.4, 5: 0.2},
    "bright": {1: 1.0, 2: 0.7, 3: 0.6, 4: 0.5, 5: 0.4, 6: 0.35, 7: 0.3, 8: 0.25},
    "metallic": {1: 1.0, 4: 0.7, 6: 0.5},
}
_NOISE_OCTAVES: dict[str, float] = {"band": 0.25, "wide": 1.0}

_TABLE_SIZE = 4096
_FADE_SECONDS = 0.01


@dataclass(frozen=True)
class EventType:
    """One kind of sound and the phrases that name it.

    Attributes:
        phrases: Noun phrases that name the sound; the first is its name.
        start_hz: Pitch at the start of a cycle; for noise the centre of the band.
        end_hz: Pitch at the end of a cycle.
        timbre: The carrier: partials of a tone, or the width of a band of noise.
        envelope: Loudness over a cycle.
        rate_hz: Cycles a second; 0 for one cycle over the whole event.

    Examples:
        >>> EVENT_TYPES["a rising whistle"].end_hz > EVENT_TYPES["a rising whistle"].start_hz
        True
    """

    phrases: tuple[str, str, str]
    start_hz: float
    end_hz: float
    timbre: Timbre
    envelope: Envelope
    rate_hz: float

    @property
    def name(self) -> str:
        """The first phrase, by which scenes refer to this type."""
        return self.phrases[0]


# phrases, start and end of the pitch in Hz, timbre, envelope, cycles a second
_RECIPES: tuple[tuple[tuple[str, str, str], float, float, Timbre, Envelope, float], ...] = (
    # steady tones
    (("a low hum", "a deep hum", "low humming"), 110, 110, "hollow", "steady", 0),
    (("a low buzz", "a deep buzz", "low buzzing"), 110, 110, "bright", "steady", 0),
    (("a hum", "a mid-pitched hum", "plain humming"), 260, 260, "hollow", "steady", 0),
    (("a harsh buzz", "rough buzzing", "a grating buzz"), 260, 260, "bright", "steady", 0),
    (("a soft hollow note", "a mellow note", "a flute note"), 620, 620, "hollow", "steady", 0),
    (("a nasal note", "a reedy note", "an oboe note"), 520, 520, "bright", "steady", 0),
    (("a steady whistle", "a level whistle", "even whistling"), 1400, 1400, "pure", "steady", 0),
    (("a high whine", "a shrill whine", "shrill whining"), 3000, 3000, "pure", "steady", 0),
    # one glide
    (("a rising whistle", "a whistle going up", "upward whistling"), 900, 2200, "pure", "steady", 0),
    (("a falling whistle", "a whistle going down", "downward whistling"), 2200, 900, "pure", "steady", 0),
    (("a rising siren", "a siren going up", "a siren winding up"), 500, 1100, "hollow", "steady", 0),
    (("a falling siren", "a siren going down", "a siren winding down"), 1100, 500, "hollow", "steady", 0),
    (("a racing engine", "an engine speeding up", "a motor winding up"), 80, 220, "bright", "steady", 0),
    (("a slowing engine", "an engine slowing down", "a motor winding down"), 220, 80, "bright", "steady", 0),
    (("a rising hum", "a hum going up", "upward humming"), 120, 330, "hollow", "steady", 0),
    (("a falling hum", "a hum going down", "downward humming"), 330, 120, "hollow", "steady", 0),
    # repeated glides
    (("a wailing siren", "a slowly cycling siren", "siren wails"), 600, 1200, "hollow", "steady", 1.6),
    (("a yelping siren", "a quickly cycling siren", "siren yelps"), 600, 1200, "hollow", "steady", 5),
    (("laser zaps", "zapping", "electronic zaps"), 3500, 500, "pure", "strike", 3),
    (("bright chirping", "upward chirps", "a bird chirping upwards"), 2500, 4500, "pure", "swell", 6),
    (("sinking chirping", "downward chirps", "a bird chirping downwards"), 4500, 2500, "pure", "swell", 6),
    (("a slow bird call", "slow tweeting", "a bird tweeting slowly"), 2500, 4200, "pure", "swell", 2.4),
    (("dripping", "water drops", "drops falling"), 900, 1800, "pure", "strike", 3),
    (("croaking", "a frog croaking", "frog croaks"), 300, 200, "bright", "strike", 5),
    (("barking", "a dog barking", "short barks"), 520, 300, "bright", "strike", 2.2),
    (("a revving engine", "an engine revving", "motor revs"), 90, 180, "bright", "swell", 1.7),
    # gated tones
    (("fast high beeps", "quick high beeping", "rapid shrill beeps"), 2000, 2000, "pure", "gate", 6),
    (("slow high beeps", "unhurried high beeping", "slow shrill beeps"), 2000, 2000, "pure", "gate", 2),
    (("fast low beeps", "quick low beeping", "rapid deep beeps"), 500, 500, "pure", "gate", 6),
    (("slow low beeps", "unhurried low beeping", "slow deep beeps"), 500, 500, "pure", "gate", 2),
    (("a telephone ringing", "a ringing phone", "phone rings"), 700, 700, "bright", "gate", 11),
    (("a slow alarm", "an alarm buzzing slowly", "slow alarm blasts"), 350, 350, "bright", "gate", 2.2),
    (("a fast alarm", "an alarm buzzing quickly", "rapid alarm blasts"), 350, 350, "bright", "gate", 7),
    (("a cricket", "a cricket trilling", "insect trills"), 4200, 4200, "pure", "gate", 15),
    # modulated tones
    (("a throbbing hum", "a pulsing hum", "throbbing humming"), 120, 120, "hollow", "tremolo", 4),
    (("a throbbing buzz", "a pulsing buzz", "throbbing buzzing"), 120, 120, "bright", "tremolo", 4),
    (("an idling engine", "an engine ticking over", "a motor idling"), 70, 70, "bright", "tremolo", 11),
    (("a fluttering whistle", "a trilled whistle", "fluttery whistling"), 1500, 1500, "pure", "tremolo", 10),
    (("a trembling note", "a quavering note", "a wobbly note"), 620, 620, "hollow", "tremolo", 6),
    # steady noise
    (("hissing", "a hiss", "steam hissing"), 5000, 5000, "band", "steady", 0),
    (("static", "radio static", "white noise"), 3000, 3000, "wide", "steady", 0),
    (("rushing water", "running water", "a stream flowing"), 1500, 1500, "wide", "steady", 0),
    (("wind", "the wind roaring", "roaring wind"), 420, 420, "wide", "steady", 0),
    (("a low rumble", "deep rumbling", "distant thunder"), 120, 120, "wide", "steady", 0),
    (("an airy whistle", "a breathy whistle", "wind whistling"), 1300, 1300, "band", "steady", 0),
    # moving noise
    (("a rising whoosh", "a whoosh going up", "an upward swish"), 400, 3000, "wide", "swell", 0),
    (("a falling whoosh", "a whoosh going down", "a downward swish"), 3000, 400, "wide", "fade", 0),
    (("breaking waves", "waves on a beach", "surf"), 900, 900, "wide", "tremolo", 1.4),
    (("gusting wind", "gusts of wind", "a blustery wind"), 480, 480, "wide", "tremolo", 1.8),
    (("heavy breathing", "someone panting", "panting"), 1500, 900, "band", "tremolo", 2.2),
    (("sawing", "a saw cutting wood", "wood being sawn"), 2400, 1600, "band", "tremolo", 3.2),
    (("rustling", "leaves rustling", "paper rustling"), 4500, 4500, "wide", "tremolo", 7),
    (("a helicopter", "rotor blades", "a helicopter flying"), 200, 200, "wide", "tremolo", 12),
    (("a steam train", "a locomotive chugging", "chugging"), 1200, 700, "wide", "strike", 3.6),
    # struck noise
    (("dull knocking", "dull knocks", "muffled knocking"), 250, 250, "band", "strike", 4),
    (("sharp knocking", "sharp knocks", "knocking on wood"), 900, 900, "band", "strike", 4),
    (("footsteps", "someone walking", "slow steps"), 420, 420, "band", "strike", 2),
    (("running footsteps", "someone running", "quick steps"), 420, 420, "band", "strike", 5),
    (("slow ticking", "a clock ticking", "slow clicks"), 4000, 4000, "band", "strike", 2.4),
    (("fast ticking", "a watch ticking", "rapid clicks"), 4000, 4000, "band", "strike", 8),
    (("hammering", "a hammer striking", "hammer blows"), 1600, 1600, "wide", "strike", 3),
    (("clapping", "hands clapping", "applause"), 1800, 1800, "wide", "strike", 6),
    (("drumming", "drum beats", "someone drumming"), 150, 150, "wide", "strike", 5),
    (("crackling", "a fire crackling", "crackles"), 5000, 5000, "wide", "strike", 14),
    (("a bang", "a loud thud", "a door slamming"), 300, 300, "wide", "strike", 0),
    # struck tones
    (("a tolling bell", "a large bell ringing", "church bells"), 420, 420, "metallic", "strike", 1.6),
    (("a small bell", "a handbell ringing", "jingling"), 1000, 1000, "metallic", "strike", 5),
    (("a gong", "a struck gong", "a gong sounding"), 180, 180, "metallic", "strike", 0),
    (("a plucked string", "string plucks", "a guitar being plucked"), 250, 250, "bright", "strike", 2.2),
    (("a xylophone", "xylophone notes", "wooden bars being struck"), 1000, 1000, "hollow", "strike", 4),
)  # fmt: skip

EVENT_TYPES: dict[str, EventType] = {recipe[0][0]: EventType(*recipe) for recipe in _RECIPES}
"""All event types by name."""


def _zipf_probabilities() -> dict[str, float]:
    """Probabilities of the event types by the Zipf–Mandelbrot law."""
    # Ranks are assigned in strides through the table, so that every family has common and rare members.
    stride = 27
    ranks = 1 + (np.arange(len(EVENT_TYPES)) * stride) % len(EVENT_TYPES)
    weights = 1 / (ranks + 1)
    return dict(zip(EVENT_TYPES, (weights / weights.sum()).tolist(), strict=True))


EVENT_PROBABILITIES: dict[str, float] = _zipf_probabilities()
"""Probability of each type in a scene's first draw: ∝ 1 / (r + 1) for the r-th most common type."""


def render_event(
    kind: EventType,
    num_samples: int,
    *,
    pitch: float,
    speed: float,
    sample_rate: int,
    random: np.random.Generator,
) -> Waveform:
    """Render one event.

    Args:
        kind: Type of the event.
        num_samples: Length of the event in samples.
        pitch: Factor on the recipe's frequencies, about 1.
        speed: Factor on the recipe's rate of cycles, about 1.
        sample_rate: Rate of the waveform in Hz.
        random: Random generator of the noise; tones draw no numbers.

    Returns:
        `(num_samples,)` float32, root mean square 1 before its ends are faded.

    Examples:
        >>> random = np.random.default_rng(0)
        >>> hum = EVENT_TYPES["a low hum"]
        >>> render_event(hum, 16000, pitch=1.0, speed=1.0, sample_rate=16000, random=random).shape
        (16000,)
    """
    seconds = np.arange(num_samples) / sample_rate
    cycle = seconds * (kind.rate_hz * speed if kind.rate_hz else sample_rate / num_samples)
    cycle -= np.floor(cycle)
    start, end = kind.start_hz * pitch, kind.end_hz * pitch
    if kind.timbre in _PARTIALS:
        if end == start:
            turns = start * seconds
        else:
            turns = np.cumsum(start * np.exp(np.log(end / start) * cycle)) / sample_rate
        positions = (turns * _TABLE_SIZE).astype(np.int64) & (_TABLE_SIZE - 1)
        carrier = _wavetable(kind.timbre)[positions]
    else:
        octaves = _NOISE_OCTAVES[kind.timbre]
        carrier = _noise(start, octaves, num_samples, sample_rate, random)
        if end != start:
            # Noise has no pitch to bend: a glide is a cross-fade from one band to another.
            carrier = (1 - cycle) * carrier + cycle * _noise(end, octaves, num_samples, sample_rate, random)
    signal = carrier * _envelope_curve(kind.envelope, cycle)
    signal /= np.sqrt(np.mean(np.square(signal)))
    ramp = np.arange(num_samples) / (_FADE_SECONDS * sample_rate)
    signal *= np.minimum(1, np.minimum(ramp, ramp[::-1]))  # no click where an event starts or stops
    played: Waveform = signal.astype(np.float32)
    return played


@cache
def _wavetable(timbre: Timbre) -> Curve:
    """One period of a tone: reading a table costs the same for eight partials as for one."""
    turn = np.arange(_TABLE_SIZE) / _TABLE_SIZE
    partials = _PARTIALS[timbre].items()
    period: Curve = np.sum([amplitude * np.sin(2 * np.pi * n * turn) for n, amplitude in partials], axis=0)
    return period


def _noise(
    centre: float, octaves: float, num_samples: int, sample_rate: int, random: np.random.Generator
) -> Curve:
    """Noise between `octaves` below and above `centre`, drawn in the frequency bins of that band alone."""
    size = 1 << (num_samples - 1).bit_length()  # other lengths can take ten times as long
    hz_per_bin = sample_rate / size
    lowest = int(centre * 2**-octaves / hz_per_bin)
    highest = int(min(centre * 2**octaves, sample_rate / 2) / hz_per_bin)
    spectrum = np.zeros(size // 2 + 1, dtype=np.complex128)
    bins = max(1, min(highest, len(spectrum)) - lowest)
    spectrum[lowest : lowest + bins] = random.standard_normal((bins, 2)) @ (1, 1j)
    noise: Curve = np.fft.irfft(spectrum, size)[:num_samples]
    noise /= np.sqrt(np.mean(np.square(noise)))
    return noise


def _envelope_curve(envelope: Envelope, cycle: Curve) -> Curve:
    """Loudness in [0, 1] by the position in the cycle, also in [0, 1)."""
    match envelope:
        case "steady":
            return np.ones_like(cycle)
        case "tremolo":
            return 0.5 - 0.5 * np.cos(2 * np.pi * cycle)
        case "gate":
            return (cycle < 0.5).astype(np.float64)
        case "strike":
            return np.exp(-8 * cycle)
        case "swell":
            return cycle
        case "fade":
            return 1 - cycle
