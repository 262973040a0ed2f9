"""What several test modules need: an exact oracle, tensors of every kind, and other processes."""
