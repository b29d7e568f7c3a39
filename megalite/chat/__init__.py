"""Conversations with a trained model, in the terminal or in a page that is served from this machine only."""
