"""Sampling and recurrent decoding."""
