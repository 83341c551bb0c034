"""From a validated request to a stream of audio."""
