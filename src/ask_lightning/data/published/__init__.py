"""AudioCaps, Clotho and WavCaps as they lie on people's disks."""
