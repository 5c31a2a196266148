"""Is it still as good, and still as fast? Baselines, margins, and versions that are run side by side."""
