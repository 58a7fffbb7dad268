"""The operators of this package in the models of other projects."""
