"""How the ranks of one job hear of each other."""
