"""What a run leaves behind, in words: metrics, records, the journal, the environment. Standard library only."""
