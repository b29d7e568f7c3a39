"""What the tests share: worker processes, misbehaving process groups, small models and data."""
