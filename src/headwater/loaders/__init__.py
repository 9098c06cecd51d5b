"""What users give as rows, and what they gave before; knows no curvature."""
