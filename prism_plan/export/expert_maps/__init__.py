"""Expert maps: which expert is in which slot of each rank, for engines with equal slots a rank."""
