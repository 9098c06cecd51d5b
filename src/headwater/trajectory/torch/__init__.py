"""Records of torch trainings, and their steps once more."""
