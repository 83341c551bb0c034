"""Where jobs read and write: local folders and S3, manifests, audio files and result tables."""
