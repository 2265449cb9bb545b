"""Helpers of all rooms: argument checks, ids, atomic files, ranks, optional packages, text tables."""
