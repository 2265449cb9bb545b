"""From a source of pairs to embeddings by the current encoders, without a trace in the training run."""
