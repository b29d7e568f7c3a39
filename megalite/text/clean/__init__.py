"""Cleaning of raw text: published quality rules, masking of personal data, a report of what was rejected and why."""
