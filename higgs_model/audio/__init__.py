"""Recordings: file I/O, resampling, loudness, trimming, quality checks. Independent of codes, text and the network."""
