"""A provider and a loader become one operator for the whole data set."""
