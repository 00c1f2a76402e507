"""What a size costs: counted exactly, measured in milliseconds, or asked for as a budget."""
