"""Attentions to compare VCA with, one per file: published ones, and a row of the VCA paper's Table 3."""
