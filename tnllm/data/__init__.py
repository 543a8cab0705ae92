"""From text to batches: corpora, token shards, the loader."""
