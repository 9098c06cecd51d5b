"""Records of JAX trainings, and their steps once more."""
