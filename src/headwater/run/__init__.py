"""The one bridge between the maths and the results: tiles of query x train."""
