"""The memory of a run: planned without numbers, tried before training, lowered, and gone on with where it is short."""
