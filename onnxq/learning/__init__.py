"""Learning how weights round, how wide steps are, and the weights themselves."""
