"""AudioCaps, Clotho and WavCaps, in the layouts in which they are published and packed."""
