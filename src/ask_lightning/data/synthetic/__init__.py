"""Synthetic soundscapes, in memory or on disk in the layouts of the published datasets."""
