"""Other programs that serve models: plug-ins that make them compute what this package computes.

vllm serve FOLDER        # FOLDER: written by tnllm convert MODEL FOLDER --to hf
"""
