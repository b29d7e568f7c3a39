"""Text from a trained model: sampling with a key/value cache, in any tensor and pipeline layout."""
