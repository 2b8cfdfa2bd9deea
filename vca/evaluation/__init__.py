"""Evaluation: accuracy, feature extractors, image sets, statistics and evaluation records."""
