"""What to run, checked and expanded to runs without importing torch."""
