"""Reads the reports of a job and draws them, for `autoteardown timeline` and for the pages of `autoteardown drill`."""
