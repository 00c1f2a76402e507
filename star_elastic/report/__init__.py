"""An evaluation as tables and as one page."""
