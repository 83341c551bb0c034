"""The voice library, its storage, and reference recordings."""
