"""Made-up data and checkpoints for tests, benches and training: nothing is downloaded."""
