"""Encoding a source of pairs with the current encoders, without side effects on the training run."""
