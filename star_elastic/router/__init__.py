"""The budget router: which widths to use for a budget, learned end to end."""
