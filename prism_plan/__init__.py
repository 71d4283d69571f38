"""Expert placement for Mixture-of-Experts models on a few unequal edge servers."""

__version__ = "0.1.0"
