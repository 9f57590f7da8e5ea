"""The attention backends behind `attention.py`, a file each, and what they share."""
