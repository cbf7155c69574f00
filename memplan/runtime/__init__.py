"""What runs a Program: the executor and, as decision kinds ask for them, the arena and the tiers."""
