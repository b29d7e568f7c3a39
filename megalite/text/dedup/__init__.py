"""Deduplication of text: exact copies, near copies by MinHash, and documents that contain benchmark text."""
