"""What a run leaves behind: metrics and their values, typed records and examples, the journal, the history. No torch."""
