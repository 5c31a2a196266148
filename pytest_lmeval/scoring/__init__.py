"""What is found out by scoring tokens: folds over the stream."""
