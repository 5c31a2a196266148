"""Score texts and answers: sums over the stream, the metrics computed from them, and the files they are saved in."""
