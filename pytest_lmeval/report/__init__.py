"""From records to pages: `metrics.json` is the source, everything else is rendered from it."""
