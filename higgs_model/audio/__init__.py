"""Recordings: reading files, sample rates, loudness. Knows nothing of codes, text or the network."""
