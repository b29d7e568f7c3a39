"""Observation of a run: metrics, events, timeline, goodput, progress and the watch over its ranks."""
