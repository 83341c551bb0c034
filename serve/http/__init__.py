"""Routes, request bodies, errors and middleware."""
