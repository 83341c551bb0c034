"""Learning: from recordings with transcripts to a checkpoint that speaks."""
