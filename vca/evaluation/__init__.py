"""Evaluation: accuracy, complexity, feature extractors, image sets, statistics and evaluation records."""
