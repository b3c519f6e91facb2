"""Teacher features that are computed once and read again."""
