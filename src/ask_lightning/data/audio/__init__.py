"""From audio files to waveforms and spectrograms: decoding, crops, the cache, features."""
