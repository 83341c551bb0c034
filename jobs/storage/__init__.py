"""Input and output of jobs: local folders and S3, manifests, audio files and result tables."""
