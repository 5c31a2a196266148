"""Is it still as good, and still as fast? Baselines, margins, and versions run side by side."""
