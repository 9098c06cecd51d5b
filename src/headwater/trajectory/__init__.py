"""What training did: a record of it, its steps taken again, and derivatives of what it came to."""
