"""Optimizer, learning-rate schedules, gradient norm."""
