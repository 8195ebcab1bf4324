"""What a user swaps in: the erased pipelines, one per family, and the check before each call."""
