"""Signals of an armed process: who handles each, and how the agent hears of one while the main thread is blocked."""
