"""Papers as recipes: each method is frozen settings and a few lines."""
