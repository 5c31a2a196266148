"""Intervals and tests. Uses numpy alone: importing scipy takes longer than most of the work here."""
