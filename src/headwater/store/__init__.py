"""Numbers at rest; knows no maths."""
