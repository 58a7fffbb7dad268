"""The operators inside other projects' models."""
