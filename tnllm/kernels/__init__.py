"""Operators: each has a plain reference, a fast implementation per device, and one public function."""
