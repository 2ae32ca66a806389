"""What the attack program can do; see the README of the folder above."""
