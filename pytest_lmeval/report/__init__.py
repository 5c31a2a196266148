"""Render records as terminal tables, Markdown, HTML and export formats; `metrics.json` is the only source."""
