"""The Ray Serve deployments and their settings."""
