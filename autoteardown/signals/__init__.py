"""Signals of an armed process: interception, ownership, dispositions, and waking the main thread."""
