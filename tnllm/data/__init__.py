"""From text to batches: corpora, token shards, the loaders."""
