"""What the tests share: worker processes, misbehaving groups, small models and data."""
