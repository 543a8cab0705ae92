"""Sampling and recurrent decoding: `decoder.generate` for text, `context.read` for states, `loading.load` for both."""
