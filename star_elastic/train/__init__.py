"""Nested distillation: one run that trains the router and every size against the frozen parent."""
