"""What is held where, and how large it is."""
