"""Processes that start ranks: what they do when the platform evicts them."""
