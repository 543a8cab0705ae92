"""Operators: each has a plain reference, a fast form per device, and one public function."""
