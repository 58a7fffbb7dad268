"""WKV in place of other projects' implementations, which are not changed for it."""
