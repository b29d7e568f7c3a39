"""Task files for lm-evaluation-harness, on local data."""
