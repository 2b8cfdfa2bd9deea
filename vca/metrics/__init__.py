"""FID, KID, Inception Score, precision and recall: arrays in, numbers out."""
