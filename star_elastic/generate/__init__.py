"""Elastic budget control: one size thinks within a budget of tokens, one size answers."""
