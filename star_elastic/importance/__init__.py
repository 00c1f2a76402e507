"""Importance: activations of a parent -> a score per unit -> an order per axis."""
