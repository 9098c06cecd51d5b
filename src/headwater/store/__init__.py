"""Scores, fits and runs in files and folders; knows no maths."""
