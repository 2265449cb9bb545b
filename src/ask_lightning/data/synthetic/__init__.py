"""Soundscapes made on the spot, in memory or on disk in the layouts of the published datasets."""
